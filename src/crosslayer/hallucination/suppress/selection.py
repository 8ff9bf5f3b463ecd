"""Which features to turn down, and where: strategies behind one small protocol.

A strategy sees the objective on the images for choosing, nothing else. What it tried stands in its path.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.hallucination.suppress.objective import Objective, Terms
from crosslayer.hallucination.suppress.strengths import no_strengths
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
        """Those that are turned down."""
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
        _, gradient = objective.gradient(coder, no_strengths(coder), self.where)
        best = _largest(-gradient.sum(2), self.n)
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


def _largest(gain: Float[Tensor, "S F"], n: int) -> Tensor:
    """Flat indices of the n largest, of those above 0."""
    values, indices = gain.flatten().topk(min(n, gain.numel()))
    return indices[values > 0]


def _features(coder: CrossLayerTranscoder, flat: Tensor) -> tuple[Feature, ...]:
    return tuple((coder.sources[i // coder.d_transcoder], i % coder.d_transcoder) for i in flat.tolist())


def _listed(verb: str, features: Sequence[Feature]) -> str:
    return f"{verb} {' '.join(f'{layer}.{feature}' for layer, feature in features)}"
