"""What one graph adds to an aggregate: the influence and effect of its nodes and edges, by role. No model in sight.

Axes: R roles of the graph, E pairs of them that an edge joins.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from crosslayer.attribution.effects import effects
from crosslayer.attribution.graph import AttributionGraph
from crosslayer.attribution.influence import sums
from crosslayer.attribution.roles import Role, roles
from crosslayer.errors import UserError
from crosslayer.files import read_json, write_text

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """Which nodes and edges of a graph count as its circuit."""

    node_threshold: float = 0.8
    """Share of influence that the nodes carry."""
    edge_threshold: float = 0.98
    """Share of influence that the edges among them carry."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Tally:
    """One graph by roles. All its nodes are here, active features and the rest; of its edges those of its circuit."""

    id: str
    """Of the example."""
    label: str
    """Of the set that it belongs to."""
    targets: tuple[str, ...]
    """What is explained."""
    value: float
    """Of the targets together: their logits, weighted; what the effects of all that is no feature add up to."""
    replacement_score: float
    completeness_score: float
    left_out: float
    """Share of influence that ends at features without rows."""
    edges_left_out: float
    """Share of the influence of all edges that the edges not listed here carry."""
    roles: tuple[Role, ...]
    influence: Float[np.ndarray, " R"]
    effect: Float[np.ndarray, " R"]
    kept: Bool[np.ndarray, " R"]
    """Whether a node of this role is in the graph's circuit; never so for biases, which have no influence."""
    source: Int[np.ndarray, " E"]
    """Index into `roles`."""
    target: Int[np.ndarray, " E"]
    edge_influence: Float[np.ndarray, " E"]
    """Measured in the whole graph, like `influence`: pruning chooses what is listed and changes no figure."""
    edge_effect: Float[np.ndarray, " E"]


ARRAYS: dict[str, Any] = {
    "influence": np.float64,
    "effect": np.float64,
    "kept": bool,
    "source": np.int64,
    "target": np.int64,
    "edge_influence": np.float64,
    "edge_effect": np.float64,
}
"""The arrays of a tally and what their numbers are."""


def tally(
    graph: AttributionGraph,
    id: str = "",
    label: str = "",
    *,
    token: int = 0,
    patches: Mapping[int, str] | None = None,
    pruning: Pruning | None = None,
) -> Tally:
    """One graph by roles.

    Args:
        graph: the whole graph, not pruned.
        id: of the example.
        label: of the set that it belongs to.
        token: which token of the answer it explains, as `attribute` was told.
        patches: names for some image patches, by their number in reading order.
        pruning: what counts as its circuit.

    Raises:
        UserError: for a threshold outside 0 ... 1.
    """
    pruning = pruning or Pruning()
    place: dict[Role, int] = {}
    number = np.array([place.setdefault(role, len(place)) for role in roles(graph, token, patches)], np.int64)
    chosen = graph.selection(pruning.node_threshold, pruning.edge_threshold)
    effect, influence, R = effects(graph), graph.influence, len(place)
    listed = chosen.edges & (influence.edge > 0)
    pairs = number[graph.edges.source] * R + number[graph.edges.target]
    ends, where = np.unique(pairs[listed], return_inverse=True)
    total, scores = influence.edge.sum(), graph.scores
    return Tally(
        id=id,
        label=label,
        targets=tuple(node.label for node in graph.nodes if node.kind == "target"),
        value=float(graph.target_weight.double().numpy(force=True) @ graph.edges.into(graph.edges.weight)),
        replacement_score=scores.replacement_score,
        completeness_score=scores.completeness_score,
        left_out=scores.left_out,
        edges_left_out=float(1 - influence.edge[listed].sum() / total) if total else 0.0,
        roles=tuple(place),
        influence=sums(number, influence.node, R),
        effect=sums(number, effect.node, R),
        kept=sums(number, (chosen.nodes & (influence.node > 0)).astype(float), R) > 0,
        source=ends // R,
        target=ends % R,
        edge_influence=sums(where, influence.edge[listed], len(ends)),
        edge_effect=sums(where, effect.edge[listed], len(ends)),
    )


def write_tally(path: Path, found: Tally, made_of: Mapping[str, Any]) -> None:
    """Write one as JSON, atomically, with what it was made of."""
    record = {"schema": SCHEMA, "made_of": made_of, **asdict(found)}
    record |= {"roles": list(map(astuple, found.roles))} | {name: getattr(found, name).tolist() for name in ARRAYS}
    write_text(path, json.dumps(record, ensure_ascii=False) + "\n")


def read_tally(path: Path, made_of: Mapping[str, Any]) -> Tally:
    """Read one, and refuse it unless it was made of this.

    Raises:
        UserError: when it is damaged, of another schema, or made of something else, naming both.
    """
    record = read_json(path)
    found = record.get("schema") if isinstance(record, dict) else None
    if found != SCHEMA:
        raise UserError(f"{path}: schema {found}, this crosslayer reads {SCHEMA}; remove it, or add --overwrite")
    for name, value in made_of.items():
        if (there := record["made_of"].get(name)) != value:
            raise UserError(
                f"{path}: was made with {name} = {there}, now {value} is asked for; choose another folder or add "
                "--overwrite"
            )
    parts: dict[str, Any] = {name: record[name] for name in Tally.__dataclass_fields__}
    parts |= {name: np.array(record[name], dtype) for name, dtype in ARRAYS.items()}
    parts |= {"targets": tuple(record["targets"]), "roles": tuple(Role(*role) for role in record["roles"])}
    return Tally(**parts)
