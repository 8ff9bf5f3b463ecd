"""Bootstrap intervals of means over examples, many columns at once.

Axes: n examples, C columns, R resamples.
"""

import numpy as np
from jaxtyping import Float

from crosslayer.metrics import Figure

RESAMPLES = 2000
LEVEL = (2.5, 97.5)
"""Percentiles of the 95 % interval."""


def means(values: Float[np.ndarray, "n C"], seed: int) -> list[Figure]:
    """The mean of each column with its interval; examples are drawn, so that all columns of one stay together."""
    return _figures(values.mean(0), _drawn(values, np.random.default_rng([seed, 0])), len(values))


def differences(these: Float[np.ndarray, "n C"], those: Float[np.ndarray, "m C"], seed: int) -> list[Figure]:
    """The difference of the means of two sets, each drawn by itself."""
    drawn = _drawn(these, np.random.default_rng([seed, 0])) - _drawn(those, np.random.default_rng([seed, 1]))
    return _figures(these.mean(0) - those.mean(0), drawn, min(len(these), len(those)))


def _drawn(values: Float[np.ndarray, "n C"], rng: np.random.Generator) -> Float[np.ndarray, "R C"]:
    """The mean of each column in each resample, which is told by how often it holds each example."""
    n = len(values)
    return rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) @ values / n


def _figures(value: Float[np.ndarray, " C"], drawn: Float[np.ndarray, "R C"], n: int) -> list[Figure]:
    """Percentile intervals; none of a single example."""
    low, high = np.percentile(drawn, LEVEL, axis=0) if n > 1 else np.full((2, len(value)), np.nan)
    return [Figure(*map(float, row)) for row in zip(value, low, high, strict=True)]
