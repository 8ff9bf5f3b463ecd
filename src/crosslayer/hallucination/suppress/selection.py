"""Which features to ablate, and where: strategies behind one small protocol.

A strategy sees the objective on the images for choosing, nothing else. What it tried stands in its path.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.hallucination.suppress.objective import Objective, Terms
from crosslayer.models.load import LoadedModel
from crosslayer.replacement.actions import Ablate
from crosslayer.replacement.editing import edited
from crosslayer.replacement.interventions import Edit, Intervention
from crosslayer.replacement.prefix import Under
from crosslayer.replacement.where import Part, Where

Feature = tuple[int, int]
"""Layer that it reads, and number."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing that a strategy tried."""

    tried: str
    """In words."""
    terms: Terms
    kept: bool
    """Whether it is part of what was chosen."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Edits at full strength, and how they were found."""

    edits: tuple[Edit, ...]
    path: tuple[Step, ...]

    @property
    def features(self) -> list[Feature]:
        """Those that are ablated."""
        return [(edit.layer, edit.feature) for edit in self.edits if isinstance(edit, Intervention)]


@runtime_checkable
class Strategy(Protocol):
    """Chooses edits."""

    def choose(self, objective: Objective, coder: CrossLayerTranscoder) -> Chosen:
        """Edits by which the objective falls, as this strategy finds them; what it depends on is in its fields."""
        ...


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """The features whose ablation, one by one and to first order, lowers the objective most."""

    n: int = 1
    where: Where = Part("text")  # noqa: RUF009

    def choose(self, objective: Objective, coder: CrossLayerTranscoder) -> Chosen:
        """See `Strategy.choose`."""
        _, gradient = objective.gradient(coder, _zeros(coder), self.where)
        best = _largest(-gradient, self.n)
        return Given(features=_features(coder, best), where=self.where).choose(objective, coder)


@dataclass(frozen=True, kw_only=True)
class Given:
    """Features from elsewhere, a circuit for one, all of them."""

    features: tuple[Feature, ...]
    where: Where = Part("text")  # noqa: RUF009

    def choose(self, objective: Objective, coder: CrossLayerTranscoder) -> Chosen:
        """See `Strategy.choose`."""
        edits = ablated(self.features, self.where)
        step = Step(tried=_listed("ablate", self.features), terms=measured(objective, coder, edits), kept=True)
        return Chosen(edits=edits, path=(step,))


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """Groups of features, round by round, until none lowers the objective.

    Each round takes the features whose ablation, or whose release, promises most by the gradient at the present edit.
    They stay as they were unless the objective, measured, falls: then the next group may be twice as large, else it is
    half as large, and that member is tried no more which the gradient at the failure would take back first. The
    gradient of the collateral is 0 without an edit, so a first group is chosen blindly for it: later rounds may
    release what it spoils.
    """

    where: Where = Part("text")  # noqa: RUF009
    group: int = 8
    """Features in the first group."""
    at_most: int = 96
    """Features in all."""
    rounds: int = 40
    """At most."""
    patience: int = 3
    """Features that may fail alone, one after the other, before it stops."""

    def choose(self, objective: Objective, coder: CrossLayerTranscoder) -> Chosen:
        """See `Strategy.choose`."""
        on, size, failures = _zeros(coder), self.group, 0
        barred = torch.zeros_like(on, dtype=torch.bool).flatten()
        terms, gradient = objective.gradient(coder, on, self.where)
        path = [Step(tried="nothing", terms=terms, kept=True)]
        bar = tqdm(range(self.rounds), unit="round", desc="choose features", disable=None, leave=False)
        for _ in bar:
            flips = self._group(on, gradient, barred, size)
            if not len(flips) or failures >= self.patience:
                break
            new = on.flatten().index_put((flips,), 1 - on.flatten()[flips]).view_as(on)
            now, its_gradient = objective.gradient(coder, new, self.where)
            kept = now.value < terms.value
            path.append(Step(tried=_flipped(coder, flips, on), terms=now, kept=kept))
            if kept:
                on, terms, gradient, failures, size = new, now, its_gradient, 0, min(2 * len(flips), self.group)
            else:
                barred[flips[_gain(new, its_gradient)[flips].argmax()]] = True
                failures, size = failures + (len(flips) == 1), max(1, len(flips) // 2)
            bar.set_postfix(objective=f"{terms.value:.3f}", features=int(on.sum()))
        return Chosen(edits=ablated(_features(coder, on.flatten().nonzero()[:, 0]), self.where), path=tuple(path))

    def _group(self, on: Float[Tensor, "S F"], gradient: Float[Tensor, "S F"], barred: Tensor, size: int) -> Tensor:
        """Flat indices of the features to try next; ablations only as long as there may be more."""
        gain, room = _gain(on, gradient).masked_fill(barred, -torch.inf), self.at_most - int(on.sum())
        values, flips = gain.topk(min(size, len(gain)))
        flips = flips[values > 0]
        fresh = on.flatten()[flips] == 0
        return flips[~fresh | (fresh.cumsum(0) <= room)]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """What another strategy chooses, at the positions at which it lowers the objective most."""

    inner: Strategy
    windows: tuple[Where, ...]

    def choose(self, objective: Objective, coder: CrossLayerTranscoder) -> Chosen:
        """See `Strategy.choose`."""
        found = self.inner.choose(objective, coder)
        tried = [tuple(replace(edit, where=window) for edit in found.edits) for window in self.windows]
        terms = [measured(objective, coder, edits) for edits in tried]
        best = min(range(len(tried)), key=lambda i: terms[i].value)
        steps = [Step(tried=f"at {window}", terms=terms[i], kept=i == best) for i, window in enumerate(self.windows)]
        return Chosen(edits=tried[best], path=(*found.path, *steps))


def ablated(features: Collection[Feature], where: Where) -> tuple[Edit, ...]:
    """Interventions that ablate features, in the order of their layers."""
    return tuple(Intervention(layer=s, feature=f, action=Ablate(), where=where) for s, f in sorted(features))


def measured(objective: Objective, coder: CrossLayerTranscoder, edits: Sequence[Edit], strength: float = 1.0) -> Terms:
    """The objective under edits."""
    return objective.measure(under(objective.model, coder, edits, strength))


def under(model: LoadedModel, coder: CrossLayerTranscoder, edits: Sequence[Edit], strength: float) -> Under:
    """Edits on the model for passes over a batch, or for what follows its prompts."""
    wheres = tuple(dict.fromkeys(edit.where for edit in edits))
    return Under(lambda batch: edited(model, coder, edits, strength=strength, batch=batch), wheres)


def _zeros(coder: CrossLayerTranscoder) -> Float[Tensor, "S F"]:
    return coder.b_dec.new_zeros(len(coder.sources), coder.d_transcoder)


def _gain(on: Float[Tensor, "S F"], gradient: Float[Tensor, "S F"]) -> Float[Tensor, " K"]:
    """By how much, to first order, the objective falls when a feature is ablated, or released where it is."""
    return torch.where(on > 0, gradient, -gradient).flatten()


def _largest(gain: Float[Tensor, "S F"], n: int) -> Tensor:
    """Flat indices of the n largest, of those above 0."""
    values, indices = gain.flatten().topk(min(n, gain.numel()))
    return indices[values > 0]


def _features(coder: CrossLayerTranscoder, flat: Tensor) -> tuple[Feature, ...]:
    return tuple((coder.sources[i // coder.d_transcoder], i % coder.d_transcoder) for i in flat.tolist())


def _flipped(coder: CrossLayerTranscoder, flips: Tensor, on: Tensor) -> str:
    released = on.flatten()[flips] > 0
    parts = [("ablate", flips[~released]), ("release", flips[released])]
    return "; ".join(_listed(verb, _features(coder, flat)) for verb, flat in parts if len(flat))


def _listed(verb: str, features: Sequence[Feature]) -> str:
    return f"{verb} {' '.join(f'{layer}.{feature}' for layer, feature in features)}"
