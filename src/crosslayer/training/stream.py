"""From chunks of activations to shuffled batches, at any place of the stream, without keeping state."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol, runtime_checkable

import torch

from crosslayer.activations.record import Activations
from crosslayer.activations.usable import Usable, usable
from crosslayer.team import ALONE, Group, Places
from crosslayer.training.part import Part


@runtime_checkable
class ChunkSource(Protocol):
    """An endless stream of activations in chunks; the same index always gives the same tokens."""

    def chunk(self, index: int) -> Activations:
        """All tokens of chunk `index`; in a team, those of this process, after those of the ranks below it."""
        ...


@runtime_checkable
class PromptSource(Protocol):
    """An endless stream of prompts, in the same order each time."""

    def prompts(self, start: int, n: int) -> list[Any]:
        """This process's share of n prompts from number `start` on."""
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
    """What the objective takes: this process's part of the activations, or of the prompts."""
    following: Place
    n_first: int = 0
    """First positions left out of this batch's chunk; counted at its first batch."""
    n_outliers: int = 0
    """Norm outliers, likewise."""


def shuffled_batches(
    source: ChunkSource, batch_tokens: int, seed: int, place: Place, tokens: Group = ALONE.tokens
) -> Iterator[StreamBatch]:
    """Batches of about `batch_tokens` tokens from `place` on, for ever; each process of a group has its part of them.

    A chunk is the shuffle buffer: its usable tokens are permuted by a generator seeded with its number and cut into
    batches of equal size, so nothing is lost and any place can be reached by capturing one chunk.
    """
    index, skip = place.chunk, place.batch
    while True:
        activations = source.chunk(index)
        chosen = usable(activations, tokens)
        batches = _cut(chosen, batch_tokens, seed * 1_000_003 + index, tokens)
        for number, (rows, places) in enumerate(batches):
            if number < skip:
                continue
            last = number + 1 == len(batches)
            following = Place(index + 1) if last else Place(index, number + 1)
            left_out = (chosen.n_first, chosen.n_outliers) if number == 0 else (0, 0)
            yield StreamBatch(Part(activations[rows], places), following, *left_out)
        index, skip = index + 1, 0


def prompt_batches(source: PromptSource, batch_prompts: int, place: Place) -> Iterator[StreamBatch]:
    """Batches of whole prompts from `place` on, for ever; its `chunk` counts them. Each process has its share."""
    for index in count(place.chunk):
        yield StreamBatch(source.prompts(index * batch_prompts, batch_prompts), Place(index + 1))


def usable_tokens(
    source: ChunkSource, place: Place, batch_tokens: int, n: int, seed: int, tokens: Group = ALONE.tokens
) -> Activations:
    """At least `n` usable tokens from `place` on: what follows the training data, for calibration.

    Every process of a group gets all of them.
    """
    parts, found = [], 0
    for batch in shuffled_batches(source, batch_tokens, seed, place, tokens):
        parts.append(batch.batch.whole(tokens))
        found += len(parts[-1])
        if found >= n:
            return Activations.concatenate(parts)
    raise AssertionError("streams are endless")


def _cut(chosen: Usable, batch_tokens: int, seed: int, tokens: Group) -> list[tuple[torch.Tensor, Places]]:
    """This process's rows of each batch, and their places in it; the order is one over the rows of all."""
    rows = chosen.keep.nonzero().squeeze(1)
    counts = torch.cat(tokens.gather(torch.tensor([len(rows)])))
    n, before = int(counts.sum()), int(counts[: tokens.rank].sum())
    if not n:
        return []
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)) - before
    batches = []
    for batch in order.tensor_split(max(1, round(n / batch_tokens))):
        numbers = ((batch >= 0) & (batch < len(rows))).nonzero().squeeze(1)
        batches.append((rows[batch[numbers].to(rows.device)], Places(numbers, len(batch))))
    return batches
