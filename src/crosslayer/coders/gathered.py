"""The active pairs of all features, told each other by processes that hold some features of every layer.

Axes: S source layers, N tokens, F features a layer, H of them held, A active pairs of all processes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from crosslayer.coders.codes import Codes, SparseCodes
from crosslayer.coders.sparsity.topk import patterns_at
from crosslayer.team import Group, shares


def gathered(own: Sequence[Codes], n_features: int, group: Group) -> list[SparseCodes]:
    """The codes of all F features of each source, from the codes [N, H] that each process of a group has.

    A pair costs 4 bytes beside its activation (8, where S x N x H is past 2^31), and all go in one call. An
    activation's gradient is the sum of those of all processes.
    """
    assert all(isinstance(codes, SparseCodes) for codes in own), "dense codes have gradients at inactive features too"
    held = shares(group.size, n_features)
    S, N = len(own), own[0].n_tokens
    kind = torch.int32 if S * N * max(map(len, held)) <= 2**31 else torch.int64
    values = torch.cat([codes.pairs()[2] for codes in own])
    places = _places(own, len(held[group.rank])).to(kind)
    parts = group.gather(torch.cat([_bytes(places), _bytes(values.detach())], 1))
    places = [_numbers(part[:, : kind.itemsize], kind) for part in parts]
    told = torch.cat([_numbers(part[:, kind.itemsize :], values.dtype) for part in parts])
    told = _Told.apply(values, told, [len(part) for part in parts], group)
    flat = torch.cat([_among_all(part, features, n_features) for part, features in zip(places, held, strict=True)])
    flat, order = flat.sort()
    patterns = patterns_at(flat, torch.Size((S, N, n_features)))
    parts = told.index_select(0, order).split([len(pattern) for pattern in patterns])
    return [SparseCodes(pattern, part) for pattern, part in zip(patterns, parts, strict=True)]


def _places(own: Sequence[Codes], n_held: int) -> Tensor:
    """Where each active pair stands among S x N x H."""
    found = []
    for i, codes in enumerate(own):
        tokens, features, _ = codes.pairs()
        found.append((i * codes.n_tokens + tokens) * n_held + features)
    return torch.cat(found)


def _among_all(places: Tensor, held: range, n_features: int) -> Tensor:
    """Places among S x N x F, of those among S x N x H."""
    places = places.long()
    rows = places.div(len(held), rounding_mode="floor")
    return places + rows * (n_features - len(held)) + held.start


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.uint8).view(len(numbers), numbers.itemsize)


def _numbers(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.clone(memory_format=torch.contiguous_format).view(-1).view(dtype)


class _Told(torch.autograd.Function):
    """Everybody's values, told already; the gradient of one's own is the sum of what all have for them."""

    @staticmethod
    def forward(ctx, own, told, lengths, group):
        ctx.lengths, ctx.group = lengths, group
        return told.clone()

    @staticmethod
    def backward(ctx, *grads):
        return ctx.group.sum_back(grads[0].split(ctx.lengths)), None, None, None
