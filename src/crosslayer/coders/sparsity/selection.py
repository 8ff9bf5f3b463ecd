"""The sparse variants: a selection without gradients, then codes that know their gradients at the selected pairs."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.coders.codes import Codes, encode_active
from crosslayer.coders.pattern import Pattern
from crosslayer.coders.sparsity.protocol import Encoded, Encoder
from crosslayer.team import Places


class Selecting:
    """Base of the variants that select pairs of token and feature from pre-activations."""

    def check(self, n_sources: int, n_features: int) -> None:
        """See `Sparsity.check`: any width will do."""

    def budget(self, n_sources: int, n_features: int) -> int:
        """See `Sparsity.budget`: not known, so all."""
        return n_sources * n_features

    def at(self, progress: float) -> Any:
        """See `Sparsity.at`: the same throughout."""
        return self

    def patterns(self, coder: Encoder, pre: Float[Tensor, "N S F"], n_tokens: int) -> list[Pattern]:
        """The active pairs of each source, where the whole batch has `n_tokens`."""
        return [self.pattern(coder, i, pre[:, i]) for i in range(pre.shape[1])]

    def pattern(self, coder: Encoder, i: int, pre: Float[Tensor, "N F"]) -> Pattern:
        """The active pairs of source number i, seen alone."""
        raise NotImplementedError

    def encode(self, coder: Encoder, x: Tensor, places: Places) -> Encoded:
        """See `Sparsity.encode`."""
        with torch.no_grad():
            pre = coder.preactivations(x)
            patterns = self.patterns(coder, pre, places.total)
        return Encoded(x, pre, encode_patterns(coder, x, pre, patterns), places)

    def encode_layer(self, coder: Encoder, i: int, x: Tensor) -> tuple[Tensor, Codes]:
        """See `Sparsity.encode_layer`."""
        with torch.no_grad():
            pre = coder.layer_preactivations(i, x)
            pattern = self.pattern(coder, i, pre)
        return pre, _codes(coder, i, x, pre, pattern)

    def penalty(self, coder: Encoder, encoded: Encoded, progress: float) -> float:
        """None is needed."""
        return 0.0

    def thresholds(self, coder: Encoder) -> Tensor | None:
        """See `Sparsity.thresholds`: to be calibrated."""
        return None


@dataclass(frozen=True)
class Thresholds(Selecting):
    """Features strictly above fixed thresholds, and positive: what a calibrated coder is, and goes on training with."""

    values: Float[Tensor, "S F"]

    def pattern(self, coder: Encoder, i: int, pre: Tensor) -> Pattern:
        """See `Selecting.pattern`."""
        return pattern_of(pre > self.values[i].clamp(min=0))


def encode_patterns(coder: Encoder, x: Tensor, pre: Tensor, patterns: list[Pattern]) -> list[Codes]:
    """Codes of each source from its active pairs, with gradients; `pre` was computed without."""
    return [
        _codes(coder, i, x[:, s], pre[:, i], pattern)
        for i, (s, pattern) in enumerate(zip(coder.sources, patterns, strict=True))
    ]


def split_by_source(flat: Tensor, keep: Tensor, n_sources: int, n_features: int) -> list[Pattern]:
    """Patterns of each source from indices [N, k] into its S x F features."""
    source = flat.div(n_features, rounding_mode="floor")
    return [kept_pattern(flat - i * n_features, keep & (source == i), n_features) for i in range(n_sources)]


def kept_pattern(features: Tensor, keep: Tensor, n_features: int) -> Pattern:
    """The pattern of candidates [N, k] of which some are kept."""
    tokens, slots = keep.nonzero(as_tuple=True)
    return Pattern.from_pairs(tokens, features[tokens, slots], features.shape[0], n_features)


def pattern_of(active: Tensor) -> Pattern:
    """The pattern of a mask [N, F]."""
    tokens, features = active.nonzero(as_tuple=True)
    return Pattern.from_pairs(tokens, features, *active.shape)


def _codes(coder: Encoder, i: int, x: Tensor, pre: Tensor, pattern: Pattern) -> Codes:
    values = pre.flatten().index_select(0, pattern.tokens * pre.shape[1] + pattern.features).to(x.dtype)
    return encode_active(x, coder.W_enc[i], coder.b_enc[i], pattern, values)
