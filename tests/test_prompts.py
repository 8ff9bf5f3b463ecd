"""Prompts: which tokens a batch holds, and what its masks mark."""

from copy import copy, deepcopy
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ByT5Tokenizer

from crosslayer import Example, UserError, load_model
from crosslayer.models.prompts import TooLong, prepare

PICTURE = Image.new("RGB", (40, 30), "teal")


def prepared(model, *examples: Example):
    return prepare(model.model, model.processor, examples)


def words(model, batch, mask: torch.Tensor) -> list[str]:
    tokenizer = getattr(model.processor, "tokenizer", model.processor)
    return [tokenizer.decode(tokens[chosen]) for tokens, chosen in zip(batch.tokens, mask, strict=True)]


def test_the_response_mask_marks_the_response_and_its_end(llava):
    batch = prepared(
        llava,
        Example("a", "describe the picture .", "a cat .", PICTURE),
        Example("b", "is there a dog ?", "no .", PICTURE),
        Example("c", "yes", "a tiger , a lion and a bus ."),
    )
    assert words(llava, batch, batch.response) == ["a cat . </s>", "no . </s>", "a tiger , a lion and a bus . </s>"]


def test_without_a_response_all_text_after_the_first_token_is_marked(llava):
    batch = prepared(llava, Example("a", "is there a dog ?", image=PICTURE), Example("b", "a cat and"))
    assert words(llava, batch, batch.response) == ["is there a dog ?", "a cat and"]
    assert not (batch.response & batch.image).any()
    assert not batch.response[batch.position <= 0].any()


def test_an_empty_response_is_its_end_mark(llama):
    batch = prepared(llama, Example("a", "a cat", ""))
    assert words(llama, batch, batch.response) == ["</s>"]


def test_image_tokens_are_counted_where_the_mark_stands(llava):
    batch = prepared(
        llava,
        Example("a", "describe the picture .", "a cat .", PICTURE),
        Example("b", "describe <image> .", "a cat .", PICTURE),
        Example("c", "a cat and a dog and a cat"),
    )
    assert batch.image.sum(1).tolist() == [9, 9, 0]
    first = [batch.position[i][batch.image[i]].min().item() for i in (0, 1)]
    assert first == [1, 2]


def test_padding_is_on_the_left_and_has_no_position(llama):
    batch = prepared(llama, Example("a", "no"), Example("b", "a cat and a dog"))
    assert batch.attention.tolist() == [[False] * 4 + [True] * 2, [True] * 6]
    assert batch.position.tolist() == [[-1, -1, -1, -1, 0, 1], [0, 1, 2, 3, 4, 5]]


def test_a_batch_holds_the_tokens_of_each_prompt_alone(llava):
    examples = [Example("a", "no", "yes"), Example("b", "is there a dog ?", "no .", PICTURE)]
    together = prepared(llava, *examples)
    for i, example in enumerate(examples):
        alone = prepared(llava, example)
        assert torch.equal(together.tokens[i][together.attention[i]], alone.tokens[0])
        assert torch.equal(together.response[i][together.attention[i]], alone.response[0])


def test_templated_and_plain_prompts_share_a_batch(llama_folder):
    model = load_model(llama_folder)
    model.processor.chat_template = "<s>{% for m in messages %}{{ m.content }} {% endfor %}"
    examples = [
        Example("a", "is there a dog ?", "no ."),
        Example("b", "a cat", form="text"),
        Example("c", "", tokens=(5, 6, 7)),
        Example("d", "describe the picture ."),
        Example("e", "yes", "a bus .", form="text"),
    ]
    together = prepared(model, *examples)
    for i, example in enumerate(examples):
        alone = prepared(model, example)
        assert torch.equal(together.tokens[i][together.attention[i]], alone.tokens[0])
        assert torch.equal(together.response[i][together.attention[i]], alone.response[0])


@pytest.mark.filterwarnings("ignore:This sequence already has")
def test_a_tokenizer_without_spans_finds_the_response_too(llama):
    tokenizer = ByT5Tokenizer()
    batch = prepare(llama.model, tokenizer, [Example("a", "a", "bc"), Example("b", "abc", "d")])
    found = [tokenizer.decode(row[mask]) for row, mask in zip(batch.tokens, batch.response, strict=True)]
    assert found == ["bc</s>", "d</s>"]


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_mark(llama_folder):
    model = load_model(llama_folder)
    tokenizer = model.processor
    tokenizer.pad_token = None
    batch = prepared(model, Example("a", "no"), Example("b", "a cat"))
    assert batch.tokens[0, 0] == tokenizer.eos_token_id
    assert not batch.attention[0, 0]


@pytest.mark.parametrize(
    ("example", "named"),
    [
        (Example("p7", "<image> and <image>", image=PICTURE), "2 <image> marks but 1 image; leave a single mark"),
        (Example("p7", "what is <image> ?"), "1 <image> mark but no image; give the image, or leave"),
        (Example("p7", "a cat", "<image> ."), "'p7' has image tokens, but no image; give the image, or leave them out"),
        (Example("p7", "a cat", "<image> .", PICTURE), "give another image, and leave image tokens out of response"),
        (Example("p7", "a cat " * 70), "'p7' has 141 tokens; the model's context holds 128; shorten it by 13"),
        (Example("p7", "a cat " * 70, image=PICTURE), "has 150 tokens, 9 of them for its image; .* shorten it by 22"),
        (
            Example("p7", "a cat", "a dog " * 70),
            "has 144 tokens with its response; .* shorten prompt or response by 16",
        ),
        (Example("p7", "", tokens=()), "prompt 'p7' has 0 tokens; give it words"),
        (Example("p7", "a cat", image=Path("/no/such.png")), "/no/such.png: no such image"),
    ],
)
def test_prompts_that_cannot_work_are_named(llava, example, named):
    with pytest.raises(UserError, match=named):
        prepared(llava, Example("fine", "a cat"), example)


def test_an_image_for_a_text_model_is_refused(llama):
    with pytest.raises(UserError, match="LlamaForCausalLM reads no images"):
        prepared(llama, Example("a", "a cat", image=PICTURE))


def test_an_image_that_is_too_long_alone_is_not_to_be_mended_with_fewer_words(llava, monkeypatch):
    monkeypatch.setattr(llava.model.config.get_text_config(), "max_position_embeddings", 9)
    with pytest.raises(TooLong, match=r"9 of them for its image; the model's context holds 9; choose a smaller image"):
        prepared(llava, Example("p7", "a cat", image=PICTURE))


@pytest.mark.parametrize(("form", "step"), [("chat", "add --plain"), ("text", "take the processor that belongs to")])
def test_an_image_without_an_image_token_in_the_text_is_named(llava, form, step):
    model = copy(llava.model)
    model.config = deepcopy(model.config)
    model.config.image_token_id = 10**6
    with pytest.raises(UserError, match=f"prompt 'p7' has an image, but no image token .*; {step}"):
        prepare(model, llava.processor, [Example("p7", "a cat", image=PICTURE, form=form)])
