"""Which features of a source layer are active on which token."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """The active pairs of token and feature, in compressed rows: token n has `features[offsets[n]:offsets[n+1]]`."""

    offsets: Int[Tensor, " N_plus_1"]
    tokens: Int[Tensor, " A"]
    features: Int[Tensor, " A"]
    n_features: int

    @classmethod
    def from_pairs(cls, tokens: Tensor, features: Tensor, n_tokens: int, n_features: int) -> "Pattern":
        """Build from the active pairs, sorted by token."""
        return cls(_starts(torch.bincount(tokens, minlength=n_tokens)), tokens, features, n_features)

    @classmethod
    def concatenate(cls, parts: Sequence["Pattern"]) -> "Pattern":
        """All tokens of the parts, in order."""
        if len(parts) == 1:
            return parts[0]
        first = accumulate((part.n_tokens for part in parts), initial=0)
        tokens = torch.cat([part.tokens + n for part, n in zip(parts, first, strict=False)])
        starts = _starts(torch.cat([part.offsets.diff() for part in parts]))
        return cls(starts, tokens, torch.cat([part.features for part in parts]), parts[0].n_features)

    def __len__(self) -> int:
        """Number of active pairs A."""
        return len(self.tokens)

    @property
    def n_tokens(self) -> int:
        """Number of tokens N."""
        return self.offsets.shape[0] - 1

    @property
    def density(self) -> float:
        """Share of the N x F pairs that is active."""
        return len(self) / max(1, self.n_tokens * self.n_features)

    def compact(self) -> "tuple[Int[Tensor, ' U'], Pattern]":
        """The features that are active anywhere, in order, and the pattern over those alone."""
        features, places = self.features.unique(return_inverse=True)
        return features, Pattern(self.offsets, self.tokens, places, len(features))

    def counts(self) -> Int[Tensor, " F"]:
        """On how many tokens each feature is active."""
        return torch.bincount(self.features, minlength=self.n_features)

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """The order [A] that sorts the pairs by feature, their tokens, and the offsets [F + 1] of each feature."""
        order = torch.argsort(self.features.int(), stable=True)
        return order, self.tokens.index_select(0, order), _starts(self.counts())


def _starts(lengths: Tensor) -> Tensor:
    """Where rows of these lengths start, and where the last one ends."""
    starts = lengths.new_zeros(len(lengths) + 1)
    torch.cumsum(lengths, 0, out=starts[1:])
    return starts
