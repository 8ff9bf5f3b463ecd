"""Telling a hallucination before its token is given: classifiers, cross-validated by image, and what they add.

Axes: n decisions, C columns, R resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from crosslayer.errors import UserError
from crosslayer.hallucination.circuits.logistic import FOLDS, fit_chosen, folds
from crosslayer.metrics import Figure

PUBLISHED = 0.68
"""AUC of a classifier on statistics of attribution graphs, as published for the detection of hallucination."""
OUTER = 5
"""Folds, each of which is predicted by a classifier that saw the others."""
RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Block:
    """Columns that a classifier may look at."""

    values: Float[np.ndarray, "n C"]
    at_most: int | None = None
    """Columns kept, those that are largest on the rows it is fitted to; all by default."""

    def chosen(self, rows: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "n _"]:
        """The columns that a classifier of these rows sees; their labels have no part in the choice."""
        order = np.argsort(-np.abs(self.values[rows]).mean(0), kind="stable")
        return self.values[:, np.sort(order[: self.at_most])]


@dataclass(frozen=True)
class Foresight:
    """How well one set of columns tells hallucinations from true answers."""

    name: str
    auc: Figure
    """Of rows predicted by classifiers that saw none of their images; the interval is over images."""
    gain: Figure
    """Above the first set's."""
    columns: int


def foresee(
    sets: Mapping[str, Sequence[Block]], hallucinated: Bool[np.ndarray, " n"], image: Int[np.ndarray, " n"], seed: int
) -> tuple[Foresight, ...]:
    """Compare sets of columns, the first being the baseline.

    Args:
        sets: what each classifier sees.
        hallucinated: whether what is about to be named is not there.
        image: the number of each decision's image.
        seed: of the folds and of the bootstrap.

    Raises:
        UserError: when there are too few images of either kind, with how many are needed.
    """
    check_enough(hallucinated, image)
    parts = folds(image, OUTER, seed)
    odds = {name: predicted(blocks, hallucinated, image, parts) for name, blocks in sets.items()}
    weights = _drawn(image, seed)
    aucs = {name: auc_within(values, hallucinated, parts, weights) for name, values in odds.items()}
    first = next(iter(aucs.values()))
    return tuple(
        Foresight(
            name,
            _figure(found),
            _figure(found - first),
            sum(min(block.at_most or block.values.shape[1], block.values.shape[1]) for block in sets[name]),
        )
        for name, found in aucs.items()
    )


def check_enough(hallucinated: Bool[np.ndarray, " n"], image: Int[np.ndarray, " n"]) -> None:
    """Refuse a set in which some fold of the folds could lack hallucinations or true answers."""
    needed = 2 * max(OUTER, FOLDS)
    for name, some in (("hallucinated", hallucinated), ("true", ~hallucinated)):
        if (n := len(np.unique(image[some]))) < needed:
            raise UserError(
                f"{n} images with {name} answers are too few to find circuits in; at least {needed} are needed, so "
                "score more images"
            )


def predicted(
    blocks: Sequence[Block],
    hallucinated: Bool[np.ndarray, " n"],
    image: Int[np.ndarray, " n"],
    parts: Int[np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
    """Log-odds of each decision, by a classifier fitted to the other folds."""
    odds = np.zeros(len(hallucinated))
    for part in np.unique(parts):
        seen = parts != part
        x = np.concatenate([block.chosen(seen) for block in blocks], 1)
        odds[~seen] = fit_chosen(x[seen], hallucinated[seen], image[seen]).log_odds(x[~seen])
    return odds


def auc_within(
    score: Float[np.ndarray, " n"],
    yes: Bool[np.ndarray, " n"],
    parts: Int[np.ndarray, " n"],
    weights: Float[np.ndarray, "R n"],
) -> Float[np.ndarray, " R"]:
    """Share of the pairs of a yes and a no in which the yes scores higher, ties counting half; NaN without pairs.

    Only pairs inside one fold count, as scores of different classifiers cannot be compared: the more hallucinations a
    fold has by chance, the fewer its classifier has seen, which would hold the AUC of a useless one below 0.5.

    Args:
        score: the higher, the likelier a yes.
        yes: the truth.
        parts: folds.
        weights: how often each row counts, a line a resample.
    """
    pairs = (parts[yes, None] == parts[~yes]).astype(float)
    wins = (score[yes, None] > score[~yes]) + 0.5 * (score[yes, None] == score[~yes])
    these, those = weights[:, yes], weights[:, ~yes]
    top, below = ((these @ part * those).sum(1) for part in (wins * pairs, pairs))
    return np.divide(top, below, out=np.full_like(top, np.nan), where=below > 0)


def _drawn(image: Int[np.ndarray, " n"], seed: int) -> Float[np.ndarray, "R n"]:
    """How often each row counts: once, and then in resamples of the images, the same for every set."""
    groups, place = np.unique(image, return_inverse=True)
    n = len(groups)
    counts = np.random.default_rng([seed, 1]).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    return np.concatenate([np.ones((1, len(image))), counts[:, place]]).astype(float)


def _figure(found: Float[np.ndarray, " R"]) -> Figure:
    """The first value, with the interval of the others."""
    return Figure(float(found[0]), *map(float, np.nanpercentile(found[1:], (2.5, 97.5))))
