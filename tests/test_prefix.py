"""Passes that are split where edits begin: the same logits and answers, fewer columns, and only where that holds."""

from dataclasses import replace

import pytest
import torch

from crosslayer import Ablate, Intervention, Part, Set
from crosslayer.hallucination.suppress.selection import under
from crosslayer.models.hooks import reading
from crosslayer.models.prompts import prepare
from crosslayer.replacement.model import continuation
from crosslayer.replacement.prefix import AS_IT_IS, Prefixes
from crosslayer.replacement.where import Positions
from test_interventions import coder_of
from test_replacement import pictured

TEXT = tuple(Intervention(layer=0, feature=f, action=Set(3.0), where=Part("text")) for f in (3, 5, 8))
ANSWERS = ("a cat .", "a dog and a tiger .", "no")


def batch_of(model, answers=ANSWERS):
    """Pictures before texts of different lengths."""
    made = [
        replace(example, prompt=f"is there a {'dog and a ' * i}cat", response=said)
        for i, (example, said) in enumerate(zip(pictured(), answers, strict=False))
    ]
    return prepare(model.model, model.processor, made)


def whole(model, batch, edit):
    with torch.no_grad(), edit.on(batch):
        return model.model(**batch.inputs).logits


@pytest.mark.parametrize("edits", [(), TEXT], ids=["plain", "edited"])
def test_logits_are_those_of_a_whole_pass(llava, edits):
    batch, edit = batch_of(llava), under(llava, coder_of(), edits, 0.7)
    first, prefixes = batch.response.long().argmax(1) - 1, Prefixes(llava)
    seen = torch.arange(batch.tokens.shape[1]) >= first[:, None]
    for _ in range(2):  # the second time from what was kept
        with torch.no_grad():
            found = prefixes.logits(batch, edit, first)
        torch.testing.assert_close(found[seen], whole(llava, batch, edit)[seen], atol=1e-5, rtol=1e-4)
    assert prefixes.splits


@pytest.mark.parametrize("edits", [(), TEXT], ids=["plain", "edited"])
def test_answers_are_those_without_it(llava, edits):
    batch, edit, prefixes = batch_of(llava, (None,) * 3), under(llava, coder_of(), edits, 1.0), Prefixes(llava, kept=0)
    with edit.on(batch):
        wanted = continuation(llava, batch, max_new_tokens=6)
    assert prefixes.continuation(batch, edit, max_new_tokens=6).equal(wanted)
    assert prefixes.splits


def columns(model, batch, edit, prefixes):
    """How many columns the model runs on under an edit."""
    seen = []
    with torch.no_grad(), reading(model.sites, lambda layer, x: seen.append(x.shape[1]), [0]):
        prefixes.logits(batch, edit, torch.full((len(batch.tokens),), batch.tokens.shape[1] - 1))
    return sum(seen)


@pytest.mark.parametrize("where", [Part("image"), Positions((2,))], ids=["image", "position"])
def test_what_an_edit_touches_is_run_under_it(llava, where):
    batch, edits = batch_of(llava), [Intervention(layer=0, feature=3, action=Ablate(), where=where)]
    assert columns(llava, batch, under(llava, coder_of(), edits, 1.0), Prefixes(llava)) == batch.tokens.shape[1]


def test_what_comes_before_is_run_once(llava):
    batch, edit, prefixes = batch_of(llava), under(llava, coder_of(), TEXT, 1.0), Prefixes(llava)
    columns(llava, batch, edit, prefixes)
    text = (batch.attention & ~batch.image).sum(1).max() - 1  # all but what begins the prompt
    assert columns(llava, batch, edit, prefixes) == text


def test_a_model_that_answers_otherwise_in_pieces_is_run_whole(llava, monkeypatch):
    batch, prefixes = batch_of(llava), Prefixes(llava)
    honest = prefixes._rest
    monkeypatch.setattr(prefixes, "_rest", lambda *args: honest(*args) + 1.0)
    with pytest.warns(UserWarning, match="cannot be split"):
        assert columns(llava, batch, AS_IT_IS, prefixes) > batch.tokens.shape[1]  # the whole, beside the trial
    assert columns(llava, batch, AS_IT_IS, prefixes) == batch.tokens.shape[1]
