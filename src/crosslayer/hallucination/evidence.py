"""Whether an edit changed a measure, or chance did: paired intervals, tests, and how many images it would take.

Both sides answer the same queries, so what counts is the difference on the same image. Responses to one image are not
independent of each other: they are resampled together. Axes: I images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite, nan

import numpy as np
from jaxtyping import Float64
from scipy.stats import binomtest, bootstrap, norm

from crosslayer.errors import UserError
from crosslayer.hallucination.measures import Measure, figure, image_sums
from crosslayer.hallucination.responses import Response
from crosslayer.metrics import Figure

LEVEL = 0.95
POWER = 0.8


@dataclass(frozen=True, kw_only=True)
class Change:
    """What an edit did to one measure."""

    name: str
    before: Figure
    after: Figure
    difference: Figure
    """After - before, with its paired interval over images."""
    relative: float
    """Difference / before."""
    n_images: int
    """With a part in the measure."""
    gained: int
    """Images of which the measure counts more responses after the edit."""
    lost: int
    """Images of which it counts fewer."""
    p_value: float
    """The exact sign test of gained against lost; where an image has one yes or no, that is McNemar's."""
    images_needed: int | None
    """For a true difference of this size to be told from zero at the 95 % level with 80 % power; None for no size."""

    @property
    def clear(self) -> bool:
        """Whether the interval of the difference leaves out zero."""
        return self.difference.low > 0 or self.difference.high < 0


def change(
    measure: Measure, before: Sequence[Response], after: Sequence[Response], *, resamples: int = 2000, seed: int = 0
) -> Change:
    """Compare two sets of responses to the same queries.

    Args:
        measure: what is compared.
        before: the original's responses.
        after: the edited model's, in the same order.
        resamples: of the bootstrap over images.
        seed: of the bootstrap.

    Raises:
        UserError: when the responses are not to the same queries, naming the first that differs.
    """
    _check_pairs(before, after)
    ours, theirs = measure.counts(before), measure.counts(after)
    sums = np.concatenate([image_sums(before, ours), image_sums(after, theirs)])
    sums = sums[:, (sums[1] != 0) | (sums[3] != 0)]
    old, new = figure(measure, before, resamples=resamples), figure(measure, after, resamples=resamples)
    difference, error = _difference(sums, resamples, seed)
    gained, lost = int((sums[2] > sums[0]).sum()), int((sums[2] < sums[0]).sum())
    return Change(
        name=measure.name,
        before=old,
        after=new,
        difference=difference,
        relative=difference.value / old.value if old.value else nan,
        n_images=sums.shape[1],
        gained=gained,
        lost=lost,
        p_value=mcnemar(gained, lost),
        images_needed=images_needed(difference.value, error, sums.shape[1]),
    )


def mcnemar(gained: int, lost: int) -> float:
    """P-value of as uneven a split of what changed, if both ways were as likely (McNemar 1947)."""
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted so that one false finding among all is as rare as the level says. Source: Holm 1979."""
    order = np.argsort(p_values)
    steps = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


def empirical_p(observed: float, chance: Sequence[float]) -> float:
    """How often chance does at least as well, where less is better; never below 1 / (number of draws + 1).

    Source: Phipson and Smyth 2010, "Permutation P-values Should Never Be Zero".
    """
    return (1 + sum(value <= observed for value in chance)) / (1 + len(chance))


def images_needed(difference: float, standard_error: float, n: int) -> int | None:
    """Images at which a difference of this size is told from zero, given its standard error over `n` images."""
    if not (difference and isfinite(difference) and isfinite(standard_error)):
        return None
    z = norm.ppf((1 + LEVEL) / 2) + norm.ppf(POWER)
    return max(2, ceil(n * (z * standard_error / difference) ** 2))


def _difference(sums: Float64[np.ndarray, "4 I"], resamples: int, seed: int) -> tuple[Figure, float]:
    """The difference of both ratios with its interval, and its standard error."""

    def statistic(above, below, above_after, below_after, axis):
        with np.errstate(invalid="ignore", divide="ignore"):
            return above_after.sum(axis) / below_after.sum(axis) - above.sum(axis) / below.sum(axis)

    n = sums.shape[1]
    value = float(statistic(*sums, axis=0)) if n else nan
    if n < 2 or not isfinite(value):
        return Figure(value, nan, nan), nan
    settings = {"paired": True, "vectorized": True, "n_resamples": resamples, "method": "percentile", "rng": seed}
    drawn = bootstrap(sums, statistic, confidence_level=LEVEL, **settings)
    interval = drawn.confidence_interval
    return Figure(value, float(interval.low), float(interval.high)), float(drawn.standard_error)


def _check_pairs(before: Sequence[Response], after: Sequence[Response]) -> None:
    if len(before) != len(after):
        raise UserError(f"{len(before)} responses before the edit and {len(after)} after it; both must be to the same")
    for ours, theirs in zip(before, after, strict=True):
        if ours.id != theirs.id:
            raise UserError(f"response {ours.id} before the edit stands beside {theirs.id} after it; sort both alike")
