"""Chat templates: the tokens are those of Hugging Face's own rendering, and the response mask is the response."""

import string
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from crosslayer import Example, UserError
from crosslayer.models.chat import write
from crosslayer.models.prompts import prepare

PICTURE = Image.new("RGB", (40, 30), "teal")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
THOUGHT = "{{ '<think>\n\n</think>\n\n' if loop.last and m.role != 'user' }}"
THINKING = CHATML.replace("{{ m.content }}", THOUGHT + "{{ m.content }}")
VICUNA = (  # LLaVA-1.5's own
    "{% for m in messages %}{{ m.role.upper() + ': ' }}{% for c in m.content if c.type == 'image' %}{{ '<image>\n' }}"
    "{% endfor %}{% for c in m.content if c.type == 'text' %}{{ c.text + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
RESPONSES = ("yes .", "No, there isn't:\nonly a cat", "a\n\nb", "", "12345 <cats> & dögs")
HISTORY = (("is there a cat?", "yes, one."),)


def learned(kind: str, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """A small tokenizer as GPT-2's and Qwen's (bytes), or as Llama's (with a mark for blanks)."""
    texts = ["is there a cat in the picture? yes, there is one. no, there isn't. user assistant USER ASSISTANT: "] * 9
    tokenizer = Tokenizer(models.BPE(unk_token=None if kind == "bytes" else "<unk>"))
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else [*string.printable, "ö"]
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    settings = {"vocab_size": 500, "special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**settings))
    if kind != "bytes":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": eos, "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=SPECIAL[4:], **names)


@pytest.fixture
def prepared(monkeypatch, llama, llava):
    def prepared(processor, *examples: Example):
        model = llava.model if hasattr(processor, "image_processor") else llama.model
        monkeypatch.setattr(model.config.get_text_config(), "max_position_embeddings", 4096)
        return prepare(model, processor, examples)

    return prepared


@pytest.mark.parametrize("kind", ["bytes", "blanks"])
@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>"), (GEMMA, "<end_of_turn>"), (MISTRAL, "</s>"), (THINKING, "<|im_end|>")]
)
def test_a_tokenizers_template(prepared, kind, template, end):
    tokenizer = learned(kind)
    tokenizer.chat_template = template
    for response in RESPONSES:
        example = Example("a", "and a dog?", response, history=HISTORY)
        batch = prepared(tokenizer, example, Example("longer", "is there " * 40, response))
        ids = batch.tokens[0][batch.attention[0]].tolist()
        said = [turn for pair in HISTORY for turn in pair] + [example.prompt, response]
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
        theirs = tokenizer.apply_chat_template(turns, return_dict=False)
        assert ids == theirs[: len(ids)]
        assert tokenizer.decode(theirs[len(ids) :]).strip() == ""
        masked = batch.tokens[0][batch.response[0]].tolist()
        assert tokenizer.decode(masked).strip() == f"{response}{end}"
        asked = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
        assert prepared(tokenizer, example.asked()).tokens[0].tolist() == asked


@pytest.mark.parametrize("kind", ["bytes", "blanks"])
def test_a_processors_template(prepared, kind):
    tokenizer, image = learned(kind), CLIPImageProcessorPil(size=96, crop_size=96)
    settings = {"patch_size": 32, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(image, tokenizer, chat_template=VICUNA, **settings)
    for response in RESPONSES[:3]:
        example = Example("a", "and a dog?", response, PICTURE, (("<image>\nis there a cat?", "yes, one."),))
        batch = prepared(processor, example, Example("b", "no picture here?", response))
        first = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "is there a cat?"}]
        texts = [{"type": "text", "text": text} for text in ("yes, one.", "and a dog?", response)]
        contents = [first, *([text] for text in texts)]
        turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
        theirs = processor.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=True, return_dict=True)
        ids = batch.tokens[0][batch.attention[0]].tolist()
        asked = theirs["input_ids"][0]
        assert ids[: len(asked)] == list(asked)
        assert torch.equal(batch.inputs["pixel_values"], torch.as_tensor(np.array(theirs["pixel_values"])))
        for row in (0, 1):
            masked = batch.tokens[row][batch.response[row]]
            assert tokenizer.decode(masked).strip() == f"{response}</s>"
        assert batch.image.sum(1).tolist() == [9, 0]


def test_texts_and_plain_prompts_go_round_the_template(prepared):
    tokenizer = learned("blanks")
    examples = [Example("a", "is there", "a cat"), Example("a", "yes")]
    plain = [prepared(tokenizer, example).tokens for example in examples]
    tokenizer.chat_template = CHATML
    for example, tokens in zip(examples, plain, strict=True):
        assert torch.equal(prepared(tokenizer, replace(example, form="text")).tokens, tokens)
        assert not torch.equal(prepared(tokenizer, example).tokens, tokens)


def test_turns_without_a_template_are_joined():
    tokenizer = learned("blanks")
    text = write(tokenizer, Example("a", "and a dog?", "no", history=HISTORY), False)
    assert text.text == "is there a cat? yes, one. and a dog? no</s>"
    assert text.text[text.response_start :] == "no</s>"


def test_a_template_that_refuses_is_a_bad_row(prepared):
    tokenizer = learned("bytes")
    tokenizer.chat_template = "{{ raise_exception('no such roles') }}"
    with pytest.raises(UserError, match=r"prompt 'a': the chat template refuses it \(no such roles\); add --plain"):
        prepared(tokenizer, Example("a", "yes"))


def test_tokens_texts_and_pictures_make_one_batch(llava):
    tokens = (1, 7, 8, 9)
    mixed = [Example("a", "", tokens=tokens), Example("b", "is there a cat ?", "no", PICTURE), Example("c", "a cat")]
    batch = prepare(llava.model, llava.processor, mixed)
    assert batch.tokens[0][batch.attention[0]].tolist() == list(tokens)
    assert batch.response[0].sum() == 3
    for row in (1, 2):
        alone = prepare(llava.model, llava.processor, [mixed[row]])
        assert torch.equal(batch.tokens[row][batch.attention[row]], alone.tokens[0])
        assert torch.equal(batch.response[row][batch.attention[row]], alone.response[0])
    assert batch.inputs["pixel_values"].shape[0] == 1


def test_a_batch_of_pictures_is_processed_at_once(llava, monkeypatch):
    calls, whole = [], type(llava.processor.image_processor).__call__
    count = lambda self, *a, **k: calls.append(1) or whole(self, *a, **k)  # noqa: E731
    monkeypatch.setattr(type(llava.processor.image_processor), "__call__", count)
    prepare(llava.model, llava.processor, [Example(str(i), "a cat", image=PICTURE) for i in range(5)])
    assert len(calls) == 1


class Talkative(LlavaProcessor):
    """A processor that adds something to the text, as PaliGemma's does."""

    def __call__(self, images=None, text=None, **settings):
        return super().__call__(images=images, text=[f"{line} ." for line in text], **settings)


def test_a_processor_that_writes_behind_the_response_is_refused(llava, monkeypatch):
    monkeypatch.setattr(llava.processor, "__class__", Talkative)
    prepare(llava.model, llava.processor, [Example("a", "a cat", image=PICTURE)])
    with pytest.raises(UserError, match="Talkative rewrites the response to an image; leave responses out"):
        prepare(llava.model, llava.processor, [Example("a", "a cat", "no", PICTURE)])
