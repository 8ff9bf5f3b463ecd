"""Descent in strengths: Adam by hand, never worse than the best few ablations, and edits as strong as it found."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from crosslayer import Ablate, Intervention, UserError, Wiring
from crosslayer.hallucination.suppress.descent import BETAS, Descent
from crosslayer.hallucination.suppress.objective import Objective, Weighing
from crosslayer.hallucination.suppress.selection import ablated, measured, under
from crosslayer.hallucination.suppress.strengths import as_edits, as_strengths
from making import array, finished_coder
from test_interventions import double  # noqa: F401
from test_suppress import SAID, SMALL, TEXT, planted, response, responses

HERE = Path()
STEP = 1e-3


def scaled(strengths):
    """Interventions as strong as that, to the last digit; there is no fourth layer to write to."""
    return [
        Intervention(layer=s, feature=f, action=Ablate(), where=TEXT, writes=((s + t, float(x)),))
        for (s, f, t), x in np.ndenumerate(strengths)
        if s + t < 3
    ]


def test_steps_are_those_of_adam_on_finite_differences(double):  # noqa: F811
    objective, coder = Objective(double, responses(double), HERE, SMALL), finished_coder(Wiring.full(3), F=3).double()
    found = Descent(steps=2, rate=0.3, penalty=0.01, at_most=9).choose(objective, coder)

    def value(x):
        return measured(objective, coder, scaled(x)).value

    x, m, v = np.zeros((3, 3, 3)), 0.0, 0.0
    for t in (1, 2):
        slope = np.zeros_like(x)
        for place in np.ndindex(x.shape):
            h = np.zeros_like(x)
            h[place] = STEP
            slope[place] = (value(x + h) - value(x - h)) / (2 * STEP)
        g = slope + 0.01
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
        step = (m / (1 - BETAS[0] ** t)) / (np.sqrt(v / (1 - BETAS[1] ** t)) + 1e-8)
        x = np.clip(x - 0.3 * (1 - (t - 1) / 2) * step, 0, 1)
    assert 0 < (x > 0).sum() < 18
    np.testing.assert_allclose(array(as_strengths(coder, found.edits)), x, atol=0.006)


def test_it_is_never_worse_than_the_best_three_ablations(llama):
    weighing = Weighing(at_least=1, slack=20.0, collateral=0.1)
    objective = Objective(llama, [response(llama, i, *said) for i, said in enumerate(SAID)], HERE, weighing)
    coder = planted(llama)
    found = Descent(steps=15, rate=0.3, penalty=0.0, at_most=72).choose(objective, coder)
    least = found.path[-1].terms.value
    assert least == pytest.approx(measured(objective, coder, found.edits).value, abs=1e-5)

    def value(*features):
        return measured(objective, coder, ablated(features, TEXT)).value

    likely = sorted([(1, f) for f in range(24)], key=value)[:4]
    assert likely[0] == (1, 5)
    assert least <= min(value(*some) for n in (1, 2, 3) for some in combinations(likely, n)) + 1e-4
    few = Descent(steps=8, rate=0.5, penalty=0.0, at_most=3).choose(objective, coder)
    assert len(few.edits) <= 3
    assert (1, 5) in few.features
    assert few.path[-1].terms.value <= value((1, 5)) + 1e-4


def test_strengths_depend_on_the_seed_alone_and_stay_few(llama):
    made = [*responses(llama), *(response(llama, i, "caption", "a bus .", "bus") for i in range(20, 26))]
    objective, coder = Objective(llama, made, HERE, SMALL, batch_prompts=2), finished_coder(Wiring.full(3))

    def run(seed):
        return Descent(steps=3, rate=0.3, penalty=0.0, at_most=5, drawn=1, seed=seed).choose(objective, coder)

    first, again, other = run(0), run(0), run(1)
    assert first == again
    assert [step.terms.kl for step in first.path] != [step.terms.kl for step in other.path]
    assert 0 < len(first.edits) <= 5
    strengths = as_strengths(coder, first.edits)
    assert 0 < strengths.max() <= 1
    assert strengths.min() == 0


def test_what_is_drawn_stands_for_all(double):  # noqa: F811
    made = [*responses(double), *(response(double, i, "caption", "a bus .", "bus") for i in range(20, 27))]
    objective, coder = Objective(double, made, HERE, SMALL, batch_prompts=2), finished_coder(Wiring.full(3)).double()
    x, generator = torch.full((3, 24, 3), 0.4, dtype=torch.float64), torch.Generator().manual_seed(0)
    whole, gradient = objective.gradient(coder, x, TEXT)
    seen = {}
    assert [len(group) for group in objective.groups] == [1, 7, 1, 0, 5]
    while len(seen) < 7 * 5:
        drawn = objective.drawn(1, generator)
        which = tuple(id(part.batch) for part in drawn)
        seen[which] = seen.get(which) or objective.gradient(coder, x, TEXT, drawn)
    terms, gradients = zip(*seen.values(), strict=True)
    assert np.mean([t.value for t in terms]) == pytest.approx(whole.value, rel=1e-9)
    assert np.mean([t.kl for t in terms]) == pytest.approx(whole.kl, rel=1e-9)
    torch.testing.assert_close(torch.stack(gradients).mean(0), gradient, atol=1e-5, rtol=1e-5)
    assert {part.times for part in objective.drawn(99, generator)} == {1}


def test_strengths_and_edits_tell_the_same_to_the_hundredth():
    coder = finished_coder(Wiring.full(3))
    strengths = torch.zeros(3, 24, 3)
    strengths[0, 3], strengths[1, 7, 1], strengths[2, 5, 0], strengths[2, 6, 0] = 1.0, 0.254, 0.996, 0.004
    strengths[1, 8] = torch.tensor([0.5, 1.0, 0.0])
    edits = as_edits(coder, strengths, TEXT)
    assert [edit.writes for edit in edits] == [None, ((2, 0.25),), ((1, 0.5), (2, 1.0)), None]
    assert {edit.action for edit in edits} == {Ablate()}
    torch.testing.assert_close(as_strengths(coder, edits), (100 * strengths).round() / 100)


def test_an_edit_of_many_strengths_is_what_the_descent_saw(double):  # noqa: F811
    objective, coder = Objective(double, responses(double), HERE, SMALL), finished_coder(Wiring.full(3)).double()
    generator = torch.Generator().manual_seed(1)
    strengths = (100 * torch.rand(3, 24, 3, dtype=torch.float64, generator=generator)).round() / 100
    edits = as_edits(coder, strengths, TEXT)
    seen = objective.gradient(coder, 0.5 * strengths, TEXT)[0]
    assert objective.measure(under(double, coder, edits, 0.5)).value == pytest.approx(seen.value, abs=1e-9)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"at_most": 0}, {"drawn": 0}, {"rate": -0.1}, {"penalty": -1.0}])
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(UserError, match="at least 1"):
        Descent(**settings)
