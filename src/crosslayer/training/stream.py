"""From chunks of activations to shuffled batches, at any place of the stream, without keeping state."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol, runtime_checkable

import torch

from crosslayer.activations.record import Activations
from crosslayer.activations.usable import Usable, usable


@runtime_checkable
class ChunkSource(Protocol):
    """An endless stream of activations in chunks; the same index always gives the same tokens."""

    def chunk(self, index: int) -> Activations:
        """All tokens of chunk `index`."""
        ...


@runtime_checkable
class PromptSource(Protocol):
    """An endless stream of prompts, in the same order each time."""

    def prompts(self, start: int, n: int) -> list[Any]:
        """n prompts from number `start` on."""
        ...


@dataclass(frozen=True)
class Place:
    """Where in a stream the next batch lies: enough to resume."""

    chunk: int = 0
    batch: int = 0


@dataclass(frozen=True)
class StreamBatch:
    """One batch to train on and the place of the one after it."""

    batch: Any
    """What the objective takes: activations, or prompts."""
    following: Place
    n_first: int = 0
    """First positions left out of this batch's chunk; counted at its first batch."""
    n_outliers: int = 0
    """Norm outliers, likewise."""


def shuffled_batches(source: ChunkSource, batch_tokens: int, seed: int, place: Place) -> Iterator[StreamBatch]:
    """Batches of about `batch_tokens` tokens from `place` on, for ever.

    A chunk is the shuffle buffer: its usable tokens are permuted by a generator seeded with its number and cut into
    batches of equal size, so nothing is lost and any place can be reached by capturing one chunk.
    """
    index, skip = place.chunk, place.batch
    while True:
        activations = source.chunk(index)
        chosen = usable(activations)
        batches = _cut(chosen, batch_tokens, seed * 1_000_003 + index)
        for number, rows in enumerate(batches):
            if number < skip:
                continue
            last = number + 1 == len(batches)
            following = Place(index + 1) if last else Place(index, number + 1)
            left_out = (chosen.n_first, chosen.n_outliers) if number == 0 else (0, 0)
            yield StreamBatch(activations[rows], following, *left_out)
        index, skip = index + 1, 0


def prompt_batches(source: PromptSource, batch_prompts: int, place: Place) -> Iterator[StreamBatch]:
    """Batches of whole prompts from `place` on, for ever; its `chunk` counts them."""
    for index in count(place.chunk):
        yield StreamBatch(source.prompts(index * batch_prompts, batch_prompts), Place(index + 1))


def usable_tokens(source: ChunkSource, place: Place, batch_tokens: int, n: int, seed: int) -> Activations:
    """At least `n` usable tokens from `place` on: what follows the training data, for calibration."""
    parts, found = [], 0
    for batch in shuffled_batches(source, batch_tokens, seed, place):
        parts.append(batch.batch)
        found += len(batch.batch)
        if found >= n:
            return Activations.concatenate(parts)
    raise AssertionError("streams are endless")


def _cut(chosen: Usable, batch_tokens: int, seed: int) -> tuple[torch.Tensor, ...]:
    rows = chosen.keep.nonzero().squeeze(1)
    if not len(rows):
        return ()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order.to(rows.device)].tensor_split(max(1, round(len(rows) / batch_tokens)))
