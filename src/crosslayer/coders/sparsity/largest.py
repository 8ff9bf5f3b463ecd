"""The k largest: over all layers, in each layer, or one of each group."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crosslayer.coders.pattern import Pattern
from crosslayer.coders.sparsity.protocol import Encoder
from crosslayer.coders.sparsity.selection import Selecting, kept_pattern
from crosslayer.coders.sparsity.topk import largest_of_each_token
from crosslayer.errors import UserError


@dataclass(frozen=True)
class LargestK(Selecting):
    """What the TopK variants share: k and its annealing."""

    k: int
    """Active features a token: over all layers (joint-topk, batch-topk) or in each (topk, groupmax)."""
    anneal_from: float = 6.0
    """K starts at this multiple of k ..."""
    anneal_share: float = 0.2
    """... and falls to k over this share of the training."""

    def __post_init__(self):
        if self.k < 1:
            raise UserError(f"k is {self.k}; choose at least 1")
        if self.anneal_from < 1 or not 0 <= self.anneal_share <= 1:
            raise UserError(
                f"anneal_from is {self.anneal_from} and anneal_share {self.anneal_share}; "
                "choose anneal_from >= 1 and anneal_share from 0 to 1"
            )

    def budget(self, n_sources: int, n_features: int) -> int:
        """See `Sparsity.budget`: k in each layer."""
        return self.k * n_sources

    def at(self, progress: float) -> Any:
        """See `Sparsity.at`: k falls geometrically."""
        left = max(0.0, 1 - progress / self.anneal_share) if self.anneal_share else 0.0
        return replace(self, k=round(self.k * self.anneal_from**left))


@dataclass(frozen=True)
class JointTopK(LargestK):
    """The k largest features of a token over *all* layers together, by activation x decoder norm.

    The number per layer stays free, as use grows with depth. No layer can be encoded alone, so a coder trained with
    it is converted to JumpReLU (`crosslayer.coders.calibration`) before it replaces anything.
    """

    def check(self, n_sources: int, n_features: int) -> None:
        """See `Sparsity.check`."""
        check_available(self.k, n_sources * n_features, f"{n_sources} layers of {n_features} features")

    def budget(self, n_sources: int, n_features: int) -> int:
        """See `Sparsity.budget`: k over all."""
        return self.k

    def patterns(self, coder: Encoder, pre: Tensor, n_tokens: int) -> list[Pattern]:
        """See `Selecting.patterns`."""
        return largest_of_each_token(pre.transpose(0, 1), self.k, coder.decoder_norms(), coder.team.features)

    def pattern(self, coder: Encoder, i: int, pre: Tensor) -> Pattern:
        """Refused: a joint choice needs all layers."""
        raise UserError(
            "joint TopK cannot encode one layer alone; calibrate the transcoder to JumpReLU thresholds first, or train "
            "with another sparsity (batch-topk keeps the joint budget)"
        )


@dataclass(frozen=True)
class TopK(LargestK):
    """The k largest activations of each layer. EleutherAI's `activation: topk`."""

    def check(self, n_sources: int, n_features: int) -> None:
        """See `Sparsity.check`."""
        check_available(self.k, n_features, f"a layer of {n_features} features")

    def pattern(self, coder: Encoder, i: int, pre: Tensor) -> Pattern:
        """See `Selecting.pattern`."""
        return largest_of_each_token(pre.float()[None], self.k, group=coder.team.features)[0]


@dataclass(frozen=True)
class GroupMax(LargestK):
    """The largest activation of each of k groups of neighbouring features. EleutherAI's `activation: groupmax`.

    The groups are fixed, so k cannot be annealed and must divide the number of features.
    """

    anneal_from: float = 1.0
    """Stays 1: groups are fixed."""
    anneal_share: float = 0.0
    """Stays 0, likewise."""

    def __post_init__(self):
        super().__post_init__()
        for name, only in (("anneal_from", 1), ("anneal_share", 0)):
            if getattr(self, name) != only:
                raise UserError(f"{name} is {getattr(self, name)}, but groupmax has fixed groups; leave it at {only}")

    def check(self, n_sources: int, n_features: int) -> None:
        """See `Sparsity.check`."""
        if n_features % self.k:
            raise UserError(f"groupmax needs k to divide the features a layer; k is {self.k}, they are {n_features}")

    def pattern(self, coder: Encoder, i: int, pre: Tensor) -> Pattern:
        """See `Selecting.pattern`."""
        size = coder.d_transcoder // self.k
        values, places = pre.unflatten(1, (-1, size)).max(2)
        first = torch.arange(0, pre.shape[1], size, device=pre.device)
        return kept_pattern(first + places, values > 0, pre.shape[1])


def check_available(k: int, available: int, where: str) -> None:
    """Refuse a k above the number of features that it chooses from."""
    if k > available:
        raise UserError(f"k is {k}, but {where} are only {available}; lower k or raise d_transcoder")
