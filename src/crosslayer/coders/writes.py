"""What the sources of a batch have written so far: the running reconstruction, layer by layer.

Axes: N tokens, D d_model, K what a source writes (targets x D), A active pairs of token and feature.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.coders.codes import Codes, SparseCodes
from crosslayer.coders.decoders import Bank
from crosslayer.coders.far import fetch_rows
from crosslayer.errors import UserError


@runtime_checkable
class Writes(Protocol):
    """Collects what sources write, oldest first, and gives each target its sum once its sources are in."""

    def add(self, i: int, codes: Codes) -> None:
        """Add the codes of source number i."""
        ...

    def add_linear(self, first: int, part: Float[Tensor, "N K"]) -> None:
        """Add something for the first N tokens and the targets from layer `first` on."""
        ...

    def write(self, target: int) -> Float[Tensor, "N D"]:
        """The sum for one target."""
        ...

    def everything(self) -> Float[Tensor, "N L D"]:
        """The sums of all targets."""
        ...


class RunningWrites:
    """One buffer for all targets side by side, to which sources add in place.

    `start` [N, L x D] is what it begins with: the biases.
    """

    def __init__(self, bank: Bank, start: Tensor):
        self.bank, self.wiring, self.total = bank, bank.wiring, start

    def add(self, i: int, codes: Codes) -> None:
        """See `Writes.add`."""
        first = self.wiring.targets(self.wiring.source_layers[i]).start
        self.add_linear(first, self.bank.write(i, codes))

    def add_linear(self, first: int, part: Tensor) -> None:
        """See `Writes.add_linear`."""
        self.total = _AddSlice.apply(self.total, part, first * self.bank.d_model)

    def write(self, target: int) -> Tensor:
        """See `Writes.write`."""
        D = self.bank.d_model
        return self.total[:, target * D : (target + 1) * D]

    def everything(self) -> Tensor:
        """See `Writes.everything`."""
        return self.total.unflatten(1, (-1, self.bank.d_model))


class CoalescedWrites:
    """Keeps the k largest of all sources' active features for each token and target. EleutherAI's `topk_coalesced`."""

    def __init__(self, bank: Bank, start: Tensor, k: int):
        self.bank, self.wiring, self.k = bank, bank.wiring, k
        self.codes: dict[int, SparseCodes] = {}
        self.linear = RunningWrites(bank, start)

    def add(self, i: int, codes: Codes) -> None:
        """See `Writes.add`."""
        if not isinstance(codes, SparseCodes):
            raise UserError("topk_coalesced chooses among active features; use it with a topk sparsity")
        self.codes[self.wiring.source_layers[i]] = codes

    def add_linear(self, first: int, part: Tensor) -> None:
        """See `Writes.add_linear`."""
        self.linear.add_linear(first, part)

    def write(self, target: int) -> Tensor:
        """See `Writes.write`."""
        out = self.linear.write(target)
        sources = [s for s in self.wiring.sources(target) if s in self.codes]
        if not sources:
            return out
        values = [self._values(s, target) for s in sources]
        keep = _largest_per_token(torch.cat([self.codes[s].pattern.tokens for s in sources]), torch.cat(values), self.k)
        for s, value, kept in zip(sources, values, keep.split([len(v) for v in values]), strict=True):
            codes = self.codes[s].select(kept, value)
            features, codes = codes.compact()
            i, place = self.wiring.source_layers.index(s), target - self.wiring.targets(s).start
            out = out + codes.decode(self.bank.base(i, features)[:, place].contiguous())
        return out

    def everything(self) -> Tensor:
        """See `Writes.everything`."""
        return torch.stack([self.write(target) for target in range(self.wiring.n_layers)], 1)

    def _values(self, source: int, target: int) -> Float[Tensor, " A"]:
        """The source's activations as this target sees them."""
        i, place = self.wiring.source_layers.index(source), target - self.wiring.targets(source).start
        values, features = self.codes[source].values, self.codes[source].pattern.features
        if len(self.bank.offset):
            values = values + fetch_rows(self.bank.offset[i], features)[:, place]
        if len(self.bank.scale):
            values = values * fetch_rows(self.bank.scale[i], features)[:, place]
        return values


def _largest_per_token(tokens: Tensor, values: Tensor, k: int) -> Tensor:
    """A mask of the k largest values of each token."""
    order = values.detach().argsort(descending=True)
    order = order[tokens[order].argsort(stable=True)]
    starts = torch.cat([tokens.new_zeros(1), torch.bincount(tokens).cumsum(0)])
    rank = torch.arange(len(tokens), device=tokens.device) - starts[tokens[order]]
    return torch.zeros_like(tokens, dtype=torch.bool).index_put((order,), rank < k)


class _AddSlice(torch.autograd.Function):
    """total[:N, start : start + K] += part, in place; autograd's own assignment would copy the total each time."""

    @staticmethod
    def forward(ctx, total, part, start):
        total[: len(part)].narrow(1, start, part.shape[1]).add_(part)
        ctx.mark_dirty(total)
        ctx.rows, ctx.span = len(part), (start, part.shape[1])
        return total

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], grads[0][: ctx.rows].narrow(1, *ctx.span), None
