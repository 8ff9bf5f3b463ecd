"""Packing: documents joined with the end token and cut into pieces of one length."""

from collections.abc import Iterator, Sequence
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from tqdm import tqdm

from crosslayer.data.examples import Example, Examples
from crosslayer.errors import UserError

DOCUMENTS = 256
"""Documents tokenised together."""


def pack(documents: Examples, tokenizer: Any, context: int, n: int | None = None) -> Examples:
    """Pieces of `context` tokens: what follows a document's end in a piece is the next document's beginning.

    A piece begins with the begin token where the tokenizer adds one to a text. The last piece may be shorter. Token ids
    wait in a temporary file, four bytes each.

    Args:
        documents: examples of mere text.
        tokenizer: of the model that will read the pieces.
        context: tokens a piece.
        n: pieces wanted; as many as there are, when left out.

    Raises:
        UserError: when a piece would hold nothing, or the tokenizer has no end token.
    """
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise UserError(f"--context {context}: this model has no tokenizer with an end token to join documents with")
    begin = _begin(tokenizer)
    room = context - len(begin)
    if room < 1:
        raise UserError(f"--context is {context}; choose at least {len(begin) + 1}")
    stream = _stream(documents, tokenizer, None if n is None else n * room)
    pieces = -(-len(stream) // room)

    def make(i: int) -> Example:
        ids = stream[i * room : (i + 1) * room].tolist()
        return Example(f"{documents.name}[{i}]", "", form="text", tokens=(*begin, *ids))

    return Examples(documents.name, pieces if n is None else min(n, pieces), make, documents.skipped)


def _begin(tokenizer: Any) -> list[int]:
    ids = tokenizer("")["input_ids"]
    return ids[:1] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else []


def _stream(documents: Examples, tokenizer: Any, enough: int | None) -> np.ndarray:
    """The ids of all documents, each followed by the end token; no more documents than are enough."""
    with TemporaryFile() as file:
        for ids in _ids(documents, tokenizer):
            file.write(np.array([*ids, tokenizer.eos_token_id], np.int32).tobytes())
            if enough is not None and file.tell() >= 4 * enough:
                break
        file.flush()
        return np.memmap(file, np.int32, "r")


def _ids(documents: Sequence[Example], tokenizer: Any) -> Iterator[list[int]]:
    starts = range(0, len(documents), DOCUMENTS)
    for start in tqdm(starts, desc="tokenize", unit="batch", delay=2, leave=False):
        texts = [documents[i].prompt for i in range(start, min(start + DOCUMENTS, len(documents)))]
        yield from tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
