"""Supernodes: features of like edges are found, and merging adds up."""

import numpy as np
import pytest

from crosslayer.attribution.node import Node
from crosslayer.attribution.supernodes import merge, propose_supernodes
from crosslayer.errors import UserError
from making_graphs import graph_of, random_graph


def two_circuits():
    """Features 0-2 read token 0 and raise the first target, 3-5 read token 1 and raise the second."""
    nodes = [Node(kind="token", position=p) for p in range(2)]
    nodes += [Node(kind="feature", layer=f % 3, position=0, feature=f) for f in range(6)]
    nodes += [Node(kind="target", position=1, vocab=v, label="xy"[v]) for v in range(2)]
    edges = {(2 + f, f // 3): 1.0 + 0.1 * f for f in range(6)}
    edges |= {(8 + f // 3, 2 + f): 2.0 - 0.1 * f for f in range(6)}
    return graph_of(nodes, edges, [0.0] * 8 + [0.6, 0.4])


def test_features_of_like_edges_are_proposed_together_and_others_apart():
    groups = propose_supernodes(two_circuits())
    assert [{id.split("/")[-1] for id in group} for group in groups] == [{"0", "1", "2"}, {"3", "4", "5"}]


def test_an_edge_of_the_opposite_sign_sets_a_feature_apart():
    graph = two_circuits()
    graph.weight[graph.index["feature/2/0/2"] - 2] *= -1
    assert {len(group) for group in propose_supernodes(graph, 0.6)} == {2, 3}


def test_a_group_may_be_as_unlike_as_the_similarity_allows():
    graph = random_graph(3, features=10)
    assert propose_supernodes(graph, 1.0) == []
    assert len(propose_supernodes(graph, -1.0)[0]) == 30
    assert propose_supernodes(graph_of([Node(kind="token", position=0)], {}, [0.0])) == []


def test_merging_adds_up_influence_and_edges():
    graph = two_circuits()
    merged = merge(graph, dict(zip(("sees x", "sees y"), propose_supernodes(graph), strict=True)))
    assert merged.names == ("token/0", "token/1", "sees x", "sees y", "target/-/1/-/0/x", "target/-/1/-/1/y")
    assert merged.influence.tolist() == pytest.approx([0.6, 0.4, 0.6, 0.4, 0, 0])
    ends = [merged.names[t] + " <- " + merged.names[s] for t, s in zip(merged.target, merged.source, strict=True)]
    links = dict(zip(ends, merged.weight.tolist(), strict=True))
    assert links == {
        "sees x <- token/0": pytest.approx(0.6),
        "sees y <- token/1": pytest.approx(0.4),
        "target/-/1/-/0/x <- sees x": pytest.approx(0.6),
        "target/-/1/-/1/y <- sees y": pytest.approx(0.4),
    }


def test_merging_nothing_keeps_every_edge():
    graph = random_graph(4)
    merged = merge(graph, {})
    assert merged.names == tuple(node.id for node in graph.nodes)
    assert np.abs(merged.weight).sum() == pytest.approx(graph.influence.edge.sum())


@pytest.mark.parametrize(
    ("groups", "message"),
    [({"a": ["x"]}, "group a: x is no node"), ({"a": ["token/0"], "b": ["token/0"]}, "is in group a already")],
)
def test_groups_that_do_not_fit_are_refused(groups, message):
    with pytest.raises(UserError, match=message):
        merge(random_graph(5), groups)
