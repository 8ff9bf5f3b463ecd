"""Which captured tokens are fit to train on."""

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from crosslayer.activations.record import Activations

OUTLIER = 20.0
"""A token whose norm at some layer is this many times the layer's median norm is left out of training."""


@dataclass(frozen=True)
class Usable:
    """Which of some captured tokens to train on, and how many were left out for which reason."""

    keep: Bool[Tensor, " N"]
    n_first: int
    n_outliers: int


def usable(activations: Activations) -> Usable:
    """Leave out first positions (attention sinks) and norm outliers at any layer.

    A token that is not finite stays in, so that the training stops at it and names the layer.
    """
    first = activations.position == 0
    if first.all():
        return Usable(~first, len(first), 0)
    norms = activations.x.float().norm(dim=2)
    outlier = (norms > OUTLIER * norms[~first].median(0).values).any(1) & norms.isfinite().all(1) & ~first
    return Usable(~first & ~outlier, int(first.sum()), int(outlier.sum()))
