"""How much of a graph is explained by features, and whether its rows add up."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from crosslayer.attribution.influence import Edges, influence


@dataclass(frozen=True)
class Scores:
    """Measures of one graph. NaN where there is nothing to measure.

    Biases are the same for every prompt: they close the rows and take no part in the first two and the last, so that
    these equal circuit-tracer's, which has no such nodes.
    """

    replacement_score: float
    """Share of the influence of inputs (tokens, patches) in that of inputs and errors: through features alone."""
    completeness_score: float
    """Share of the edges that do not come from errors, weighted with their targets' influence; a node without
    incoming edges counts as complete, as in circuit-tracer's code."""
    worst_row_gap: float
    """Largest |sum of incoming edges - pre-activation| of all rows, over the larger of |pre-activation| and the
    row's largest edge."""
    left_out: float
    """Share of influence that ends at features whose own rows were not computed."""


def replacement_score(
    node: Float[np.ndarray, " N"], inputs: Bool[np.ndarray, " N"], errors: Bool[np.ndarray, " N"]
) -> float:
    """Influence of inputs over that of inputs and errors, from the influence of all nodes."""
    from_inputs, from_errors = node[inputs].sum(), node[errors].sum()
    return _over(from_inputs, from_inputs + from_errors)


def completeness_score(edges: Edges, target_weight: Float[np.ndarray, " N"], errors: Bool[np.ndarray, " N"]) -> float:
    """Share of non-error input of all nodes, weighted with their influence and their weight as targets."""
    of_node = influence(edges, target_weight).node + target_weight
    error_share = edges.into(edges.share * errors[edges.source])
    return _over(((1 - error_share) * of_node).sum(), of_node.sum())


def row_gaps(edges: Edges, preactivation: Float[np.ndarray, " N"]) -> Float[np.ndarray, " rows"]:
    """Relative gap of every row, for the nodes whose pre-activation is not NaN; `edges` hold the biases too."""
    rows = ~np.isnan(preactivation)
    largest = np.abs(np.nan_to_num(preactivation))
    np.maximum.at(largest, edges.target, np.abs(edges.weight))
    gaps = np.abs(edges.into(edges.weight) - preactivation)[rows]
    return np.divide(gaps, largest[rows], out=np.zeros_like(gaps), where=largest[rows] > 0)


def _over(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else float("nan")
