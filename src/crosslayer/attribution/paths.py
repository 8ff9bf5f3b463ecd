"""Paths from inputs to targets: how long they are, and which carry most.

A path's strength is the product of its edges' shares (|weight|, rows normalised) and its target's weight; the strengths
of all paths from where nothing comes in add up to the targets' weights.
"""

from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from jaxtyping import Float

from crosslayer.attribution.graph import AttributionGraph
from crosslayer.attribution.influence import ByNode, Edges
from crosslayer.attribution.node import INPUTS


@dataclass(frozen=True, eq=False)
class PathLengths:
    """How many edges the paths from inputs to targets have, weighted with their strength."""

    share: Float[np.ndarray, " lengths"]
    """Of length 0, 1, ... edges; adds up to 1."""
    mean: float


@dataclass(frozen=True)
class Path:
    """One path."""

    nodes: tuple[str, ...]
    """Ids, from the input to the target."""
    strength: float
    sign: int
    """Product of the edges' signs: +1 where the path raises its target."""


def path_lengths(graph: AttributionGraph) -> PathLengths:
    """Lengths of all paths from tokens and patches to targets; all NaN when there is none.

    Args:
        graph: pruned or not.
    """
    edges, inputs = graph.causes, graph.of_kind(*INPUTS)
    at = graph.target_weight.double().numpy(force=True)
    strengths = []
    while at.any():
        strengths.append(at[inputs].sum())
        at = edges.out_of(edges.share * at[edges.target])
    total = sum(strengths)
    share = np.array(strengths) / total if total > 0 else np.full(len(strengths), np.nan)
    return PathLengths(share, float((share * np.arange(len(share))).sum()) if total > 0 else float("nan"))


def top_paths(graph: AttributionGraph, k: int = 10, targets: tuple[str, ...] = ()) -> list[Path]:
    """The k strongest paths from tokens and patches to targets, strongest first: exactly, by best-first search.

    The strength of the best way from any input to a node is known first, so a partial path is only ever extended
    while it can still be among the best.

    Args:
        graph: pruned or not.
        k: how many; fewer come back where there are fewer.
        targets: ids of targets, each counted with weight 1; by default all, with their weights.
    """
    edges, inputs = graph.causes, graph.of_kind(*INPUTS)
    best = _best_from(edges, inputs.astype(float))
    rows = ByNode(edges.target, len(graph.nodes))
    weights = graph.target_weight.tolist()
    starts = [(graph.index[id], 1.0) for id in targets] or [(int(i), weights[i]) for i in np.flatnonzero(weights)]
    queue: list[tuple[float, tuple[int, ...], float, int]] = [
        (-weight * best[i], (i,), weight, 1) for i, weight in starts if best[i] > 0
    ]
    queue.sort()
    found = []
    while queue and len(found) < k:
        _, path, strength, sign = heappop(queue)
        if inputs[path[0]]:
            found.append(Path(tuple(graph.nodes[i].id for i in path), float(strength), sign))
            continue
        for edge in rows[path[0]]:
            source, longer = int(edges.source[edge]), strength * float(edges.share[edge])
            if longer * best[source] > 0:
                step = 1 if edges.weight[edge] > 0 else -1
                heappush(queue, (-longer * best[source], (source, *path), longer, sign * step))
    return found


def _best_from(edges: Edges, best: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Strength of the strongest way from an input, whose own is 1, to each node."""
    rank = edges.rank[edges.target]
    order = np.argsort(rank, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(rank[order])) + 1):
        np.maximum.at(best, edges.target[rows], edges.share[rows] * best[edges.source[rows]])
    return best
