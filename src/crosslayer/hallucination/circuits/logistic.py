"""Logistic regression with an L2 penalty, standardised on the rows it is fitted to.

The best weights lie in the span of the rows, so the search runs in as many dimensions as there are rows at most.

Axes: n rows, C columns, R rotated columns, W their weights and the intercept.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from scipy.special import expit

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Penalties to choose from, of the squared weights against the mean loss of a row."""
FOLDS = 4
"""In which a penalty is tried."""


@dataclass(frozen=True, eq=False)
class Logistic:
    """A fitted regression."""

    mean: Float[np.ndarray, " C"]
    weight: Float[np.ndarray, " C"]
    """Of the columns less their means."""
    intercept: float

    def log_odds(self, x: Float[np.ndarray, "n C"]) -> Float[np.ndarray, " n"]:
        """Of each row, the log-odds of a yes."""
        return (x - self.mean) @ self.weight + self.intercept


def fit(x: Float[np.ndarray, "n C"], yes: Bool[np.ndarray, " n"], strength: float) -> Logistic:
    """The weights that minimise the mean loss plus half the strength times the squared weights of standard columns."""
    mean, scale = x.mean(0), x.std(0)
    standard = np.divide(x - mean, scale, out=np.zeros_like(x), where=scale > 1e-12)
    left, size, right = np.linalg.svd(standard, full_matrices=False)
    found = minimize(_loss, np.zeros(len(size) + 1), (left * size, yes, strength), jac=True, method="L-BFGS-B")
    weight = right.T @ found.x[1:]
    return Logistic(mean, np.divide(weight, scale, out=np.zeros_like(weight), where=scale > 1e-12), float(found.x[0]))


def fit_chosen(x: Float[np.ndarray, "n C"], yes: Bool[np.ndarray, " n"], group: Int[np.ndarray, " n"]) -> Logistic:
    """The same with the strength whose loss on rows of left-out groups is least."""
    parts = folds(group, FOLDS, 0)
    losses = [sum(_left_out(x, yes, parts == part, strength) for part in range(FOLDS)) for strength in STRENGTHS]
    return fit(x, yes, STRENGTHS[int(np.argmin(losses))])


def folds(group: Int[np.ndarray, " n"], n_folds: int, seed: int) -> Int[np.ndarray, " n"]:
    """The fold of each row: all rows of a group are in one, and folds have as many groups as can be."""
    groups, place = np.unique(group, return_inverse=True)
    return (np.random.default_rng(seed).permutation(len(groups)) % n_folds)[place]


def _left_out(x: np.ndarray, yes: np.ndarray, out: Bool[np.ndarray, " n"], strength: float) -> float:
    odds = fit(x[~out], yes[~out], strength).log_odds(x[out])
    return float(np.logaddexp(0, np.where(yes[out], -odds, odds)).sum())


def _loss(
    at: Float[np.ndarray, " W"], x: Float[np.ndarray, "n R"], yes: Bool[np.ndarray, " n"], strength: float
) -> tuple[float, Float[np.ndarray, " W"]]:
    """Penalised mean loss and its gradient."""
    odds = x @ at[1:] + at[0]
    wrong = (expit(odds) - yes) / len(yes)
    value = np.logaddexp(0, np.where(yes, -odds, odds)).mean() + strength / 2 * at[1:] @ at[1:]
    return float(value), np.concatenate([[wrong.sum()], x.T @ wrong + strength * at[1:]])
