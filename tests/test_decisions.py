"""Where naming an object and not naming it part ways, and the margin by which it is named."""

from dataclasses import replace

import pytest
import torch

from crosslayer.hallucination.decisions import as_batch, decisions
from crosslayer.hallucination.responses import Mention, Response
from crosslayer.hallucination.rewriting import without
from crosslayer.models.load import load_model


@pytest.fixture(scope="module")
def model():
    return load_model("emoji-llava")


def said(model, text, kind="caption", **mentions):
    """A labelled response without a picture: names of objects, and whether each is hallucinated."""
    ids, words = model.processor.tokenizer(text, add_special_tokens=False)["input_ids"], text.split()
    found = tuple(
        Mention(
            object=name,
            chars=(text.index(name), text.index(name) + len(name)),
            tokens=(words.index(name), words.index(name) + 1),
            hallucinated=hallucinated,
        )
        for name, hallucinated in mentions.items()
    )
    asked = {"id": text, "image_id": "1", "image": None, "prompt": "describe the picture .", "truth": ()}
    return Response(**asked, kind=kind, response=text, token_ids=tuple(ids), mentions=found)


def test_a_decision_is_where_the_response_and_the_one_without_the_mention_part(model):
    one = said(model, "a dog , a bone and a star .", dog=False, bone=True)
    shorter = {"dog": "a bone and a star .", "bone": "a dog and a star ."}
    plain = decisions(model, [one])
    told = decisions(model, [one], lambda _, mention: shorter[mention.object])
    word = model.processor.tokenizer.convert_tokens_to_ids
    assert [(d.place, d.chosen, d.instead) for d in plain] == [(1, word("dog"), None), (4, word("bone"), None)]
    assert [(d.place, d.chosen, d.instead) for d in told] == [
        (1, word("dog"), word("bone")),
        (2, word(","), word("and")),
    ]
    assert [d.hallucinated for d in told] == [False, True]


def test_a_question_decides_between_yes_and_no(model):
    (decision,) = decisions(model, [said(model, "yes .", kind="question", yes=True)])
    word = model.processor.tokenizer.convert_tokens_to_ids
    assert (decision.place, decision.chosen, decision.instead) == (0, word("yes"), word("no"))


def test_margins_are_those_of_a_forward_pass_over_prompt_and_prefix_alone(model, tmp_path):
    texts = ["a dog , a bone and a star .", "a star and a bone ."]
    made = [d for text in texts for d in decisions(model, [said(model, text, bone=True)])]
    ready = as_batch(model, made, tmp_path)
    with torch.no_grad():
        margins = ready.margin(model.model(**ready.batch.inputs).logits)
    for decision, margin in zip(made, margins, strict=True):
        tokenizer = model.processor.tokenizer
        ids = [*tokenizer(decision.response.prompt)["input_ids"], *decision.response.token_ids[: decision.place]]
        with torch.no_grad():
            odds = model.model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(0)[decision.chosen]
        assert margin.item() == pytest.approx(torch.logit(odds).item(), abs=1e-3)


def test_captions_of_the_bundled_world_are_rewritten(model):
    one = replace(said(model, "a dog , a bone and a star .", dog=False, bone=True, star=False), truth=("dog", "star"))
    assert [without(one, mention) for mention in one.mentions] == [
        "a bone and a star .",
        "a dog and a star .",
        "a dog and a bone .",
    ]
    alone = said(model, "a dog .", dog=False)
    assert without(alone, alone.mentions[0]) is None
