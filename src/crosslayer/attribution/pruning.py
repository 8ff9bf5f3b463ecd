"""Which nodes and edges carry most of the influence.

Source: "Circuit Tracing" (Anthropic, 2025), appendix on pruning; `prune_graph` in circuit_tracer/graph.py of
github.com/decoderesearch/circuit-tracer.

Axes: N nodes, E edges.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from crosslayer.attribution.influence import Edges, influence
from crosslayer.errors import UserError


@dataclass(frozen=True, eq=False)
class Selection:
    """What stays."""

    nodes: Bool[np.ndarray, " N"]
    edges: Bool[np.ndarray, " E"]


def select(
    edges: Edges,
    target_weight: Float[np.ndarray, " N"],
    fixed: Bool[np.ndarray, " N"],
    features: Bool[np.ndarray, " N"],
    node_threshold: float,
    edge_threshold: float,
) -> Selection:
    """The nodes that carry `node_threshold` of all influence, then the edges among them that carry `edge_threshold`.

    A node other than the fixed ones stays only with an edge that leaves it, a feature only with one that comes in too,
    where it had one.

    Args:
        edges: the graph.
        target_weight: the targets' weights, 0 elsewhere.
        fixed: nodes that stay whatever they carry: inputs and targets.
        features: which nodes are features.
        node_threshold: 0 ... 1.
        edge_threshold: 0 ... 1.

    Raises:
        UserError: for a threshold outside its range.
    """
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} is {value}; choose a share of influence from 0 to 1")
    nodes = fixed | _largest(influence(edges, target_weight).node, node_threshold)
    among = nodes[edges.source] & nodes[edges.target]
    kept = among.copy()
    kept[among] = _largest(influence(edges.only(among), target_weight).edge, edge_threshold)
    return _without_loose_ends(edges, nodes, kept, fixed, features & (edges.into(edges.share) > 0))


def _largest(scores: Float[np.ndarray, " n"], threshold: float) -> Bool[np.ndarray, " n"]:
    """The largest scores that add up to `threshold` of all, with those that equal the smallest of them."""
    if not scores.any():
        return np.ones(len(scores), bool)
    cumulative = np.cumsum(np.sort(scores)[::-1])
    last = np.searchsorted(cumulative, threshold * cumulative[-1])
    return scores >= np.sort(scores)[::-1][last]


def _without_loose_ends(
    edges: Edges,
    nodes: Bool[np.ndarray, " N"],
    kept: Bool[np.ndarray, " E"],
    fixed: Bool[np.ndarray, " N"],
    had_row: Bool[np.ndarray, " N"],
) -> Selection:
    """Drop nodes that lead nowhere or come from nowhere, until there are none."""
    while True:
        kept = kept & nodes[edges.source] & nodes[edges.target]
        dead_end = ~fixed & (edges.out_of(kept.astype(float)) == 0)
        rootless = had_row & (edges.into(kept.astype(float)) == 0)
        remaining = nodes & ~dead_end & ~rootless
        if (remaining == nodes).all():
            return Selection(nodes, kept)
        nodes = remaining
