"""How much every node and edge matters for the targets; exactly, and without a dense matrix.

A is |weights| with each row (the edges into one target) normalised to sum 1, and B = (I - A)^-1 - I = A + A^2 + ...
adds up all paths. Influence is w B, for the targets' weights w. As edges only run from lower ranks to higher ones, one
pass over the ranks from the top down gives it.

Source: "Circuit Tracing" (Anthropic, 2025), appendix on pruning; circuit_tracer/graph.py of
github.com/decoderesearch/circuit-tracer.

Axes: N nodes, E edges.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int


def sums(place: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"], length: int) -> Float[np.ndarray, " length"]:
    """The values at each place 0 ... length - 1, added up."""
    return np.bincount(place, values, minlength=length).astype(np.float64)  # of nothing, numpy makes integers


@dataclass(frozen=True, eq=False)
class Edges:
    """The weighted edges of an acyclic graph."""

    rank: Int[np.ndarray, " N"]
    target: Int[np.ndarray, " E"]
    source: Int[np.ndarray, " E"]
    weight: Float[np.ndarray, " E"]

    @cached_property
    def share(self) -> Float[np.ndarray, " E"]:
        """A at the edges: |weight| over its sum in the target's row; 0 in a row of zeros."""
        magnitude = np.abs(self.weight)
        total = self.into(magnitude)[self.target]
        return np.divide(magnitude, total, out=np.zeros_like(magnitude), where=total > 0)

    def into(self, values: Float[np.ndarray, " E"]) -> Float[np.ndarray, " N"]:
        """Sums over the edges that come into each node."""
        return sums(self.target, values, len(self.rank))

    def out_of(self, values: Float[np.ndarray, " E"]) -> Float[np.ndarray, " N"]:
        """Sums over the edges that leave each node."""
        return sums(self.source, values, len(self.rank))

    def only(self, kept: Bool[np.ndarray, " E"]) -> "Edges":
        """Some of the edges, on the same nodes."""
        return Edges(self.rank, self.target[kept], self.source[kept], self.weight[kept])


class ByNode:
    """Which edges end (or start) at each node, as indices.

    Args:
        ends: the edges' targets or sources.
        n_nodes: how many nodes there are.
    """

    def __init__(self, ends: Int[np.ndarray, " E"], n_nodes: int):
        self.order = np.argsort(ends, kind="stable")
        self.start = np.searchsorted(ends[self.order], np.arange(n_nodes + 1))

    def __getitem__(self, node: int) -> Int[np.ndarray, " some"]:
        return self.order[self.start[node] : self.start[node + 1]]


@dataclass(frozen=True, eq=False)
class Influence:
    """Influence on the targets, as shares: nodes w B, edges A times their target's own."""

    node: Float[np.ndarray, " N"]
    edge: Float[np.ndarray, " E"]


def influence(edges: Edges, target_weight: Float[np.ndarray, " N"]) -> Influence:
    """Influence of all nodes and edges.

    The edges that leave a node add up to its influence; the nodes that have no incoming edge add up to the weight of
    all targets that have one.

    Args:
        edges: the graph.
        target_weight: w: the targets' weights, 0 elsewhere.
    """
    node = carried_back(edges, edges.share, target_weight)
    return Influence(node, edges.share * (node + target_weight)[edges.target])


def carried_back(
    edges: Edges, coefficient: Float[np.ndarray, " E"], start: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """The sum over all paths from each node, of the product of their edges' coefficients and of `start` at their end.

    Args:
        edges: the graph.
        coefficient: what an edge multiplies with.
        start: what a path that ends at a node begins with.
    """
    node = np.zeros(len(edges.rank))
    rank = edges.rank[edges.target]
    order = np.argsort(-rank, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(rank[order])) + 1):
        carried = coefficient[rows] * (node + start)[edges.target[rows]]
        node += sums(edges.source[rows], carried, len(node))
    return node
