"""Telling a hallucination before its token is given: classifiers, cross-validated by image, and what they add.

Axes: n decisions, C columns, R resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

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
    drawn = {name: _drawn(values, hallucinated, parts, image, seed) for name, values in odds.items()}
    whole = {name: auc_within(values, hallucinated, parts) for name, values in odds.items()}
    first = next(iter(sets))
    return tuple(
        Foresight(
            name,
            _figure(whole[name], drawn[name]),
            _figure(whole[name] - whole[first], drawn[name] - drawn[first]),
            sum(min(block.at_most or block.values.shape[1], block.values.shape[1]) for block in sets[name]),
        )
        for name in sets
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


def auc(score: Float[np.ndarray, " n"], yes: Bool[np.ndarray, " n"]) -> float:
    """Share of the pairs of a yes and a no in which the yes scores higher, ties counting half; NaN without pairs."""
    n, m = int(yes.sum()), int((~yes).sum())
    return float((rankdata(score)[yes].sum() - n * (n + 1) / 2) / (n * m)) if n * m else float("nan")


def auc_within(score: Float[np.ndarray, " n"], yes: Bool[np.ndarray, " n"], parts: Int[np.ndarray, " n"]) -> float:
    """The same for pairs inside one fold only.

    Scores of different classifiers are not compared: the more hallucinations a fold has by chance, the fewer its
    classifier has seen, which would hold the AUC of a useless one below 0.5.
    """
    wins = pairs = 0.0
    for part in np.unique(parts):
        rows = parts == part
        n = int(yes[rows].sum()) * int((~yes[rows]).sum())
        wins, pairs = wins + (n and n * auc(score[rows], yes[rows])), pairs + n
    return wins / pairs if pairs else float("nan")


def _drawn(
    score: Float[np.ndarray, " n"],
    yes: Bool[np.ndarray, " n"],
    parts: Int[np.ndarray, " n"],
    image: Int[np.ndarray, " n"],
    seed: int,
) -> Float[np.ndarray, " R"]:
    """The AUC in resamples of the images; the same images for every set."""
    rng = np.random.default_rng([seed, 1])
    rows = [np.flatnonzero(image == number) for number in np.unique(image)]
    picks = (np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))]) for _ in range(RESAMPLES))
    return np.array([auc_within(score[pick], yes[pick], parts[pick]) for pick in picks])


def _figure(value: float, drawn: Float[np.ndarray, " R"]) -> Figure:
    return Figure(value, *map(float, np.nanpercentile(drawn, (2.5, 97.5))))
