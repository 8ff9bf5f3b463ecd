"""The record of circuits: what was found, as JSON, and the list of features that suppression tries as one edit."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from crosslayer.attribution.aggregate import EdgeRow, NodeRow
from crosslayer.attribution.contrast import ALPHA, Contrast, NodeChange
from crosslayer.files import nulls
from crosslayer.hallucination.circuits.foresight import PUBLISHED, Foresight
from crosslayer.hallucination.circuits.planted import Planted
from crosslayer.metrics import Figure

SCHEMA = 1
CIRCUITS = "circuits.json"
"""Name of the record in a folder of results."""
HELD = 0.01
"""Logits by which a feature lowers true targets, at least, to count as holding them back."""
LISTED = 200
"""Nodes, and edges, of a contrast that are listed, the surest first."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A circuit as it is drawn: the nodes and edges of most influence in a set of graphs."""

    name: str
    n: int
    nodes: tuple[NodeRow, ...]
    edges: tuple[EdgeRow, ...]


@dataclass(frozen=True, kw_only=True)
class Circuit:
    """The graphs of one moment, hallucinated against true."""

    moment: str
    """decision or naming."""
    replacement_score: Figure
    completeness_score: Figure
    """Of the hallucinated graphs."""
    margin: Figure
    """Of the hallucinated ones: the logits explained."""
    margin_true: Figure
    contrast: Contrast
    drawn: tuple[Drawn, ...]
    """All hallucinated graphs together; on the bundled world those of each planted pair, too."""

    @property
    def missing(self) -> list[NodeChange]:
        """Features that hold true answers back and do so less where the model hallucinates, the most missed first."""
        found = [c for c in self.contrast.nodes if _holds_back(c)]
        return sorted(found, key=lambda c: -c.effect.difference.value)


@dataclass(frozen=True, kw_only=True)
class CircuitFeature:
    """A feature of the circuit."""

    layer: int
    feature: int
    moment: str
    place: str
    """Where it acts: at a patch of the `lead`, say, in the `prompt`, the `answer` so far, or at its `last` token."""
    effect: float
    """On the hallucinated targets, in logits."""
    effect_true: float
    q: float
    """Of the difference."""


@dataclass(frozen=True, kw_only=True)
class Circuits:
    """What `circuits` finds."""

    model: str
    run: str
    settings: Mapping[str, Any]
    counts: Mapping[str, int]
    """Graphs by moment and set, and answers that were left out."""
    circuits: tuple[Circuit, ...]
    features: tuple[CircuitFeature, ...]
    """Those that raise hallucinated targets, and more than true ones, the strongest first."""
    foresight: tuple[Foresight, ...]
    planted: Planted | None
    """On the bundled world."""

    def to_json(self) -> str:
        """This record as JSON; figures that could not be measured are null."""
        record = {
            "schema": SCHEMA,
            **{name: getattr(self, name) for name in ("model", "run", "settings", "counts")},
            "features": list(map(asdict, self.features)),
            "classifier": {"published_auc": PUBLISHED, "sets": list(map(asdict, self.foresight))},
            "planted": None if self.planted is None else _planted(self.planted),
            "circuits": list(map(_circuit, self.circuits)),
        }
        return json.dumps(nulls(record), indent=1, ensure_ascii=False)


def features_of(circuits: Sequence[Circuit]) -> tuple[CircuitFeature, ...]:
    """The features whose effect is above 0 where the model hallucinates, and above that in true answers."""
    found = [
        CircuitFeature(
            layer=c.role.layer, feature=c.role.feature, moment=circuit.moment, place=c.role.place,
            effect=c.effect.here, effect_true=c.effect.there, q=c.effect.q,
        )
        for circuit in circuits
        for c in circuit.contrast.nodes
        if c.role.layer is not None and c.role.feature is not None
        and c.effect.q <= ALPHA and c.effect.here > max(0.0, c.effect.there)
    ]  # fmt: skip
    return tuple(sorted(found, key=lambda f: f.effect_true - f.effect))


def _holds_back(c: NodeChange) -> bool:
    surely = c.role.kind == "feature" and c.effect.q <= ALPHA
    return surely and c.effect.there <= min(-HELD, c.effect.here)


def _planted(found: Planted) -> dict[str, Any]:
    record = asdict(found)
    totals = [{"total": strength.total} for strength in found.strengths]
    return record | {"strengths": [a | b for a, b in zip(record["strengths"], totals, strict=True)]}


def _circuit(circuit: Circuit) -> dict[str, Any]:
    contrast = circuit.contrast.to_dict()
    figures = ("replacement_score", "completeness_score", "margin", "margin_true")
    plain = {"moment": circuit.moment} | {name: asdict(getattr(circuit, name)) for name in figures}
    return plain | {
        "drawn": list(map(asdict, circuit.drawn)),
        "missing": list(map(asdict, circuit.missing))[:LISTED],
        "contrast": contrast | {name: contrast[name][:LISTED] for name in ("nodes", "edges")},
    }
