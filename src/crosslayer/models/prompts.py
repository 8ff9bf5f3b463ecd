"""From examples to the tensors of one forward pass, with a mask for each thing that later stages ask about."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import compress
from typing import Any

import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from crosslayer.data.examples import Example, Examples
from crosslayer.errors import UserError
from crosslayer.models.chat import Text, write
from crosslayer.models.pixels import in_one_pass


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

    def until(self, n: int) -> "Batch":
        """Its first n columns."""

        def cut(value: Any) -> Any:
            return value[:, :n] if isinstance(value, Tensor) and value.shape[:2] == self.tokens.shape else value

        masks = (self.attention[:, :n], self.image[:, :n], self.response[:, :n])
        return Batch({name: cut(value) for name, value in self.inputs.items()}, self.tokens[:, :n], *masks)


class BadExamples(UserError):
    """Some of the examples of a batch cannot be read; `reasons` says why, by their place in the batch."""

    def __init__(self, reasons: dict[int, str]):
        super().__init__(reasons[min(reasons)])
        self.reasons = reasons


class TooLong(BadExamples):
    """They have more tokens than the model's context holds."""


def prepare(model: PreTrainedModel, processor: Any, examples: Sequence[Example]) -> Batch:
    """Tokenise prompts with their responses, and preprocess their pictures, all pictures at once.

    Raises:
        BadExamples: when a picture cannot be read, pictures and image marks do not match, or a prompt is empty.
        TooLong: when a prompt is too long for the model's context.
        UserError: when the model reads no images and there are some, or it came without a tokenizer.
    """
    tokenizer = _tokenizer(model, processor)
    pictures = _each(examples, lambda e: e.picture())
    if any(pictures) and not hasattr(processor, "image_processor"):
        raise UserError(f"{type(model).__name__} reads no images; leave the image out or choose another model")
    paired = list(zip(examples, pictures, strict=True))
    texts = _each(paired, lambda pair: write(processor, pair[0], pair[1] is not None))
    seen = [place for place, picture in enumerate(pictures) if picture is not None]
    vision = _process(processor, [texts[i] for i in seen], [pictures[i] for i in seen], seen)
    written = _tokens(tokenizer, examples, texts)
    ids, responses = [row[0] for row in written], [row[1] for row in written]
    for place, row in zip(seen, _without_padding(vision, "input_ids"), strict=True):
        ids[place] = row
    _check_responses(processor, ids, responses)
    _check_image_tokens(model, ids, seen, examples)
    _check_lengths(model, ids, seen, examples)
    inputs = _padded(model, ids, vision, seen, tokenizer.pad_token_id)
    tokens, attention = inputs["input_ids"], inputs["attention_mask"].bool()
    image = tokens == getattr(model.config, "image_token_id", -1)
    lengths = [None if response is None else len(response) for response in responses]
    return Batch(inputs, tokens, attention, image, _response_mask(attention, image, lengths))


def prepare_good(
    model: PreTrainedModel, processor: Any, data: Sequence[Any], numbers: Sequence[int]
) -> tuple[Batch | None, list[int]]:
    """The examples of a data set with these numbers as a batch, without the bad ones, and the numbers of those in it.

    Bad ones are skipped only where the data set takes note of them, as `load_data`'s do; which they are depends on
    nothing but the data and the model. The batch is None when all of them are bad. `data` is a sequence of examples, of
    which no others are made.

    Raises:
        UserError: when more are bad than the data set puts up with, or it takes no notes.
    """
    if not isinstance(data, Examples):
        return prepare(model, processor, [data[n] for n in numbers]), list(numbers)
    batch, left = None, [(n, example) for n in numbers if (example := data[n]).id not in data.skipped.reasons]
    while left and batch is None:
        try:
            batch = prepare(model, processor, [example for _, example in left])
        except BadExamples as bad:
            for place, reason in bad.reasons.items():
                data.skipped.note(left[place][1].id, reason)
            left = [item for place, item in enumerate(left) if place not in bad.reasons]
    data.skipped.look(len(numbers), len(data), data.name)
    return batch, [n for n, _ in left]


def context_limit(model: PreTrainedModel) -> int:
    """Tokens that the model's context holds; no limit where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def _tokenizer(model: PreTrainedModel, processor: Any) -> Any:
    if processor is None:
        raise UserError(f"{type(model).__name__} came without a tokenizer; add its files to the model's folder")
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _each(items: Sequence[Any], make: Callable[[Any], Any]) -> list[Any]:
    """What is made of each item; what fails is gathered and raised at once."""
    made, reasons = [], {}
    for place, item in enumerate(items):
        try:
            made.append(make(item))
        except UserError as error:
            reasons[place] = str(error)
    if reasons:
        raise BadExamples(reasons)
    return made


def _process(processor: Any, texts: list[Text], pictures: list[Image.Image], places: list[int]) -> dict[str, Any]:
    """What the processor makes of texts with a picture each; where it fails, each alone, to name the bad ones."""
    if not texts:
        return {}
    bos = processor.tokenizer.bos_token or ""
    written = [text.text.removeprefix(bos) if text.complete else text.text for text in texts]
    try:
        images = [[picture] for picture in pictures]
        inputs = in_one_pass(processor)(text=written, images=images, padding=True, return_tensors="pt")
    except (ValueError, TypeError, IndexError, RuntimeError, ZeroDivisionError) as error:
        if len(texts) == 1:
            found = f"{type(processor).__name__} refuses the image or its text ({' '.join(str(error).split())[:200]})"
            step = "give another image, and leave image tokens out of response and earlier turns"
            raise BadExamples({places[0]: f"{found}; {step}"}) from error
        if refused := _refused(processor, texts, pictures, places):
            raise BadExamples(refused) from error
        raise UserError(f"{type(processor).__name__} takes each of these images, but not together ({error})") from error
    return dict(inputs)


def _refused(processor: Any, texts: list[Text], pictures: list[Image.Image], places: list[int]) -> dict[int, str]:
    """Why the processor refuses those that it refuses when each is alone."""
    reasons = {}
    for text, picture, place in zip(texts, pictures, places, strict=True):
        try:
            _process(processor, [text], [picture], [place])
        except BadExamples as bad:
            reasons |= bad.reasons
    return reasons


def _tokens(tokenizer: Any, examples: Sequence[Example], texts: list[Text]) -> list[tuple[list[int], list[int] | None]]:
    """Tokens of each text, before images take their room, and those of its response, where there is one."""
    found: list[tuple[list[int], list[int] | None]] = [(list(example.tokens or ()), None) for example in examples]
    for complete in (False, True):
        alike = [i for i, e in enumerate(examples) if e.tokens is None and texts[i].complete == complete]
        rows = _encoded(tokenizer, [texts[i] for i in alike], add_special_tokens=not complete)
        for place, row in zip(alike, rows, strict=True):
            found[place] = row
    return found


def _encoded(tokenizer: Any, texts: list[Text], **settings: Any) -> list[tuple[list[int], list[int] | None]]:
    """The same by one call, as each costs more than the tokens of a prompt."""
    if not texts:
        return []
    settings["verbose"] = False
    written = tokenizer([text.text for text in texts], return_offsets_mapping=tokenizer.is_fast, **settings)
    offsets = written["offset_mapping"] if tokenizer.is_fast else [None] * len(texts)
    rows = zip(texts, written["input_ids"], offsets, strict=True)
    return [(ids, _response(tokenizer, text, ids, spans, settings)) for text, ids, spans in rows]


def _response(
    tokenizer: Any, text: Text, ids: list[int], spans: list[tuple[int, int]] | None, settings: dict[str, Any]
) -> list[int] | None:
    """Tokens of the response; one that lies across its beginning is one of it, where the tokenizer gives spans."""
    if text.response_start is None:
        return None
    if spans is None:
        return ids[len(tokenizer(text.text[: text.response_start].rstrip(" "), **settings)["input_ids"]) :]
    return [id for id, (_, end) in zip(ids, spans, strict=True) if end > text.response_start]


def _check_image_tokens(
    model: PreTrainedModel, ids: list[list[int]], seen: list[int], examples: Sequence[Example]
) -> None:
    """Refuse a picture that the prompt's final form has no room for, and room without one.

    Of models that say which token stands for an image; what was sampled from the model itself may hold any.
    """
    token = getattr(model.config, "image_token_id", None)
    if token is None:
        return
    reasons = {}
    for place, example in enumerate(examples):
        if place in seen and token not in ids[place]:
            step = "add --plain" if example.form == "chat" else "take the processor that belongs to the model"
            what = f"has an image, but no image token in the form that the model reads; {step}"
            reasons[place] = f"prompt {example.id!r} {what}"
        elif place not in seen and example.tokens is None and token in ids[place]:
            what = "has image tokens, but no image; give the image, or leave them out of prompt and response"
            reasons[place] = f"prompt {example.id!r} {what}"
    if reasons:
        raise BadExamples(reasons)


def _check_lengths(model: PreTrainedModel, ids: list[list[int]], seen: list[int], examples: Sequence[Example]) -> None:
    limit, lengths = context_limit(model), [len(row) for row in ids]
    if empty := [place for place, n in enumerate(lengths) if n == 0]:
        raise BadExamples({place: f"prompt {examples[place].id!r} has 0 tokens; give it words" for place in empty})
    if wrong := [place for place, n in enumerate(lengths) if n > limit]:
        token = getattr(model.config, "image_token_id", -1)
        of_image = {place: ids[place].count(token) for place in seen}
        raise TooLong({i: _too_long(examples[i], lengths[i], of_image.get(i, 0), limit) for i in wrong})


def _too_long(example: Example, n: int, of_image: int, limit: int) -> str:
    """What to shorten, where words can be left out at all."""
    answered = example.response is not None
    image = f", {of_image} of them for its image" if of_image else ""
    step = f"shorten {'prompt or response' if answered else 'it'} by {n - limit}"
    if of_image >= limit:
        step = "choose a smaller image, where it then takes fewer tokens, or a model with a larger context"
    has = f"has {n} tokens{' with its response' if answered else ''}{image}"
    return f"prompt {example.id!r} {has}; the model's context holds {limit}; {step}"


def _padded(
    model: PreTrainedModel, ids: list[list[int]], vision: dict[str, Any], seen: list[int], pad: int
) -> dict[str, Any]:
    """Rows of unequal lengths as one batch, and what the processor made of the pictures, on the model's device.

    What it says of each token is padded like the tokens, with 0 where there is no picture, and left out where the
    model does not ask for it, and where it is what to train the model on.
    """
    inputs = {"input_ids": _left(ids, pad), "attention_mask": _left([[1] * len(row) for row in ids], 0)}
    asked_for = signature(model.forward).parameters
    for name, value in vision.items():
        if not isinstance(value, Tensor) or value.shape != vision["input_ids"].shape:
            inputs[name] = value
        elif name not in (*inputs, "labels") and name in asked_for:
            rows = [[0] * len(row) for row in ids]
            for place, row in zip(seen, _without_padding(vision, name), strict=True):
                rows[place] = row
            inputs[name] = _left(rows, 0)
    return {n: value.to(model.device) if isinstance(value, Tensor) else value for n, value in inputs.items()}


def _without_padding(vision: dict[str, Any], name: str) -> list[list[Any]]:
    """What the processor says of each token of its texts."""
    if not vision:
        return []
    rows, kept = vision[name].tolist(), vision["attention_mask"].tolist()
    return [list(compress(*row)) for row in zip(rows, kept, strict=True)]


def _left(rows: list[list[int]], fill: int) -> Int[Tensor, "B P"]:
    """The rows one below the other, padded on the left."""
    P = max(len(row) for row in rows)
    return torch.tensor([[fill] * (P - len(row)) + row for row in rows], dtype=torch.long)


def _check_responses(processor: Any, ids: list[list[int]], responses: list[list[int] | None]) -> None:
    """Refuse a processor that writes something behind the response, as PaliGemma's does."""
    for row, response in zip(ids, responses, strict=True):
        if response and row[-len(response) :] != response:
            raise UserError(f"{type(processor).__name__} rewrites the response to an image; leave responses out")


def _response_mask(attention: Tensor, image: Tensor, lengths: list[int | None]) -> Tensor:
    P = attention.shape[1]
    first = attention.long().argmax(1).tolist()
    starts = [begin + 1 if length is None else P - length for begin, length in zip(first, lengths, strict=True)]
    behind = torch.arange(P) >= torch.tensor(starts)[:, None]
    return behind.to(attention.device) & attention & ~image
