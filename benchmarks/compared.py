"""A graph of circuit-tracer's, and how far ours of the same prompt is from it, edge by edge.

Axes: A active features, R rows: features, then targets; C columns: features, errors, tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from crosslayer.attribution.graph import AttributionGraph


@dataclass(frozen=True)
class Theirs:
    """A graph of circuit-tracer's."""

    features: Tensor
    """[A, 3]: layer, position, number."""
    activations: Tensor
    """[A]"""
    edges: Tensor
    """[R, C]: what each row's node gets from each column's."""

    @classmethod
    def load(cls, file: Path) -> "Theirs":
        """What the script in `peers` wrote."""
        return cls(**load_file(file))

    @property
    def names(self) -> list[str]:
        """The ids that our nodes have for their features."""
        return [f"feature/{layer}/{position}/{number}" for layer, position, number in self.features.tolist()]

    def shared(self, graph: AttributionGraph) -> "Theirs":
        """Without the features that are not active in our graph."""
        here = torch.tensor([name in graph.index for name in self.names])
        rows, columns = (torch.cat([here, here.new_ones(n - len(here))]) for n in self.edges.shape)
        return Theirs(self.features[here], self.activations[here], self.edges[rows][:, columns])

    def columns(self, graph: AttributionGraph) -> list[str]:
        """The same for all columns."""
        positions = range(len(graph.tokens))
        errors = [f"error/{layer}/{position}" for layer in range(graph.n_layers) for position in positions]
        return [*self.names, *errors, *(f"token/{position}" for position in positions)]


@dataclass(frozen=True)
class Compared:
    """Two graphs of one prompt. Differences are relative to the largest of their kind."""

    features: int
    """Active in both."""
    in_one_alone: int
    """Active in one graph alone."""
    edges: int
    """Of theirs that are not 0."""
    zeros: int
    """Edges that are 0 in one graph alone."""
    activations: float
    from_features: float
    from_errors: float
    from_tokens: float
    edge_by_edge: float
    """The largest difference over the edge itself, of those over a thousandth of the largest."""
    first: float
    """Our largest edge from an error at the first position, over their largest from an error; theirs are 0 there."""
    their_gap: float
    """Median over rows: what lacks to the pre-activation, over the larger of it and the largest edge."""
    closed_gap: float
    """The largest after our edges from what theirs has no nodes for are added."""
    our_gap: float
    """The largest."""


def compare(graph: AttributionGraph, theirs: Theirs) -> Compared:
    """Two graphs of one prompt, on the features that both have."""
    mine = {node.id: node.activation or 0.0 for node in graph.nodes if node.kind == "feature"}
    in_one_alone, theirs = len(mine.keys() ^ set(theirs.names)), theirs.shared(graph)
    columns, edges = theirs.columns(graph), theirs.edges.double()
    rows, ours, biases = in_their_order(graph, theirs)
    first = torch.tensor([name.startswith("error/") and name.endswith("/0") for name in columns])
    kind = {kind: torch.tensor([name.startswith(kind) for name in columns]) for kind in ("feature", "error", "token")}
    apart = (ours - edges).masked_fill(first, 0.0)
    large = edges.abs() > edges.abs().max() / 1000
    whole = graph.preactivation.double()[rows]
    size, lacking = torch.maximum(whole.abs(), edges.abs().amax(1)), whole - edges.sum(1)
    activations = torch.tensor([mine[name] for name in theirs.names])
    return Compared(
        features=len(theirs.names),
        in_one_alone=in_one_alone,
        edges=int((edges != 0).sum()),
        zeros=int(((edges == 0) != (ours == 0))[:, ~first].sum()),
        activations=largest(activations - theirs.activations, theirs.activations),
        from_features=largest(apart[:, kind["feature"]], edges[:, kind["feature"]]),
        from_errors=largest(apart[:, kind["error"]], edges[:, kind["error"]]),
        from_tokens=largest(apart[:, kind["token"]], edges[:, kind["token"]]),
        edge_by_edge=float((apart.abs() / edges.abs())[large].max()),
        first=largest(ours[:, first], edges[:, kind["error"]]),
        their_gap=float((lacking.abs() / size).median()),
        closed_gap=float(((lacking - biases - ours[:, first].sum(1)).abs() / size).max()),
        our_gap=graph.scores.worst_row_gap,
    )


def largest(difference: Tensor, values: Tensor) -> float:
    """The largest difference, over the largest value."""
    return float(difference.abs().max() / values.abs().max())


def in_their_order(graph: AttributionGraph, theirs: Theirs) -> tuple[list[int], Tensor, Tensor]:
    """Where their rows are among our nodes, our edges as a matrix [R, C], and what each row gets from biases [R]."""
    columns = [graph.index[name] for name in theirs.columns(graph)]
    rows = columns[: len(theirs.names)] + graph.of_kind("target").nonzero()[0].tolist()
    matrix = torch.zeros(len(graph.nodes), len(graph.nodes), dtype=torch.double)
    matrix[graph.target.long(), graph.source.long()] = graph.weight.double()
    return rows, matrix[rows][:, columns], matrix[rows][:, torch.from_numpy(graph.of_kind("bias"))].sum(1)
