"""Suppression's parts: gradients are finite differences, a planted cause is found, strengths are chosen by the rule."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import crosslayer as xl
from crosslayer import Ablate, Everywhere, Intervention, Part, UserError, Wiring
from crosslayer.hallucination.labelling import Said, label
from crosslayer.hallucination.responses import Query
from crosslayer.hallucination.suppress.calibration import Calibration, at_kl
from crosslayer.hallucination.suppress.figures import Dose, asked_again, figures
from crosslayer.hallucination.suppress.objective import Objective, Weighing
from crosslayer.hallucination.suppress.selection import Ranked, measured, under
from crosslayer.hallucination.suppress.strengths import removed, turned_down
from crosslayer.hallucination.synonyms import EMOJI, load_table
from crosslayer.replacement.prefix import AS_IT_IS
from making import array, finished_coder
from test_interventions import CODERS, coder_of, double, logits_of  # noqa: F401
from test_replacement import batch_of

HERE = Path()
TEXT = Part("text")
STEP = 1e-3  # the norms of a Llama compute in float32 whatever its weights
SMALL = Weighing(at_least=1)
SAID = (("caption", "a cat and a dog .", "cat"), ("caption", "a tiger , a lion and a bus .", "tiger lion bus"))


def response(model, number, kind, text, truth, **more):
    """A response without a picture, labelled."""
    prompt = "describe the picture ." if kind == "caption" else f"is there a {more['object']} ?"
    query = Query(
        id=str(number), image_id=str(number), image=None, prompt=prompt, kind=kind, truth=tuple(truth.split()), **more
    )
    return label(query, Said(text), load_table(EMOJI), None if model is None else model.processor)


def responses(model):
    """Some that hallucinate, some that do not."""
    made = [response(model, i, *said) for i, said in enumerate(SAID)]
    made.append(response(model, 7, "question", "yes .", "cat", object="dog"))
    made.append(response(model, 8, "question", "no .", "cat", object="star"))
    return [*made, replace(made[1], id="9", image_id="9", prompt="a picture of")]


@pytest.mark.parametrize("settings", CODERS.values(), ids=CODERS)
def test_features_turned_down_alike_are_ablated_at_that_strength(double, settings):  # noqa: F811
    coder, batch = coder_of(**settings).double(), batch_of(double)
    chosen = [(s, f) for s in coder.sources for f in (3, 5, 8)]
    strengths = torch.zeros(len(coder.sources), 24, 1, dtype=torch.float64)
    for s, f in chosen:
        strengths[coder.sources.index(s), f] = 0.7
    edits = [Intervention(layer=s, feature=f, action=Ablate(), where=TEXT) for s, f in chosen]
    with torch.no_grad(), turned_down(double, coder, strengths, TEXT, batch):
        ours = double.model(**batch.inputs).logits
    theirs, real = logits_of(double, batch, coder, edits, strength=0.7), batch.attention
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(ours[real], double.model(**batch.inputs).logits[real], atol=1e-3)


def test_a_strength_of_0_is_the_model_bit_by_bit(llava):
    batch, coder = batch_of(llava), finished_coder(Wiring.full(3))
    plain = llava.model(**batch.inputs).logits
    with torch.no_grad(), turned_down(llava, coder, torch.zeros(3, 24, 3), Everywhere(), batch):
        assert torch.equal(llava.model(**batch.inputs).logits, plain)
    with torch.no_grad(), turned_down(llava, coder, torch.ones(3, 24, 3), Everywhere(), batch):
        assert not torch.equal(llava.model(**batch.inputs).logits, plain)


@pytest.mark.parametrize("where", [TEXT, Part("answer")], ids=str)
def test_the_gradient_is_a_finite_difference_of_the_edited_model(double, where):  # noqa: F811
    coder = finished_coder(Wiring.full(3)).double()
    objective = Objective(double, responses(double), HERE, SMALL)
    strengths = 0.2 + 0.5 * torch.rand(3, 24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    terms, gradient = objective.gradient(coder, strengths, where)

    def value(strengths):
        edits = [
            Intervention(layer=s, feature=f, action=Ablate(), where=where, writes=((t, float(strengths[s, f, t - s])),))
            for s in range(3)
            for f in range(24)
            for t in range(s, 3)
        ]
        return objective.measure(under(double, coder, edits, 1.0)).value

    assert terms.value == pytest.approx(value(strengths), abs=1e-9)
    assert gradient.abs().max() > 0.01
    for place in gradient.abs().flatten().topk(4).indices.tolist():
        step = torch.zeros(216, dtype=torch.float64).index_fill(0, torch.tensor([place]), STEP).view(3, 24, 3)
        slope = (value(strengths + step) - value(strengths - step)) / (2 * STEP)
        assert gradient.flatten()[place].item() == pytest.approx(slope, rel=2e-3)


def test_the_objective_is_its_definition(double):  # noqa: F811
    objective = Objective(double, responses(double), HERE, SMALL)
    coder, terms = finished_coder(Wiring.full(3)).double(), objective.measure(AS_IT_IS)
    assert (terms.kl, len(objective.hallucinated)) == (pytest.approx(0, abs=1e-9), 2)
    undone = np.log1p(np.exp(margins_of(double, objective.hallucinated) + 0.5))
    kinds = np.array([decision.response.kind for decision in objective.true])
    kept = np.log1p(np.exp(2.0 - margins_of(double, objective.true)))
    assert kinds.tolist() == ["caption"] * 6
    assert terms.kept == pytest.approx(kept.mean(), abs=1e-6)
    assert terms.value == pytest.approx(undone.sum() + kept.mean(), abs=1e-6)
    edits = [Intervention(layer=0, feature=f, action=Ablate()) for f in range(24)]
    assert measured(objective, coder, edits).kl > 1e-6


def margins_of(model, made):
    """Of each decision, by a pass of its own over the tokens before it."""
    margins = []
    for decision in made:
        before = (decision.response.token_ids or ())[: decision.place]
        ids = [*model.processor(decision.response.prompt)["input_ids"], *before]
        with torch.no_grad():
            logits = array(model.model(input_ids=torch.tensor([ids])).logits[0, -1])
        others = np.delete(logits, decision.chosen) if decision.instead is None else logits[[decision.instead]]
        margins.append(logits[decision.chosen] - np.log(np.exp(others).sum()))
    return np.array(margins)


def planted(model, weight=3.0):
    """A transcoder of weak features, one of which writes what tells "dog" from all other words, at every text token."""
    coder = finished_coder(Wiring.full(3))
    for W in coder.W_dec:
        W.data *= 0.01
    assert coder.thresholds is not None
    coder.W_enc[1].data[5], coder.b_enc[1].data[5], coder.thresholds[1, 5] = 0.0, 1.0, 0.5
    word = model.processor.convert_tokens_to_ids("dog")
    head = model.model.lm_head.weight.detach()
    coder.W_dec[1].data[5, 1] = weight * (head[word] - head.mean(0))
    return coder


def test_ranking_finds_the_one_feature_that_causes_the_margin(llama):
    weighing = Weighing(at_least=1, slack=20.0, collateral=0.1)  # a random model's margins are far below 0
    objective = Objective(llama, [response(llama, i, *said) for i, said in enumerate(SAID)], HERE, weighing)
    coder = planted(llama)
    alone = {
        (s, f): measured(objective, coder, [Intervention(layer=s, feature=f, action=Ablate(), where=TEXT)]).value
        for s in range(3)
        for f in range(24)
    }
    assert min(alone, key=lambda feature: alone[feature]) == (1, 5)
    found = Ranked(n=1).choose(objective, coder)
    assert found.features == [(1, 5)]
    assert found.path[-1].terms.value == pytest.approx(alone[1, 5], abs=1e-5)
    assert alone[1, 5] < objective.measure(AS_IT_IS).value


def test_too_little_to_choose_by_is_refused(llama):
    with pytest.raises(UserError, match="3 hallucinated mentions .* 20 are needed"):
        Objective(llama, [response(llama, i, *SAID[0]) for i in range(3)], HERE)
    with pytest.raises(UserError, match="hallucinates on every image"):
        Objective(llama, [response(llama, i, *SAID[0]) for i in range(3)], HERE, SMALL)


def dose(strength, chair_s, object_recall, kl=0.0):
    return Dose(strength=float(strength), figures={"chair_s": chair_s, "object_recall": float(object_recall)}, kl=kl)


def test_the_strength_is_the_one_with_least_hallucination_that_loses_little():
    curve = [dose(-1, 0.1, 0.99), dose(0, 0.8, 0.95), dose(0.5, 0.5, 0.945), dose(1, 0.3, 0.94), dose(1.5, 0.1, 0.93)]
    assert Calibration(points=1.0).choose(curve).strength == 1
    assert Calibration(points=0.6).choose(curve).strength == 0.5
    assert Calibration(points=2.0).choose(curve).strength == 1.5
    assert Calibration(points=0.0).choose(curve).strength == 0
    with pytest.raises(UserError, match="strengths"):
        Calibration(strengths=(0.0, -1.0))


@pytest.mark.parametrize(("pooled", "alone", "strength"), [(0.99, 0.98, 1), (0.98, 0.99, 0), (0.99, 0.97, 0)])
def test_a_figure_of_few_responses_may_lose_twice_as_much(pooled, alone, strength):
    names = ("partner_recall", "beside_its_lead_named")
    curve = [
        Dose(strength=s, kl=0.0, figures={"chair_s": 0.8 - 0.5 * s, **dict(zip(names, recalls, strict=True))})
        for s, recalls in ((0.0, (1.0, 1.0)), (1.0, (pooled, alone)))
    ]
    assert Calibration(points=1.0).choose(curve).strength == strength


def test_curves_are_compared_at_equal_kl():
    curve = [dose(-1, 0.9, 1, 0.5), dose(0, 0.8, 1), dose(1, 0.4, 1, 0.02), dose(2, 0.2, 1, 0.06)]
    assert at_kl(curve, "chair_s", 0.03) == pytest.approx(0.35)
    assert np.isnan(at_kl(curve, "chair_s", 0.07))


def test_figures_count_what_is_lost_and_what_is_left():
    pair = {"pair": ("cat", "dog")}
    made = [
        response(None, 0, "caption", "a cat and a dog .", "cat", **pair),
        response(None, 1, "caption", "a cat .", "cat", **pair),
        response(None, 2, "caption", "a cat .", "cat dog", **pair),
        response(None, 3, "question", "yes .", "cat", object="dog", **pair),
        response(None, 4, "question", "no .", "cat dog", object="dog", **pair),
    ]
    found = figures(made)
    assert (found["chair_s"], found["false_yes"], found["yes_recall"]) == (pytest.approx(1 / 3), 1, 0)
    assert (found["object_recall"], found["absent_named"]) == (0.75, 0.5)
    assert (found["beside_its_lead_named"], found["beside_its_lead_affirmed"]) == (0, 0)
    assert "without_its_lead_named" not in found
    assert found["partner_recall"] == 0


def test_queries_are_chosen_by_what_is_asked_and_not_by_what_was_answered():
    def asked(object, text, **more):
        return replace(response(None, 1, "question", text, "cat star", object=object, **more), id=object)

    made = [response(None, 0, "caption", "a cat .", "cat"), asked("bus", "no ."), asked("cat", "yes .")]
    made += [asked("star", "yes ."), asked("lion", "no .", samplings=("adversarial",))]
    made.append(asked("dog", "no .", pair=("cat", "dog")))
    for text in ("no .", "yes ."):
        again = [replace(r, response=text, answer=text[:-2]) if r.kind == "question" else r for r in made]
        assert [r.id for r in asked_again(again)] == ["0", "dog", "cat"]
    assert [r.id for r in asked_again(made[:-1])] == ["0", "lion", "cat"]


def test_what_is_removed_at_the_first_source_is_what_the_edit_takes_from_its_write(llama):
    coder, batch, writes = finished_coder(Wiring.full(3)), batch_of(llama), []
    edits = [Intervention(layer=0, feature=f, action=Ablate()) for f in (1, 2)]
    for some in ([], edits):
        handle = llama.sites.layers[0].write.register_forward_hook(lambda *args: writes.append(args[2]))
        with torch.no_grad(), xl.edited(llama, coder, some):
            handle.remove()
            handle = llama.sites.layers[0].write.register_forward_hook(lambda *args: writes.append(args[2]))
            llama.model(**batch.inputs)
        handle.remove()
    strengths = torch.zeros(3, 24, 1)
    strengths[0, [1, 2]] = 1.0
    delta = removed(llama, coder, strengths, Everywhere(), batch)[:, 0]
    real = batch.position > 0
    torch.testing.assert_close(delta, (writes[1] - writes[0])[real], atol=1e-5, rtol=1e-4)
