"""Feature activations of many tokens at one source layer, and the two products they take part in.

Axes: N tokens, F features, D d_model, K the width that a feature writes (targets x D), A active (token, feature)
pairs. Sparse codes cost what is active (`crosslayer.coders.kernels`), on a CPU and on a GPU alike.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosslayer.coders import kernels
from crosslayer.coders.far import near
from crosslayer.coders.pattern import Pattern
from crosslayer.coders.products import affine, product

COLUMNS = 4096
"""Of weights that lie elsewhere, how many a dense product brings at once."""


@runtime_checkable
class Codes(Protocol):
    """What a source layer's features do on N tokens."""

    @property
    def n_tokens(self) -> int:
        """Number of tokens N."""
        ...

    def followed_by(self, other: "Codes") -> "Codes":
        """The tokens of both, one after the other."""
        ...

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
class SparseCodes:
    """Activations at the active pairs only."""

    pattern: Pattern
    values: Float[Tensor, " A"]

    @property
    def n_tokens(self) -> int:
        """See `Codes.n_tokens`."""
        return self.pattern.n_tokens

    def followed_by(self, other: Codes) -> "SparseCodes":
        """See `Codes.followed_by`."""
        tokens, features, values = other.pairs()
        more = Pattern.from_pairs(tokens, features, other.n_tokens, self.pattern.n_features)
        return SparseCodes(Pattern.concatenate([self.pattern, more]), torch.cat([self.values, values]))

    def decode(self, W: Float[Tensor, "F K"]) -> Float[Tensor, "N K"]:
        """See `Codes.decode`; costs A x K, or a dense product where that is less."""
        if self.pattern.density > kernels.DENSE_FROM[self.values.device.type]:
            return _dense_decode(self.dense(), W)
        pattern, W = near(self.pattern, W)
        return _Decode.apply(self.values, W, pattern)

    def dense(self) -> Float[Tensor, "N F"]:
        """See `Codes.dense`."""
        out = self.values.new_zeros(self.pattern.n_tokens, self.pattern.n_features)
        return out.index_put((self.pattern.tokens, self.pattern.features), self.values)

    def counts(self) -> Float[Tensor, " F"]:
        """See `Codes.counts`."""
        return self.pattern.counts().to(self.values.dtype)

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `Codes.pairs`."""
        return self.pattern.tokens, self.pattern.features, self.values

    def indicator(self) -> "SparseCodes":
        """See `Codes.indicator`."""
        return SparseCodes(self.pattern, torch.ones_like(self.values))

    def compact(self) -> "tuple[Tensor, SparseCodes]":
        """See `Codes.compact`."""
        features, pattern = self.pattern.compact()
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

    @property
    def n_tokens(self) -> int:
        """See `Codes.n_tokens`."""
        return len(self.acts)

    def followed_by(self, other: Codes) -> "DenseCodes":
        """See `Codes.followed_by`."""
        return DenseCodes(torch.cat([self.acts, other.dense()]))

    def decode(self, W: Float[Tensor, "F K"]) -> Float[Tensor, "N K"]:
        """See `Codes.decode`; one dense product."""
        return _dense_decode(self.acts, W)

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


def _dense_decode(acts: Float[Tensor, "N F"], W: Float[Tensor, "F K"]) -> Float[Tensor, "N K"]:
    """acts @ W, without a copy of W where no gradient is asked for."""
    if W.device != acts.device:
        return torch.cat([_dense_decode(acts, part.to(acts.device)) for part in W.split(COLUMNS, 1)], 1)
    learning = torch.is_grad_enabled() and (acts.requires_grad or W.requires_grad)
    return affine(acts, W.T) if learning else product(acts, W)


class _Decode(torch.autograd.Function):
    """[N, K] = codes @ W; both gradients touch active pairs only."""

    @staticmethod
    def forward(ctx, values, W, pattern):
        ctx.pattern = pattern
        ctx.save_for_backward(values, W)
        return kernels.decode(pattern, values, W)

    @staticmethod
    def backward(ctx, *grads):
        values, W = ctx.saved_tensors
        pattern, grad = ctx.pattern, grads[0].contiguous()
        grad_values = kernels.dots(pattern, grad, W)
        grad_W = kernels.sum_by_feature(pattern, values, grad) if ctx.needs_input_grad[1] else None
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
        grad_x = _weighted_rows(pattern, grad.contiguous(), W_enc) if needs_x else None
        grad_W = kernels.sum_by_feature(pattern, grad, x) if needs_W else None
        grad_b = grad.new_zeros(pattern.n_features).index_add_(0, pattern.features, grad) if needs_b else None
        return grad_x, grad_W, grad_b, None, None


def _weighted_rows(pattern: Pattern, values: Float[Tensor, " A"], W: Float[Tensor, "F K"]) -> Float[Tensor, "N K"]:
    pattern, W = near(pattern, W)
    return kernels.decode(pattern, values, W)
