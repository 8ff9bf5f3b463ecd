"""Two sets of graphs: which nodes and edges gained or lost influence, and which are suppressed in one.

Tested is each node's (each edge's) influence in the examples of one set against the other, and its effect too, by
Mann-Whitney; q-values are Benjamini and Hochberg's, over all nodes (edges) for each of the two measures. Which are
tested depends on both sets together, not on which graph is in which, so that the choice does not favour differences.

Axes: n and m examples, S nodes or edges.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import false_discovery_control, mannwhitneyu

from crosslayer.attribution.intervals import differences
from crosslayer.attribution.listing import write_rows
from crosslayer.attribution.roles import Role
from crosslayer.attribution.tables import Table, tables
from crosslayer.attribution.tally import Tally
from crosslayer.files import nulls, write_text
from crosslayer.metrics import Figure

ALPHA = 0.05
"""q-value up to which a difference is called one."""
SILENT = 0.5
"""A node that lost influence is called suppressed when it is active in at most this part of the other set's share."""


@dataclass(frozen=True)
class Difference:
    """One measure in two sets."""

    here: float
    """Mean over the graphs of this set; where a graph lacks the node or edge, it counts 0."""
    there: float
    """Mean over those of the other."""
    difference: Figure
    """here - there."""
    p: float
    q: float


@dataclass(frozen=True)
class Change:
    """What two sets have in common of a node or an edge, and what not."""

    influence: Difference
    effect: Difference
    active_here: float
    """Share of the graphs that have the node; of an edge, share of the circuits that do."""
    active_there: float
    change: str
    """`gained` or `lost` influence with q of at most 5 %; `appeared` or `suppressed` where it is also active in at most
    half as large a share of the other set's, or of this set's, graphs; empty otherwise."""


@dataclass(frozen=True)
class NodeChange(Change):
    """A node."""

    role: Role


@dataclass(frozen=True)
class EdgeChange(Change):
    """An edge."""

    source: Role
    target: Role


@dataclass(frozen=True, eq=False)
class Contrast:
    """Two sets of graphs, node by node and edge by edge, the surest differences first."""

    n_here: int
    n_there: int
    nodes: tuple[NodeChange, ...]
    edges: tuple[EdgeChange, ...]

    def to_dict(self) -> dict[str, Any]:
        """This record as JSON values; a figure that could not be measured is None."""
        rows = {name: list(map(asdict, getattr(self, name))) for name in ("nodes", "edges")}
        return nulls({"n_here": self.n_here, "n_there": self.n_there, **rows})

    def to_json(self) -> str:
        """This record as JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def save(self, folder: str | Path) -> None:
        """Write `contrast.json`, `contrast-nodes.csv` and `contrast-edges.csv`, each atomically."""
        write_text(Path(folder) / "contrast.json", self.to_json() + "\n")
        write_rows(Path(folder) / "contrast-nodes.csv", self.nodes)
        write_rows(Path(folder) / "contrast-edges.csv", self.edges)


def contrast(these: Sequence[Tally], those: Sequence[Tally], share: float, seed: int) -> Contrast:
    """Compare two sets of graphs.

    Args:
        these: one set.
        those: the other.
        share: tested is what as many circuits of both sets together have as this share of the smaller set would be.
        seed: of the bootstrap.
    """
    n, least = len(these), share * min(len(these), len(those))
    nodes, edges = tables([*these, *those])
    changed_nodes = [NodeChange(**change, role=role) for role, change in _changes(nodes, n, least, seed)]
    changed_edges = [
        EdgeChange(**change, source=source, target=target)
        for (source, target), change in _changes(edges, n, least, seed)
    ]
    return Contrast(n, len(those), tuple(changed_nodes), tuple(changed_edges))


def _changes(table: Table, n: int, least: float, seed: int) -> list[tuple[Any, dict[str, Any]]]:
    """Key and fields of each node or edge that is tested, the lowest p-value of its influence first."""
    found = table.columns(table.kept_by(least))
    if not found.keys:
        return []
    here, there = found.rows(slice(n)), found.rows(slice(n, None))
    influence, effect = (_differences(getattr(here, m), getattr(there, m), seed) for m in ("influence", "effect"))
    active = here.active.mean(0).tolist(), there.active.mean(0).tolist()
    changes = [
        (key, {"influence": i, "effect": e, "active_here": a, "active_there": b, "change": _change(i, a, b)})
        for key, i, e, a, b in zip(found.keys, influence, effect, *active, strict=True)
    ]
    return sorted(changes, key=lambda row: (row[1]["influence"].p, -abs(row[1]["influence"].difference.value)))


def _differences(here: Float[np.ndarray, "n S"], there: Float[np.ndarray, "m S"], seed: int) -> list[Difference]:
    p = p_values(here, there)
    columns = here.mean(0), there.mean(0), differences(here, there, seed), p, false_discovery_control(p)
    return [Difference(float(a), float(b), d, float(p), float(q)) for a, b, d, p, q in zip(*columns, strict=True)]


def p_values(here: Float[np.ndarray, "n S"], there: Float[np.ndarray, "m S"]) -> Float[np.ndarray, " S"]:
    """Mann-Whitney's two-sided p-value of each column, with its correction for ties; 1 where all values are equal."""
    both = np.concatenate([here, there])
    vary = (both != both[0]).any(0)
    p = np.ones(both.shape[1])
    if vary.any():
        p[vary] = mannwhitneyu(here[:, vary], there[:, vary], axis=0, method="asymptotic").pvalue
    return p


def _change(influence: Difference, here: float, there: float) -> str:
    if influence.q > ALPHA or influence.difference.value == 0:
        return ""
    if influence.difference.value > 0:
        return "appeared" if there <= SILENT * here else "gained"
    return "suppressed" if here <= SILENT * there else "lost"
