"""Graphs over a data set: how much each node and edge matters on average, and in how many of the graphs.

Nodes are told by their role (`crosslayer.attribution.roles`), as positions mean nothing across prompts. No model in
sight.

Axes: n examples.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from crosslayer.attribution.contrast import Contrast, contrast
from crosslayer.attribution.intervals import means
from crosslayer.attribution.listing import write_rows
from crosslayer.attribution.roles import Role
from crosslayer.attribution.tables import Table, tables
from crosslayer.attribution.tally import Tally
from crosslayer.errors import UserError
from crosslayer.files import nulls, write_text
from crosslayer.metrics import Figure

SCHEMA = 1


def check_share(share: float) -> None:
    """Refuse a share of the graphs outside 0 ... 1."""
    if not 0 <= share <= 1:
        raise UserError(f"share is {share}; choose a share of the graphs from 0 to 1")


@dataclass(frozen=True)
class NodeRow:
    """One node, averaged; where a graph lacks it, it counts 0."""

    role: Role
    influence: Figure
    """Share of the influence on the targets, without sign."""
    effect: Figure
    """What its removal takes from the targets' logits; below 0 where it holds them down."""
    active: float
    """Share of the graphs that have it."""
    kept: float
    """Share of the graphs whose circuit has it."""


@dataclass(frozen=True)
class EdgeRow:
    """One edge, averaged; where a graph's circuit lacks it, it counts 0."""

    source: Role
    target: Role
    influence: Figure
    effect: Figure
    kept: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Aggregate:
    """The graphs of a data set, averaged.

    Raises:
        UserError: for no graphs, or a share outside 0 ... 1.
    """

    tallies: tuple[Tally, ...] = field(repr=False)
    """One a graph."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """The run, the model and the settings that they were made with."""
    share: float = 0.2
    """Nodes and edges are listed that the circuits of this share of the graphs have."""
    seed: int = 0
    """Of the bootstrap."""

    def __post_init__(self):
        if not self.tallies:
            raise UserError("there are no graphs to put together; give at least one")
        check_share(self.share)

    def __len__(self) -> int:
        return len(self.tallies)

    def only(self, label: str) -> "Aggregate":
        """Those graphs that bear this label."""
        return replace(self, tallies=tuple(tally for tally in self.tallies if tally.label == label))

    @cached_property
    def tables(self) -> tuple[Table, Table]:
        """Nodes and edges of all graphs, example by example."""
        return tables(self.tallies)

    @cached_property
    def nodes(self) -> tuple[NodeRow, ...]:
        """The nodes, those of the most influence first."""
        return tuple(NodeRow(*row) for row in self._rows(self.tables[0]))

    @cached_property
    def edges(self) -> tuple[EdgeRow, ...]:
        """The edges, those of the most influence first."""
        return tuple(
            EdgeRow(source, target, influence, effect, kept)
            for (source, target), influence, effect, _, kept in self._rows(self.tables[1])
        )

    def contrast(self, other: "Aggregate") -> Contrast:
        """What gained or lost influence here against another set of graphs; see `crosslayer.attribution.contrast`.

        Raises:
            UserError: when the other was made with another run, model or settings, naming both.
        """
        for name, value in self.about.items():
            if (there := other.about.get(name)) != value:
                raise UserError(f"one set of graphs was made with {name} = {value}, the other with {there}")
        return contrast(self.tallies, other.tallies, self.share, self.seed)

    @cached_property
    def scores(self) -> dict[str, Figure]:
        """Mean scores of the graphs that have them."""
        names = ("replacement_score", "completeness_score", "left_out", "edges_left_out", "value")
        return {name: self._mean_of(name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """This record as JSON values; a figure that could not be measured is None."""
        names = ("id", "label", "targets", "value", "replacement_score", "completeness_score")
        record = {
            "schema": SCHEMA,
            "about": dict(self.about),
            "share": self.share,
            "seed": self.seed,
            "n": len(self),
            "scores": {name: asdict(figure) for name, figure in self.scores.items()},
            "nodes": list(map(asdict, self.nodes)),
            "edges": list(map(asdict, self.edges)),
            "examples": [{name: getattr(tally, name) for name in names} for tally in self.tallies],
        }
        return nulls(record)

    def to_json(self) -> str:
        """This record as JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def save(self, folder: str | Path) -> None:
        """Write `aggregate.json`, `nodes.csv` and `edges.csv`, each atomically."""
        write_text(Path(folder) / "aggregate.json", self.to_json() + "\n")
        write_rows(Path(folder) / "nodes.csv", self.nodes)
        write_rows(Path(folder) / "edges.csv", self.edges)

    def _rows(self, table: Table) -> list[tuple[Any, Figure, Figure, float, float]]:
        found = table.columns(table.kept_by(self.share * len(self)))
        figures = means(found.influence, self.seed), means(found.effect, self.seed)
        rows = zip(found.keys, *figures, found.active.mean(0).tolist(), found.kept.mean(0).tolist(), strict=True)
        return sorted(rows, key=lambda row: -row[1].value)

    def _mean_of(self, name: str) -> Figure:
        values = np.array([[getattr(tally, name)] for tally in self.tallies])
        values = values[~np.isnan(values[:, 0])]
        return means(values, self.seed)[0] if len(values) else Figure(float("nan"), float("nan"), float("nan"))
