"""From what fires, and what it adds to decisions, to an order of features.

Axes: N decisions, n those traced, B resamples, L places, W features of all sources, one source after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.distributed.crew import ALONE, Crew
from crosslayer.hallucination.causes import Causes, causes
from crosslayer.hallucination.comparing import Compared
from crosslayer.hallucination.contrast_settings import ContrastSettings
from crosslayer.hallucination.feature_table import Change
from crosslayer.hallucination.firing import PLACES, Firing, fire
from crosslayer.hallucination.statistics import (
    benjamini_hochberg,
    best_first,
    drive,
    interval,
    mann_whitney,
    matched_weights,
    top_share,
    van_elteren,
)
from crosslayer.models.load import LoadedModel


@dataclass(frozen=True)
class Examined:
    """Every feature at every place: NaN where it never fires."""

    auroc: Float64[np.ndarray, "L W"]
    q: Float64[np.ndarray, "L W"]
    matched_auroc: Float64[np.ndarray, "L W"]
    matched_q: Float64[np.ndarray, "L W"]

    @cached_property
    def alive(self) -> Bool[np.ndarray, " W"]:
        """Whether a feature fires at any place."""
        return np.isfinite(self.best("q"))

    @cached_property
    def place(self) -> Int[np.ndarray, " W"]:
        """Where each feature's matched comparison is the firmest: by q, then by the effect."""
        q, effect = np.nan_to_num(self.matched_q, nan=2.0), np.nan_to_num(np.abs(self.matched_auroc - 0.5))
        return np.lexsort((-effect, q), axis=0)[0]

    def best(self, name: str) -> Float64[np.ndarray, " W"]:
        """One of the four figures, at each feature's `place`."""
        return getattr(self, name)[self.place, np.arange(len(self.place))]


def examine(firing: Firing, compared: Compared) -> Examined:
    """Test every feature at every place; q-values are over all pairs of a feature and a place where it fires."""
    found = [np.concatenate([_four(x.toarray(), compared) for x in firing.acts[place]], 1) for place in PLACES]
    auroc, p, matched_auroc, matched_p = np.stack(found, 1)
    return Examined(auroc, _adjusted(p), matched_auroc, _adjusted(matched_p))


def _four(x: np.ndarray, compared: Compared) -> Float64[np.ndarray, "4 F"]:
    varies, out = (x != x[0]).any(0), np.full((4, x.shape[1]), np.nan)
    out[:, x.any(0)] = np.array([0.5, 1.0, 0.5, 1.0])[:, None]
    if varies.any():
        out[:2, varies] = mann_whitney(x[:, varies], compared.hallucinated)
        out[2:, varies] = van_elteren(x[:, varies], compared.hallucinated, compared.stratum)
    return out


def _adjusted(p: Float64[np.ndarray, "L W"]) -> Float64[np.ndarray, "L W"]:
    q, real = p.copy(), np.isfinite(p)
    q[real] = benjamini_hochberg(p[real])
    return q


@dataclass(frozen=True)
class Weighing:
    """Means over hallucinated and over matched true decisions, with resamples of the images."""

    compared: Compared
    resamples: int
    seed: int

    @cached_property
    def weights(self) -> tuple[Float64[np.ndarray, "B1 N"], Float64[np.ndarray, "B1 N"]]:
        """Of hallucinated and of true decisions; row 0 is all data, the others are resamples."""
        counts = np.vstack(
            [np.ones((1, len(self.compared.decisions))), self.compared.resampled(self.resamples, self.seed)]
        )
        return matched_weights(self.compared.hallucinated, self.compared.stratum, counts)

    def means(self, x: Float64[np.ndarray, "N K"]) -> list[tuple[float, float]]:
        """The mean of each column over hallucinated and over true decisions."""
        these, those = (weights[0] @ x for weights in self.weights)
        return list(zip(these.tolist(), those.tolist(), strict=True))

    def changes(self, x: Float64[np.ndarray, "N K"]) -> list[Change]:
        """How each column differs between hallucinated and true decisions."""
        these, those = (weights @ x for weights in self.weights)
        low, high = interval((these - those)[1:])
        columns = zip(these[0], those[0], these[0] - those[0], low, high, strict=True)
        names = ("hallucinated", "true", "difference", "low", "high")
        return [Change(**dict(zip(names, map(float, column), strict=True))) for column in columns]


@dataclass(frozen=True)
class Ranked:
    """Features of one run in their order."""

    compared: Compared
    firing: Firing
    tests: Examined
    causes: Causes
    traced: Weighing
    """Of the decisions whose attributions `causes` are."""
    passes: Bool[np.ndarray, " W"]
    order: Int[np.ndarray, " alive"]
    stability: Float64[np.ndarray, " W"]

    def activations(self, columns: Sequence[int]) -> Float[np.ndarray, "M K"]:
        """Activations of some features at all places of all decisions, place after place."""
        source, feature = np.divmod(np.asarray(columns), self.firing.image.shape[1])
        out = np.empty((len(PLACES), len(self.compared.decisions), len(source)), np.float32)
        for place, acts in enumerate(self.firing.acts.values()):
            for i in np.unique(source):
                out[place][:, source == i] = acts[i][:, feature[source == i]].toarray()
        return out.reshape(-1, len(source))


def rank(
    model: LoadedModel,
    coder: CrossLayerTranscoder,
    compared: Compared,
    folder: Path,
    settings: ContrastSettings,
    crew: Crew = ALONE,
) -> Ranked:
    """Order a run's features: first those that pass the matched test, then by how they `drive` hallucinated decisions.

    Stability repeats the order in resamples of the images; which features pass is not decided anew.

    Args:
        model: the language model.
        coder: the run.
        compared: decisions to compare.
        folder: that of the responses' file.
        settings: how to rank.
        crew: the processes that share the passes of the model; all of them have the order.
    """
    firing = fire(model, coder, compared.decisions, folder, batch_prompts=settings.batch_prompts, crew=crew)
    tests = examine(firing, compared)
    chosen = compared.some(settings.traced, settings.seed)
    found = causes(model, coder, [compared.decisions[i] for i in chosen], folder, crew)
    weighing = Weighing(compared.only(chosen), settings.resamples, settings.seed)
    passes = np.nan_to_num(tests.matched_q, nan=1.0).min(0) <= settings.alpha
    (these, those), total = weighing.weights, found.total
    order = best_first(drive(total.T @ these[0], total.T @ those[0]), passes)
    stability = top_share((these[1:], those[1:]), total, passes, settings.top)
    return Ranked(compared, firing, tests, found, weighing, passes, order[tests.alive[order]], stability)
