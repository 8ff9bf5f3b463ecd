"""A group of ranks that sums and gathers, for code that knows nothing of torch.distributed."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crosslayer.distributed.mesh import Mesh, hearing
from crosslayer.team import ALONE, Group, Team

BUCKET_BYTES = 2**26
"""Gradients that are summed in one call, about."""


def team_of(mesh: Mesh) -> Team:
    """The groups of this process on a mesh; an axis of one rank costs nothing."""
    tokens, features = (_group(group) for group in (mesh.data, mesh.feature))
    everyone = features if mesh.n_data == 1 else tokens if mesh.n_feature == 1 else RankGroup(dist.group.WORLD)
    return Team(tokens, features, everyone)


def _group(ranks: Any) -> Group:
    return RankGroup(ranks) if dist.get_world_size(ranks) > 1 else ALONE.everyone


class RankGroup:
    """A process group of torch.distributed; see `crosslayer.team.Group` for what its methods give.

    Sums are the same bits on all ranks, so what is computed from them stays the same too.
    """

    def __init__(self, ranks: Any):
        self.ranks, self.size, self.rank = ranks, dist.get_world_size(ranks), dist.get_rank(ranks)

    def __deepcopy__(self, memo: Any) -> "RankGroup":
        return self

    def sum(self, part: Tensor) -> Tensor:
        """See `Group.sum`."""
        return _Sum.apply(part, self)

    def smallest(self, part: Tensor) -> Tensor:
        """See `Group.smallest`."""
        out = part.clone()
        self.reduce(out, dist.ReduceOp.MIN)
        return out

    def gather(self, rows: Tensor) -> list[Tensor]:
        """See `Group.gather`; costs as much as if everybody had as many rows as who has most."""
        counts = self._all(torch.tensor([len(rows)]))
        lengths = [int(n) for n in counts]
        if not max(lengths):
            return [rows] * self.size
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: len(rows)] = rows
        plain = padded.view(torch.uint8) if padded.dtype == torch.bool else padded
        return [part.view(rows.dtype)[:n] for part, n in zip(self._all(plain), lengths, strict=True)]

    def sum_back(self, parts: Sequence[Tensor]) -> Tensor:
        """See `Group.sum_back`."""
        return self.swap(parts).sum(0)

    def swap(self, parts: Sequence[Tensor]) -> Tensor:
        """What each rank has as the part of this one, one after another; parts of one rank are of one shape."""
        lengths, own = [len(part) for part in parts], parts[self.rank]
        got = own.new_empty(self.size, *own.shape)
        with hearing():
            sizes = ([len(own)] * self.size, lengths)
            dist.all_to_all_single(got.flatten(0, 1), torch.cat(list(parts)), *sizes, group=self.ranks)
        return got

    @torch.no_grad()
    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """See `Group.sum_gradients`; in flat buckets, as many small calls would cost more than what they carry."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                self.reduce(bucket[0])
                continue
            flat = torch.cat([grad.flatten() for grad in bucket])
            self.reduce(flat)
            for grad, summed in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(summed.view_as(grad))

    def reduce(self, part: Tensor, how: Any = dist.ReduceOp.SUM) -> None:
        """Make this tensor, in place, what it comes to over all ranks."""
        with hearing():
            dist.all_reduce(part, how, group=self.ranks)

    def _all(self, part: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(part) for _ in range(self.size)]
        with hearing():
            dist.all_gather(parts, part.contiguous(), group=self.ranks)
        return parts


class _Sum(torch.autograd.Function):
    """The sum over a group; each part's gradient is that of the sum, which all ranks know already."""

    @staticmethod
    def forward(ctx, part, group):
        out = part.clone(memory_format=torch.contiguous_format)
        group.reduce(out)
        return out

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], None


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    """The tensors in order, in lists of about `BUCKET_BYTES` each and of one type."""
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not buckets or room < tensor.nbytes or buckets[-1][0].dtype != tensor.dtype:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(tensor)
        room -= tensor.nbytes
    return buckets
