"""The k largest of every token, exactly, at a fraction of what `torch.topk` costs on wide rows.

Axes: N tokens, S source layers, F features, C candidates. On a CPU numpy compares, searches and partitions: it is
several times faster at that than torch (`benchmarks/sparse_products.py`).
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.coders.pattern import Pattern
from crosslayer.team import ALONE, Group

WITH_NUMPY = "cpu"
"""The kind of device whose memory numpy works on."""
SLACK = 1.3
"""Blocks per wanted score: with fewer the bound is loose, with more it is dear."""
BLOCK = 96
"""Scores in a block at most, over all sources."""
DIGIT = 11
"""Bits that a group looks at in one go."""
CHUNK = 64
"""Tokens at a time on a CPU, so that their scores stay in its caches and are never all in memory."""


def largest_of_each_token(
    pre: Float[Tensor, "S N F"],
    k: int,
    weights: Float[Tensor, "S F"] | None = None,
    group: Group = ALONE.features,
) -> list[Pattern]:
    """Each token's k largest scores over all sources, as far as they are positive, as a pattern for each source.

    A score is a pre-activation, times its feature's weight where there are weights. Scores that tie with the k-th are
    all kept. The k are those of all features of the group, whose processes tell each other k scores a token.
    """
    size = CHUNK if pre.device.type == WITH_NUMPY else max(1, pre.shape[1])
    chunks = [part if weights is None else part * weights[:, None] for part in pre.split(size, 1)]
    found = [_candidates(scores.contiguous(), k) for scores in chunks]
    cuts = _cuts(torch.cat([part.best for part in found]), k, group).split(size)
    kept = [part.reaching(cut) for part, cut in zip(found, cuts, strict=True)]
    return [Pattern.concatenate(parts) for parts in zip(*kept, strict=True)]


@dataclass(frozen=True)
class _Candidates:
    """Scores of some tokens among which each one's k largest are."""

    flat: Int[Tensor, " C"]
    """Their places in the flattened scores."""
    values: Float[Tensor, " C"]
    rows: Int[Tensor, " C"]
    """The number of each one's source and token."""
    best: Float[Tensor, "N k"]
    """Each token's k largest, filled up with zeros."""
    shape: torch.Size
    """S, N, F."""

    def reaching(self, cut: Float[Tensor, " N"]) -> list[Pattern]:
        """The patterns of those that reach their token's cut."""
        kept = reaching(self.values, cut.repeat(self.shape[0]).index_select(0, self.rows))
        return patterns_at(self.flat.index_select(0, kept), self.shape)


def _candidates(scores: Float[Tensor, "S N F"], k: int) -> _Candidates:
    """Little more than k scores a token, the k largest among them.

    They lie in blocks whose maxima are at least the k-th largest block maximum, so that maximum is a bound from below.
    """
    flat = reaching(scores, _bound(scores, k)[:, None])
    starts, rows = _rows(flat, scores.shape)
    values = scores.flatten().index_select(0, flat)
    table = _table(values, starts, rows, scores.shape, k)
    return _Candidates(flat, values, rows, largest_values(table, k), scores.shape)


def _cuts(best: Float[Tensor, "N k"], k: int, group: Group) -> Float[Tensor, " N"]:
    """The k-th largest score of each token among everybody's best."""
    if group.size == 1:
        return best.amin(1)
    everybodys = torch.stack(group.gather(best), 1)
    return kth_largest(everybodys.flatten(1), k)


def _bound(scores: Float[Tensor, "S N F"], k: int) -> Float[Tensor, " N"]:
    """A positive number that at least k scores of each token reach, as far as so many are positive."""
    S, N, F = scores.shape
    sizes = [size for size in range(1, BLOCK // S + 1) if F % size == 0 and F // size >= SLACK * k]
    size = max(sizes, default=1)
    smallest = torch.finfo(scores.dtype).tiny
    if F // size < k:
        return scores.new_full((N,), smallest)
    maxima = torch.stack([layer.unflatten(1, (size, F // size)).amax(1) for layer in scores]).amax(0)
    return kth_largest(maxima, k).clamp_min(smallest)


def reaching(values: Tensor, bound: Tensor) -> Int[Tensor, " C"]:
    """Places, in the flattened tensor, of the values that reach the bound."""
    if values.device.type == WITH_NUMPY:
        return torch.from_numpy(np.flatnonzero(values.numpy() >= bound.numpy()))
    return (values >= bound).flatten().nonzero().squeeze(1)


def _rows(flat: Int[Tensor, " C"], shape: torch.Size) -> tuple[Tensor, Int[Tensor, " C"]]:
    """Where each row of a source and token starts among the sorted candidates, and the row of each candidate."""
    S, N, F = shape
    starts = torch.searchsorted(flat, torch.arange(0, (S * N + 1) * F, F, device=flat.device))
    return starts, flat.div(F, rounding_mode="floor")


def _table(values: Tensor, starts: Tensor, rows: Tensor, shape: torch.Size, k: int) -> Float[Tensor, "N width"]:
    """Each token's candidates of all sources in a row, filled up with zeros to k at least."""
    S, N, _ = shape
    counts = starts.diff().view(S, N)
    width = max(k, int(counts.sum(0).max())) if N else k
    first = (counts.cumsum(0) - counts + torch.arange(N, device=values.device) * width).flatten() - starts[:-1]
    table = values.new_zeros(N, width)
    places = first.index_select(0, rows) + torch.arange(len(values), device=values.device)
    table.view(-1).scatter_(0, places, values)
    return table


def kth_largest(rows: Float[Tensor, "N M"], k: int) -> Float[Tensor, " N"]:
    """The k-th largest of each row."""
    return largest_values(rows, k).amin(1)


def largest_values(rows: Float[Tensor, "N M"], k: int) -> Float[Tensor, "N k"]:
    """The k largest of each row, in no order."""
    if rows.device.type != WITH_NUMPY:
        return rows.topk(k, sorted=False).values
    place = rows.shape[1] - k
    return torch.from_numpy(np.partition(rows.numpy(), place, axis=1)[:, place:].copy())


def kth_of_group(values: Float[Tensor, " C"], k: int, group: Group) -> Float[Tensor, ""]:
    """The k-th largest of a group's positive values, exactly, by counts alone.

    Positive floating-point numbers are ordered as their bits are, so the answer's bits are found a few at a time, the
    highest first: what is told each time is how many values have which.
    """
    if group.size == 1:
        return kth_largest(values[None], k)[0]
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize]
    bits, n_bits, known = values.view(integers).long(), 8 * values.dtype.itemsize, 0
    for shift in range((n_bits - 1) // DIGIT * DIGIT, -1, -DIGIT):
        digits = bits >> shift
        digits = digits[digits >> DIGIT == known] - (known << DIGIT)
        counts = group.sum(torch.bincount(digits, minlength=1 << DIGIT))
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= k).sum()) - 1
        k -= int(at_least[digit] - counts[digit])
        known = (known << DIGIT) + digit
    return torch.tensor(known, device=values.device).to(integers).view(values.dtype)


def patterns_at(flat: Int[Tensor, " C"], shape: torch.Size) -> list[Pattern]:
    """The pattern of each source, from sorted places in the flattened scores [S, N, F]."""
    _, N, F = shape
    starts, rows = _rows(flat, shape)
    tokens, features = rows.remainder(N), flat - rows * F
    borders = starts[::N].tolist()
    return [
        Pattern(starts[s * N : (s + 1) * N + 1] - starts[s * N], tokens[a:b], features[a:b], F)
        for s, (a, b) in enumerate(pairwise(borders))
    ]
