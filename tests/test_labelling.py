"""From an answer to a labelled response: yes or no, what is named, and which tokens cover it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from crosslayer import Example
from crosslayer.hallucination.labelling import Said, label, parse
from crosslayer.hallucination.responses import Query
from crosslayer.hallucination.spans import covering, decoded_spans, response_tokens
from crosslayer.hallucination.synonyms import load_table
from crosslayer.models.prompts import prepare

EMOJI = load_table("emoji")
CAPTION = Query(
    id="c", image_id="1", image=None, prompt="describe the picture .", kind="caption", truth=("cat", "star")
)
QUESTION = Query(
    id="q", image_id="1", image=None, prompt="is there a dog ?", kind="question", truth=("cat",), object="dog"
)


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """A token a byte: many ways to cut a text into tokens would decode to the same."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"do": 256, "og": 257, "</s>": 258}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[("d", "o")]))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("yes", "yes"),
        ("Yes, there is a dog.", "yes"),
        ("No.", "no"),
        (' "NO"', "no"),
        ("no one is there", "no"),
        ("There is no dog", None),
        ("I see; yes", None),
        ("yesterday", None),
        ("no-one", None),
        ("not at all", None),
        ("", None),
    ],
)
def test_the_first_word_decides(text, answer):
    understood = parse(text)
    assert (understood and understood[0]) == answer
    if understood:
        assert text[slice(*understood[1])].lower() == answer


def test_a_caption_names_what_is_there_and_what_is_not(llava):
    labelled = label(CAPTION, Said("a cat , a dog and a star ."), EMOJI, llava.processor)
    words = ["a", "cat", ",", "a", "dog", "and", "a", "star", "."]
    assert llava.processor.tokenizer.convert_ids_to_tokens(labelled.token_ids) == words
    assert [(m.object, m.tokens, m.hallucinated) for m in labelled.mentions] == [
        ("cat", (1, 2), False),
        ("dog", (4, 5), True),
        ("star", (7, 8), False),
    ]
    assert labelled.hallucinates
    assert [m.tokens for m in label(CAPTION, Said(labelled.response), EMOJI).mentions] == [None] * 3


def test_a_yes_is_the_mention_of_what_was_asked_about():
    said = {text: label(QUESTION, Said(text), EMOJI) for text in ("Yes .", "no .", "a dog is there")}
    assert [r.answer for r in said.values()] == ["yes", "no", None]
    assert [[(m.object, m.chars, m.hallucinated) for m in r.mentions] for r in said.values()] == [
        [("dog", (0, 3), True)],
        [],
        [],
    ]


def test_tokens_are_those_that_a_forward_pass_sees(llava):
    example = Example("a", "is there a cat ?", "a cat and a dog .")
    ids, spans = response_tokens(llava.processor, example)
    batch = prepare(llava.model, llava.processor, [example])
    assert torch.equal(torch.tensor(ids), batch.tokens[batch.response][:-1])  # the last one ends the response
    assert [example.response[a:b].strip() for a, b in spans] == example.response.split()


def test_tokens_that_were_cut_otherwise_are_found_by_decoding(byte_level):
    example = Example("a", "?", "a dog", form="text")
    encoded, spans = response_tokens(byte_level, example)
    by_byte = byte_level.convert_tokens_to_ids(["Ġ", "a", "Ġ", "d", "og"])
    assert by_byte != encoded
    generated, cut = response_tokens(byte_level, example, by_byte)
    assert (generated, cut) == (by_byte, [(0, 0), (0, 1), (1, 2), (2, 3), (3, 5)])
    assert covering(cut, (2, 5)) == (3, 5)
    assert "".join("a dog"[a:b] for a, b in spans) == "a dog"


@given(st.text(alphabet="ab dogé猫 ", min_size=1).map(str.strip).filter(bool), st.data())
def test_decoding_covers_every_character_as_offsets_do(byte_level, text, data):
    ids, spans = response_tokens(byte_level, Example("a", "?", text, form="text"))
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    assert covering(decoded_spans(byte_level, ids), (start, end)) == covering(spans, (start, end))
