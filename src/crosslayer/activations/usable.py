"""Which captured tokens are fit to train on."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from crosslayer.activations.record import Activations
from crosslayer.team import ALONE, Group, count

OUTLIER = 20.0
"""A token whose norm at some layer is this many times the layer's median norm is left out of training."""


@dataclass(frozen=True)
class Usable:
    """Which of some captured tokens to train on, and how many were left out for which reason."""

    keep: Bool[Tensor, " N"]
    n_first: int
    n_outliers: int


def usable(activations: Activations, tokens: Group = ALONE.tokens) -> Usable:
    """Leave out first positions (attention sinks) and norm outliers at any layer.

    A token that is not finite stays in, so that the training stops at it and names the layer. Where the others of a
    group have more tokens, medians and numbers are of all.
    """
    first = activations.position == 0
    norms = activations.x.float().norm(dim=2)
    others = torch.cat(tokens.gather(norms[~first]))
    if not len(others):
        return Usable(~first, count(tokens, len(first)), 0)
    outlier = (norms > OUTLIER * others.median(0).values).any(1) & norms.isfinite().all(1) & ~first
    return Usable(~first & ~outlier, count(tokens, int(first.sum())), count(tokens, int(outlier.sum())))
