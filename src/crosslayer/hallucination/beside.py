"""Whether another run, trained from another seed for one, has the same features.

Features of two runs share no numbers, so they are matched by what they do: the correlation of their activations over
all places of all decisions. That asks nothing of the other run's wiring, width or layers.

Axes: K features chosen, W features of all sources of the other run, M places of decisions.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from crosslayer.hallucination.feature_table import Beside
from crosslayer.hallucination.ranking import Ranked
from crosslayer.hallucination.statistics import correlations

SAME = 0.7
"""Correlation from which on a feature counts as the same."""


def best_match(ours: Ranked, other: Ranked, columns: Sequence[int]) -> Float64[np.ndarray, " K"]:
    """The largest correlation of each of our features with any of the other run's."""
    mine, width = ours.activations(columns), other.firing.image.shape[1]
    best = np.zeros(len(columns))
    for i in range(len(other.firing.image)):
        theirs = other.activations(range(i * width, (i + 1) * width))
        best = np.maximum(best, correlations(mine, theirs).max(1))
    return best


def beside(name: str, ours: Ranked, other: Ranked, top: int) -> Beside:
    """How many of our top features the other run has, and how many among its own top."""
    columns = ours.order[:top].tolist()
    anywhere = best_match(ours, other, columns)
    at_top = correlations(ours.activations(columns), other.activations(other.order[:top].tolist())).max(1)
    return Beside(run=name, matched=float((anywhere >= SAME).mean()), matched_in_top=float((at_top >= SAME).mean()))
