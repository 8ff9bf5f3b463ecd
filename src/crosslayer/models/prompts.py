"""From examples to the tensors of one forward pass, with a mask for each thing that later stages ask about."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from crosslayer.data.examples import Example
from crosslayer.errors import UserError

IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Batch:
    """B prompts of at most P tokens, padded on the left, on the model's device."""

    inputs: dict[str, Any]
    """Keyword arguments of the model's forward."""
    tokens: Int[Tensor, "B P"]
    attention: Bool[Tensor, "B P"]
    """False at padding."""
    image: Bool[Tensor, "B P"]
    """True at image tokens."""
    response: Bool[Tensor, "B P"]
    """True at the tokens of the response, its end mark included; at all text after the first token without one."""

    @property
    def position(self) -> Int[Tensor, "B P"]:
        """Position of each token in its prompt, padding not counted; -1 at padding."""
        return (self.attention.long().cumsum(1) * self.attention) - 1


def prepare(model: PreTrainedModel, processor: Any, examples: Sequence[Example]) -> Batch:
    """Tokenise prompts with their responses, and preprocess their pictures.

    Raises:
        UserError: when pictures and image marks do not match, or a prompt is longer than the model's context.
    """
    if processor is None:
        raise UserError(f"{type(model).__name__} came without tokenizer or processor; put its files beside the weights")
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    pictures = [example.picture() for example in examples]
    prompts = [_marked(e.prompt, picture is not None, e.id) for e, picture in zip(examples, pictures, strict=True)]
    texts = [_full_text(prompt, e.response, tokenizer) for prompt, e in zip(prompts, examples, strict=True)]
    inputs = _process(model, processor, texts, [picture for picture in pictures if picture is not None])
    tokens, attention = inputs["input_ids"], inputs["attention_mask"].bool()
    _check_length(model, attention, examples)
    image = tokens == getattr(model.config, "image_token_id", -1)
    lengths = [_response_length(p, e.response, t, tokenizer) for p, e, t in zip(prompts, examples, texts, strict=True)]
    return Batch(inputs, tokens, attention, image, _response_mask(attention, image, lengths))


def _marked(prompt: str, has_picture: bool, id: str) -> str:
    marks = prompt.count(IMAGE_MARK)
    if marks > has_picture:
        raise UserError(f"prompt {id!r}: {marks} {IMAGE_MARK} marks but {int(has_picture)} image; they must match")
    return f"{IMAGE_MARK}{prompt}" if has_picture and not marks else prompt


def _full_text(prompt: str, response: str | None, tokenizer: Any) -> str:
    return prompt if response is None else f"{prompt} {response}{tokenizer.eos_token or ''}"


def _process(model: PreTrainedModel, processor: Any, texts: list[str], pictures: list) -> dict[str, Any]:
    if pictures and not hasattr(processor, "image_processor"):
        raise UserError(f"{type(model).__name__} reads no images; leave the image out or choose another model")
    images = {"images": pictures} if pictures else {}
    inputs = processor(text=texts, padding=True, return_tensors="pt", **images)
    inputs.pop("token_type_ids", None)
    return dict(inputs.to(model.device))


def _check_length(model: PreTrainedModel, attention: Tensor, examples: Sequence[Example]) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length, index = attention.sum(1).max(0)
    if limit is not None and length > limit:
        raise UserError(f"prompt {examples[int(index)].id!r} has {length} tokens; the model's context holds {limit}")


def _response_length(prompt: str, response: str | None, text: str, tokenizer: Any) -> int | None:
    """Tokens of the response: what the text has beyond the prompt; image marks count alike in both."""
    if response is None:
        return None
    return len(tokenizer(text)["input_ids"]) - len(tokenizer(prompt)["input_ids"])


def _response_mask(attention: Tensor, image: Tensor, lengths: list[int | None]) -> Tensor:
    P = attention.shape[1]
    mask = torch.zeros_like(attention)
    first = attention.long().argmax(1)
    for b, length in enumerate(lengths):
        start = int(first[b]) + 1 if length is None else P - length
        mask[b, start:] = True
    return mask & attention & ~image
