"""Baselines and chance: closed forms in numpy, and sets that are alike in what they claim."""

from pathlib import Path

import numpy as np
import pytest
import torch

from crosslayer import Ablate, Add, Everywhere, Intervention, Scale, Steer, UserError, Wiring
from crosslayer.hallucination.suppress.chance import (
    NEAREST,
    Habits,
    habits,
    matched_sets,
    random_directions,
    write_norms,
)
from crosslayer.hallucination.suppress.directions import Along, logistic, mean_difference, probe, reads_at
from crosslayer.hallucination.suppress.objective import Objective
from making import array, finished_coder
from test_suppress import SMALL, TEXT, responses


@pytest.fixture(scope="module")
def objective(llama):
    return Objective(llama, responses(llama), Path(), SMALL)


def clouds(seed=0):
    generator = torch.Generator().manual_seed(seed)
    wrong, right = (torch.randn(n, 5, generator=generator) * torch.tensor([1, 2, 3, 1, 9.0]) for n in (40, 60))
    return wrong + torch.tensor([2.0, 0, 1, 0, 0]), right


def test_a_difference_of_means_and_a_probe_are_as_long_as_the_means_are_apart_along_them():
    wrong, right = clouds()
    apart = array(wrong).mean(0) - array(right).mean(0)
    np.testing.assert_allclose(array(mean_difference(wrong, right)), apart, atol=1e-6)
    vector = array(probe(wrong, right))
    np.testing.assert_allclose(vector @ apart, vector @ vector, rtol=1e-5)
    assert abs(vector[0]) > 2 * np.abs(vector[1:]).max()  # the coordinate that tells them apart


def test_a_probe_is_where_the_gradient_of_its_loss_is_zero():
    x, y = np.random.default_rng(0).normal(size=(50, 4)), np.arange(50) % 2
    w = logistic(x, y.astype(float), penalty=0.7)
    share = 1 / (1 + np.exp(-(x @ w[:-1] + w[-1])))
    np.testing.assert_allclose(x.T @ (share - y) + 0.7 * w[:-1], 0, atol=1e-4)
    assert (share - y).sum() == pytest.approx(0, abs=1e-4)


def test_reads_are_the_stream_where_decisions_are_made(llama, objective):
    found = reads_at(llama, objective.hallucinated, Path())
    for decision, row in zip(objective.hallucinated, found, strict=True):
        ids = [*llama.processor(decision.response.prompt)["input_ids"], *decision.response.token_ids[: decision.place]]
        seen = []
        norms = [layer.post_attention_layernorm for layer in llama.model.model.layers]
        handles = [n.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0, -1])) for n in norms]
        with torch.no_grad():
            llama.model(input_ids=torch.tensor([ids]))
        [handle.remove() for handle in handles]
        torch.testing.assert_close(row, torch.stack(seen), atol=1e-4, rtol=1e-4)


def test_the_best_layer_and_action_are_those_of_the_least_objective(objective):
    strategy = Along(direction="mean-difference", actions=(Add(-1.0), Ablate()))
    found = strategy.choose(objective, finished_coder(Wiring.full(3)))
    values = [step.terms.value for step in found.path]
    assert len(values) == 6
    best = int(np.argmin(values))
    assert [step.kept for step in found.path] == [i == best for i in range(6)]
    (edit,) = found.edits
    assert (edit.layer, edit.action) == (best // 2, strategy.actions[best % 2])


def test_habits_are_counted_at_the_positions_that_are_edited(llama, objective):
    coder, seen = finished_coder(Wiring.full(3)), []
    for part in objective.parts:
        streams = []
        norms = [layer.post_attention_layernorm for layer in llama.model.model.layers]
        handles = [n.register_forward_pre_hook(lambda _, args, to=streams: to.append(args[0])) for n in norms]
        with torch.no_grad():
            llama.model(**part.batch.inputs)
        [handle.remove() for handle in handles]
        seen.append(torch.stack(streams, 2)[part.batch.position > 0])
    with torch.no_grad():
        acts = torch.stack([coder.encode_layer(s, torch.cat(seen)[:, s]).dense() for s in range(3)], 1)
    found = habits(objective, coder, TEXT)
    torch.testing.assert_close(found.rate, (acts > 0).float().mean(0))
    torch.testing.assert_close(found.mean, acts.sum(0) / (acts > 0).sum(0).clamp_min(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.norm, torch.stack([W.flatten(1).norm(dim=1) for W in coder.W_dec]))


def made_habits(F=60):
    rng = np.random.default_rng(1)
    rate, mean, norm = (torch.from_numpy(np.exp(rng.normal(size=(2, F)))) for _ in range(3))
    rate[:, :5] = 0.0  # never active
    return Habits(rate.float(), mean.float(), norm.float())


def test_random_sets_are_of_the_same_layers_and_alike_in_rate_activation_and_norm():
    known, features = made_habits(), [(0, 10), (4, 20), (4, 30)]
    edits = [
        Intervention(layer=layer, feature=f, action=Scale(0.1 * i), where=TEXT) for i, (layer, f) in enumerate(features)
    ]
    sets = matched_sets(known, [0, 4], edits, 20, seed=3)
    assert sets == matched_sets(known, [0, 4], edits, 20, seed=3)
    for some in sets:
        assert sorted((e.layer, e.action.factor) for e in some) == [(0, 0.0), (4, 0.1), (4, 0.2)]
        assert len({(e.layer, e.feature) for e in [*some, *edits]}) == 6
        assert {e.where for e in some} == {TEXT}
    assert len(set(sets)) > 15
    of = np.log(np.stack([array(x) for x in (known.rate[:, 5:], known.mean[:, 5:], known.norm[:, 5:])], -1))
    for i, (layer, feature) in enumerate(features):
        place = [0, 4].index(layer)
        apart = (((of[place] - of[place, feature - 5]) / of[place].std(0)) ** 2).sum(1)
        taken = [f - 5 for other, f in features if other == layer and f != feature]
        nearest = set((np.setdiff1d(np.argsort(apart), taken, assume_unique=True)[1 : NEAREST + 2] + 5).tolist())
        drawn = {e.feature for some in sets for e in some if e.action.factor == 0.1 * i}
        assert drawn <= nearest
        assert len(drawn) > 4


def test_a_layer_without_enough_others_is_named():
    with pytest.raises(UserError, match="layer 0 has fewer than 30 other active features"):
        edits = [Intervention(layer=0, feature=f, action=Ablate()) for f in range(20, 50)]
        matched_sets(made_habits(), [0, 4], edits, 1)


def test_random_directions_are_as_long_as_what_the_edit_writes(llama, objective):
    coder = finished_coder(Wiring.full(3))

    def norms_of(strength, *edits):
        made = [Intervention(layer=s, feature=f, action=a, writes=next(iter(w), None)) for s, f, a, *w in edits]
        return write_norms(objective, coder, made, strength, Everywhere())

    norms = norms_of(0.5, (1, 3, Ablate()), (2, 4, Ablate()))
    assert norms[0] == 0
    assert (norms[1:] > 0).all()
    doubled, half = norms_of(1.0, (1, 3, Ablate())), norms_of(0.5, (1, 3, Ablate()))
    assert doubled[1].item() == pytest.approx(2 * half[1].item(), rel=1e-5)
    layers = ((1, 0.5), (2, 0.5))
    torch.testing.assert_close(norms_of(2.0, (1, 3, Scale(0.5), layers)), half)
    sets = [[e for e in some if isinstance(e, Steer)] for some in random_directions(norms, coder.d_model, TEXT, 3)]
    assert [[edit.layer for edit in some] for some in sets] == [[1, 2]] * 3
    lengths = torch.tensor([[edit.vector.norm() for edit in some] for some in sets])
    torch.testing.assert_close(lengths, norms[1:].expand(3, 2))
    assert abs(torch.cosine_similarity(sets[0][0].vector, sets[1][0].vector, 0)) < 0.9
