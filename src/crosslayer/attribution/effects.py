"""What every node does to the targets, with its sign: influence says how much, this says which way.

A node's effect is what its removal takes from the targets (summed with their weights), while attention, norms and the
choice of active features stay as they are: its own edges into them, and through each feature that it feeds the share
of that feature's pre-activation times the feature's own effect. The effects of all nodes that nothing runs into add up
to the targets' values.

A pooled feature's row does not say at which of its positions a source acts, so each of them is taken to lose the same
share of its pre-activation. What runs through it is then exact where sources do act on all alike, or where a unit of
activation is worth the same at each; else it lacks the covariance of the two over the positions, weighted with their
pre-activations, times the sum of these.

Axes: N nodes, E edges.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from crosslayer.attribution.graph import AttributionGraph
from crosslayer.attribution.influence import carried_back


@dataclass(frozen=True, eq=False)
class Effects:
    """Effects in the targets' own unit, logits for tokens; below 0 where the targets are pushed down."""

    node: Float[np.ndarray, " N"]
    edge: Float[np.ndarray, " E"]
    """What reaches the targets through an edge; the edges that leave a node add up to its effect."""


def effects(graph: AttributionGraph, weights: Float[np.ndarray, " N"] | None = None) -> Effects:
    """The effects of all nodes and edges, biases included.

    Args:
        graph: pruned or not.
        weights: of the targets; the graph's own by default.
    """
    start = graph.target_weight.double().numpy(force=True) if weights is None else weights
    preactivation = graph.edges.into(graph.edges.weight)
    scale = np.where(graph.of_kind("target"), 1.0, preactivation)[graph.edges.target]
    coefficient = np.divide(graph.edges.weight, scale, out=np.zeros_like(scale), where=scale != 0)
    node = carried_back(graph.edges, coefficient, start)
    return Effects(node, coefficient * (node + start)[graph.edges.target])
