"""Which tokens of a response cover which of its characters."""

from collections.abc import Sequence
from typing import Any

from crosslayer.data.examples import Example
from crosslayer.models.chat import write

Span = tuple[int, int]


def response_tokens(
    processor: Any, example: Example, generated: Sequence[int] | None = None
) -> tuple[list[int], list[Span]]:
    """The tokens of an example's response, and which of its characters each covers.

    Where encoding the example with its response gives the tokens that were generated, or none are known, its offsets
    tell; otherwise, as where the tokenizer would have cut the same text differently, decoding them one by one does.

    Args:
        processor: of the model, or a tokenizer.
        example: with a response.
        generated: the response as the model generated it, without its end.

    Returns:
        Token ids [G] without the end of the response, and spans [G] of characters, the end excluded.
    """
    ids, spans = _encoded(processor, example)
    if generated is None or list(generated) == ids:
        return ids, spans
    return list(generated), decoded_spans(processor, generated)


def covering(spans: Sequence[Span], chars: Span) -> Span:
    """The tokens, the end excluded, that cover these characters in part or wholly."""
    touched = [i for i, (start, end) in enumerate(spans) if start < chars[1] and end > chars[0]]
    return (touched[0], touched[-1] + 1) if touched else (0, 0)


def decoded_spans(processor: Any, ids: Sequence[int]) -> list[Span]:
    """The characters that each token adds, or adds a part of, when the response is decoded token by token."""
    tokenizer = getattr(processor, "tokenizer", processor)
    texts = [tokenizer.decode(list(ids[:n]), skip_special_tokens=True) for n in range(len(ids) + 1)]
    whole = [_agree(text, texts[-1]) for text in texts]  # less than all of a text that ends in half a letter
    blank = len(texts[-1]) - len(texts[-1].lstrip())  # a response is kept without the blanks around it
    ends = [n + (len(text) > n) for n, text in zip(whole, texts, strict=True)]
    return [(max(0, start - blank), max(0, end - blank)) for start, end in zip(whole, ends[1:], strict=False)]


def _agree(text: str, other: str) -> int:
    """How many characters two texts have in common before they differ."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def _encoded(processor: Any, example: Example) -> tuple[list[int], list[Span]]:
    """As `crosslayer.models.prompts.prepare` encodes it: within its prompt, through the chat template."""
    text = write(processor, example, has_picture=example.image is not None)
    assert example.response is not None, f"{example.id}: there is no response"
    assert text.response_start is not None
    tokenizer = getattr(processor, "tokenizer", processor)
    settings = {"add_special_tokens": not text.complete, "verbose": False, "return_offsets_mapping": True}
    written = tokenizer(text.text, **settings)
    start, end = text.response_start, text.response_start + len(example.response.strip())
    kept = [
        (id, (max(a - start, 0), b - start))
        for id, (a, b) in zip(written["input_ids"], written["offset_mapping"], strict=True)
        if b > start and a < end
    ]
    return [id for id, _ in kept], [span for _, span in kept]
