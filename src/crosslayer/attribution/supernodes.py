"""Groups of features that play the same part, proposed and then merged by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import csr_matrix, diags_array
from scipy.spatial.distance import squareform

from crosslayer.attribution.graph import AttributionGraph
from crosslayer.attribution.influence import sums
from crosslayer.errors import UserError

MOST_FEATURES = 4000
"""What is clustered at once: their distances take half a gigabyte."""


@dataclass(frozen=True, eq=False)
class Merged:
    """A graph whose nodes are groups; those of one node keep its id."""

    names: tuple[str, ...]
    members: tuple[tuple[str, ...], ...]
    """Ids of the nodes of each group."""
    influence: Float[np.ndarray, " groups"]
    """Sum of the members' influence."""
    target: Int[np.ndarray, " pairs"]
    source: Int[np.ndarray, " pairs"]
    weight: Float[np.ndarray, " pairs"]
    """Sum of the influence of the edges from one group to another, each with its weight's sign."""


def propose_supernodes(graph: AttributionGraph, similarity: float = 0.5) -> list[tuple[str, ...]]:
    """Groups of two or more features with like edges in and out, as ids; largest influence first.

    Each feature has two vectors, its incoming edges and its outgoing ones, signed, as shares of influence. Features
    are joined by average linkage while the mean of the two cosines is at least `similarity`.

    Args:
        graph: a pruned graph, best.
        similarity: -1 ... 1; higher makes smaller groups.

    Raises:
        UserError: for more than 4,000 features.
    """
    features = np.flatnonzero(graph.of_kind("feature"))
    if len(features) > MOST_FEATURES:
        raise UserError(f"{len(features)} features are too many to group; prune the graph to {MOST_FEATURES} first")
    if len(features) < 2:
        return []
    distance = np.clip(1 - _likeness(graph, features), 0, 2)
    np.fill_diagonal(distance, 0)
    labels = fcluster(linkage(squareform(distance, checks=False), "average"), 1 - similarity, "distance")
    groups = [features[labels == label] for label in np.unique(labels)]
    groups.sort(key=lambda group: -graph.influence.node[group].sum())
    return [tuple(graph.nodes[i].id for i in group) for group in groups if len(group) > 1]


def merge(graph: AttributionGraph, groups: Mapping[str, Sequence[str]]) -> Merged:
    """The graph with each group of nodes taken as one.

    Args:
        graph: any.
        groups: name to ids of its members.

    Raises:
        UserError: for an id that the graph lacks or that is in two groups.
    """
    group_of: dict[str, str] = {}
    for name, ids in groups.items():
        for id in ids:
            if id not in graph.index:
                raise UserError(f"group {name}: {id} is no node of this graph")
            if id in group_of:
                raise UserError(f"group {name}: {id} is in group {group_of[id]} already")
            group_of[id] = name
    names = tuple(dict.fromkeys(group_of.get(node.id, node.id) for node in graph.nodes))
    place = {name: i for i, name in enumerate(names)}
    number = np.array([place[group_of.get(node.id, node.id)] for node in graph.nodes], np.int64)
    members: list[list[str]] = [[] for _ in names]
    for node, i in zip(graph.nodes, number, strict=True):
        members[i].append(node.id)
    influence = sums(number, graph.influence.node, len(names))
    return Merged(names, tuple(map(tuple, members)), influence, *_between(graph, number, len(names)))


def _between(
    graph: AttributionGraph, number: Int[np.ndarray, " N"], n_groups: int
) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"], Float[np.ndarray, " pairs"]]:
    """Edges between different groups, added up."""
    edges = graph.causes
    target, source = number[edges.target], number[edges.source]
    apart = target != source
    pairs, where = np.unique(target[apart] * n_groups + source[apart], return_inverse=True)
    signed = (graph.influence.edge * np.sign(edges.weight))[apart]
    return *np.divmod(pairs, n_groups), sums(where, signed, len(pairs))


def _likeness(graph: AttributionGraph, features: Int[np.ndarray, " F"]) -> Float[np.ndarray, "F F"]:
    """Mean of the cosines of two features' incoming edges and of their outgoing ones."""
    edges, n = graph.causes, len(graph.nodes)
    signed = graph.influence.edge * np.sign(edges.weight)
    matrix = csr_matrix((signed, (edges.target, edges.source)), shape=(n, n))
    return (_cosines(matrix[features]) + _cosines(csr_matrix(matrix.T)[features])) / 2


def _cosines(rows: csr_matrix) -> Float[np.ndarray, "F F"]:
    norms = np.sqrt(np.asarray(rows.multiply(rows).sum(1)).ravel())
    unit = diags_array(np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)) @ rows
    return csr_matrix(unit @ unit.T).toarray()
