"""What proves an edit: plain controls, sentences that follow from tests, and refusals of one line."""

from math import log

import pytest
import torch

from crosslayer.hallucination.evidence import Change, images_needed
from crosslayer.hallucination.prove.biasing import HALVINGS, LIMIT, bias_for, biased
from crosslayer.hallucination.prove.findings import findings, goals
from crosslayer.hallucination.prove.proof import Chance, Cost, OnTest, Proof, plain
from crosslayer.metrics import Figure
from test_replacement import batch_of


def test_a_bias_is_added_to_the_logits_of_its_tokens_alone(llava):
    batch = batch_of(llava)
    before = llava.model(**batch.inputs).logits
    with torch.no_grad(), biased(llava, [3, 5], -1.5):
        during = llava.model(**batch.inputs).logits
    wanted = before.clone()
    wanted[..., [3, 5]] -= 1.5
    torch.testing.assert_close(during, wanted)
    assert torch.equal(llava.model(**batch.inputs).logits, before)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_bias_is_found_by_which_a_share_is_the_one_wanted(sign):
    share = 0.2
    found = bias_for(lambda bias: 1 / (1 + 2.718281828459045 ** (-sign * (bias - 2))), share)
    assert found == pytest.approx(2 + sign * log(share / (1 - share)), abs=2 * LIMIT / 2**HALVINGS)


def change(name, before, difference, half):
    """A change whose interval is the difference +- half."""
    figure = Figure(difference, difference - half, difference + half)
    return Change(
        name=name, difference=figure,
        before=Figure(before, before, before), after=Figure(before + difference, 0.0, 1.0),
        relative=difference / before, n_images=100, gained=1, lost=20, p_value=0.001,
        images_needed=images_needed(difference, half / 1.96, 100),
    )  # fmt: skip


def proof(lowered, kept, drawn):
    """Evidence in which one measure is lowered and one retained."""
    edit = OnTest(
        method="descent", edits=3, strength=1.0, kl=0.01,
        changes={"absent_named": lowered, "object_recall": kept}, holm={"absent_named": 0.002},
    )  # fmt: skip
    return Proof(
        model="m", kept="descent", counts={}, methods=(edit,), doses={}, opposite={}, lowest=-1.0,
        unchanged={"same": 9, "prompts": 10}, beaten=(), equal_kl=None, cost=Cost(plain=1.0, edited=1.2),
        chance=(Chance(draws="random-features", measure="absent_named", before=0.7, edited=0.2, drawn=drawn),),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("lowered", "kept", "drawn", "supported"),
    [
        ((-0.5, 0.1), (-0.005, 0.01), (0.5,) * 20, [True, True, False, True, True]),
        ((-0.1, 0.2), (-0.005, 0.05), (0.1,) * 20, [False, False, False, False, True]),
        ((-0.5, 0.1), (-0.1, 0.01), (0.5,) * 3, [True, False, False, False, True]),
    ],
    ids=["clear", "undecided", "lost, and too few draws"],
)
def test_sentences_follow_from_the_tests(lowered, kept, drawn, supported):
    evidence = proof(change("absent_named", 0.7, *lowered), change("object_recall", 0.99, *kept), drawn)
    found = findings(evidence)
    assert [finding.supported for finding in found] == supported
    assert ("images would tell" in found[0].evidence) == (not supported[0])
    if not supported[0]:
        assert f"about {images_needed(lowered[0], lowered[1] / 1.96, 100):,} images" in found[0].evidence
    assert "9 of 10 prompts" in found[2].evidence
    cut, _, recall = goals(evidence)
    assert cut.met == (lowered[0] / 0.7 <= -0.6 and supported[0])
    assert recall.met == (kept[0] >= -0.02)


def test_what_could_not_be_measured_is_null_in_json():
    assert plain({"a": float("nan"), "b": ({"c": 1.0}, None)}) == {"a": None, "b": [{"c": 1.0}, None]}
