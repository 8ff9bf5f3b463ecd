"""Feature activations of many tokens at one source layer, and the two products they take part in.

Axes: N tokens, F features, D d_model, K the width that a feature writes (targets x D), A active (token, feature)
pairs. Sparse codes cost what is active: the forward and both weight gradients are `embedding_bag` sums over A rows,
which run on a CPU and on a GPU alike.
"""

import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

DENSE_FROM = defaultdict(lambda: 0.3, cuda=0.1)
"""Density of codes, by device, from which a dense product is quicker than sums of rows.

Measured by `benchmarks/kernels.py` on a CPU: they cross at 0.28 to 0.37. For a GPU it is a guess.
"""


@runtime_checkable
class Codes(Protocol):
    """What a source layer's features do on N tokens."""

    def decode(self, W: Float[Tensor, "F K"]) -> Float[Tensor, "N K"]:
        """The sum of the active features' rows of W, weighted by their activations."""
        ...

    def dense(self) -> Float[Tensor, "N F"]:
        """All activations, zeros included."""
        ...

    def counts(self) -> Float[Tensor, " F"]:
        """On how many of the N tokens each feature is active."""
        ...

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, features and activations [A] of the active pairs."""
        ...

    def indicator(self) -> "Codes":
        """1 where a feature is active, with no gradient."""
        ...

    def compact(self) -> "tuple[Tensor | None, Codes]":
        """The features that are active anywhere, and the codes over those alone; None where all are kept."""
        ...


@dataclass(frozen=True)
class Pattern:
    """Which features are active on which token, in compressed rows: token n has `features[offsets[n]:offsets[n+1]]`."""

    offsets: Int[Tensor, " N_plus_1"]
    tokens: Int[Tensor, " A"]
    features: Int[Tensor, " A"]
    n_features: int

    @classmethod
    def from_pairs(cls, tokens: Tensor, features: Tensor, n_tokens: int, n_features: int) -> "Pattern":
        """Build from the active pairs, sorted by token."""
        return cls(_offsets(tokens, n_tokens), tokens, features, n_features)

    @property
    def n_tokens(self) -> int:
        """Number of tokens N."""
        return self.offsets.shape[0] - 1

    @property
    def density(self) -> float:
        """Share of the N x F pairs that is active."""
        return len(self.tokens) / max(1, self.n_tokens * self.n_features)

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """The order [A] that sorts the pairs by feature, their tokens, and the offsets [F + 1] of each feature."""
        order = torch.argsort(self.features.int(), stable=True)
        return order, self.tokens.index_select(0, order), _offsets(self.features, self.n_features)


@dataclass(frozen=True)
class SparseCodes:
    """Activations at the active pairs only."""

    pattern: Pattern
    values: Float[Tensor, " A"]

    def decode(self, W: Float[Tensor, "F K"]) -> Float[Tensor, "N K"]:
        """See `Codes.decode`; costs A x K, or a dense product where that is less."""
        if self.pattern.density > DENSE_FROM[W.device.type]:
            return self.dense() @ W
        return _Decode.apply(self.values, W, self.pattern)

    def dense(self) -> Float[Tensor, "N F"]:
        """See `Codes.dense`."""
        out = self.values.new_zeros(self.pattern.n_tokens, self.pattern.n_features)
        return out.index_put((self.pattern.tokens, self.pattern.features), self.values)

    def counts(self) -> Float[Tensor, " F"]:
        """See `Codes.counts`."""
        offsets = _offsets(self.pattern.features, self.pattern.n_features)
        return offsets.diff().to(self.values.dtype)

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `Codes.pairs`."""
        return self.pattern.tokens, self.pattern.features, self.values

    def indicator(self) -> "SparseCodes":
        """See `Codes.indicator`."""
        return SparseCodes(self.pattern, torch.ones_like(self.values))

    def compact(self) -> "tuple[Tensor, SparseCodes]":
        """See `Codes.compact`."""
        features, places = self.pattern.features.unique(return_inverse=True)
        pattern = Pattern(self.pattern.offsets, self.pattern.tokens, places, len(features))
        return features, SparseCodes(pattern, self.values)

    def select(self, keep: Bool[Tensor, " A"], values: Float[Tensor, " A"]) -> "SparseCodes":
        """Some of the active pairs, with new values."""
        pattern = self.pattern
        kept = Pattern.from_pairs(pattern.tokens[keep], pattern.features[keep], pattern.n_tokens, pattern.n_features)
        return SparseCodes(kept, values[keep])


@dataclass(frozen=True)
class DenseCodes:
    """Activations of every feature, for the trainings that need gradients at inactive features too."""

    acts: Float[Tensor, "N F"]

    def decode(self, W: Float[Tensor, "F K"]) -> Float[Tensor, "N K"]:
        """See `Codes.decode`; one dense product."""
        return self.acts @ W

    def dense(self) -> Float[Tensor, "N F"]:
        """See `Codes.dense`."""
        return self.acts

    def counts(self) -> Float[Tensor, " F"]:
        """See `Codes.counts`."""
        return (self.acts > 0).sum(0).to(self.acts.dtype)

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `Codes.pairs`."""
        tokens, features = (self.acts > 0).nonzero(as_tuple=True)
        return tokens, features, self.acts[tokens, features]

    def indicator(self) -> "DenseCodes":
        """See `Codes.indicator`."""
        return DenseCodes((self.acts > 0).to(self.acts.dtype))

    def compact(self) -> "tuple[None, DenseCodes]":
        """See `Codes.compact`."""
        return None, self


def encode_active(
    x: Float[Tensor, "N D"],
    W_enc: Float[Tensor, "F D"],
    b_enc: Float[Tensor, " F"],
    pattern: Pattern,
    values: Float[Tensor, " A"],
) -> SparseCodes:
    """Codes whose `values` were read from an encoder product that ran without gradient.

    The gradients of x, W_enc and b_enc are those of `(x @ W_enc.T + b_enc)[tokens, features]`, at the cost of the
    active pairs instead of a second and third dense product.
    """
    return SparseCodes(pattern, _EncodeActive.apply(x, W_enc, b_enc, pattern, values))


def _offsets(sorted_or_not: Tensor, n: int) -> Tensor:
    offsets = sorted_or_not.new_zeros(n + 1)
    torch.cumsum(torch.bincount(sorted_or_not, minlength=n), 0, out=offsets[1:])
    return offsets


def _bag(rows: Tensor, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    return embedding_bag(index, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _sum_by_feature(rows: Tensor, pattern: Pattern, weights: Tensor) -> Tensor:
    order, tokens, offsets = pattern.by_feature
    return _bag(rows.contiguous(), tokens, offsets, weights.index_select(0, order))


def _products(pattern: Pattern, grad: Float[Tensor, "N K"], W: Float[Tensor, "F K"]) -> Float[Tensor, " A"]:
    """grad[token] . W[feature] at the active pairs; by MKL in the order of the features, which reads W once."""
    if grad.device.type != "cpu" or not torch.backends.mkl.is_available() or not len(pattern.tokens):
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad, W, pattern.features, pattern.offsets[:-1], pattern.tokens, 0
        )
    order, tokens, offsets = pattern.by_feature
    shape = (pattern.n_features, pattern.n_tokens)
    sampled = torch.sparse_csr_tensor(offsets, tokens, grad.new_zeros(len(tokens)), shape, check_invariants=False)
    products = torch.sparse.sampled_addmm(sampled, W, grad.T, beta=0.0).values()
    return torch.empty_like(products).scatter_(0, order, products)


class _Decode(torch.autograd.Function):
    """[N, K] = codes @ W; both gradients touch active pairs only."""

    @staticmethod
    def forward(ctx, values, W, pattern):
        ctx.pattern = pattern
        ctx.save_for_backward(values, W)
        return _bag(W, pattern.features, pattern.offsets, values)

    @staticmethod
    def backward(ctx, *grads):
        values, W = ctx.saved_tensors
        pattern, grad = ctx.pattern, grads[0].contiguous()
        grad_values = _products(pattern, grad, W)
        grad_W = _sum_by_feature(grad, pattern, values) if ctx.needs_input_grad[1] else None
        return grad_values, grad_W, None


class _EncodeActive(torch.autograd.Function):
    """Identity on `values`, with the gradients of the encoder that produced them."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, pattern, values):
        ctx.pattern = pattern
        ctx.save_for_backward(x, W_enc)
        return values.clone()

    @staticmethod
    def backward(ctx, *grads):
        x, W_enc = ctx.saved_tensors
        pattern, grad = ctx.pattern, grads[0]
        needs_x, needs_W, needs_b = ctx.needs_input_grad[:3]
        grad_x = _bag(W_enc, pattern.features, pattern.offsets, grad.contiguous()) if needs_x else None
        grad_W = _sum_by_feature(x, pattern, grad) if needs_W else None
        grad_b = grad.new_zeros(pattern.n_features).index_add_(0, pattern.features, grad) if needs_b else None
        return grad_x, grad_W, grad_b, None, None


with warnings.catch_warnings():  # said once a process, of a part of torch that is as it was for years
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)
