"""Effects against a forward pass over the graph, and the sums that they must give."""

import numpy as np
import pytest

from crosslayer.attribution.effects import effects
from crosslayer.attribution.graph import AttributionGraph
from crosslayer.attribution.node import Node
from making_graphs import dense, graph_of, random_graph


def left_of_targets(graph: AttributionGraph, removed: int) -> float:
    """The targets' value once a node is gone and all features follow: a share of each is left, from the bottom up."""
    weights, total = dense(graph, biases=True), dense(graph, biases=True).sum(1)
    left = np.ones(len(graph.nodes))
    for i in np.argsort(graph.rank, kind="stable"):
        if i == removed:
            left[i] = 0.0
        elif total[i] and graph.nodes[i].kind == "feature":
            left[i] = weights[i] @ left / total[i]
    return float(graph.target_weight.double().numpy() @ weights @ left)


@pytest.mark.parametrize("seed", range(4))
def test_an_effect_is_what_a_removal_takes_from_the_targets(seed):
    graph = random_graph(seed)
    whole = left_of_targets(graph, -1)
    wanted = [whole - left_of_targets(graph, i) for i in range(len(graph.nodes))]
    wanted = np.where(graph.of_kind("target"), 0.0, wanted)
    assert np.abs(wanted).max() > 0.1
    assert np.allclose(effects(graph).node, wanted)


@pytest.mark.parametrize("seed", range(4))
def test_effects_add_up(seed):
    graph = random_graph(seed)
    found, edges = effects(graph), graph.edges
    value = graph.target_weight.double().numpy() @ edges.into(edges.weight)
    roots = edges.into(np.ones(len(edges.weight))) == 0
    assert np.isclose(found.node[roots].sum(), value)
    assert np.allclose(edges.out_of(found.edge), found.node)


def through(shares: np.ndarray, worth: np.ndarray, preactivations: np.ndarray, *, pooled: bool) -> float:
    """A source's effect through a feature at n positions: it gives shares of each, whose units are worth so much."""
    into, out = shares * preactivations, worth * preactivations
    rest = preactivations - into
    if pooled:
        into, rest, out = into.sum(keepdims=True), rest.sum(keepdims=True), out.sum(keepdims=True)
    n = len(into)
    nodes = [Node(kind="feature", layer=0, position=0, feature=0), Node(kind="token", position=0)]
    nodes += [Node(kind="feature", layer=1, position=p, feature=0) for p in range(n)]
    nodes.append(Node(kind="target", position=3, vocab=0))
    edges = {(2 + p, 0): into[p] for p in range(n)} | {(2 + p, 1): rest[p] for p in range(n)}
    edges |= {(n + 2, 2 + p): out[p] for p in range(n)}
    return effects(graph_of(nodes, edges, [0.0] * (n + 2) + [1.0])).node[0]


@pytest.mark.parametrize("seed", range(4))
def test_an_effect_through_a_pooled_feature_lacks_the_covariance_of_its_positions(seed):
    rng = np.random.default_rng(seed)
    shares, worth, preactivations = rng.normal(size=4), rng.normal(size=4), rng.random(4) + 0.1
    exact, found = (through(shares, worth, preactivations, pooled=pooled) for pooled in (False, True))
    lacks = preactivations.sum() * np.cov(shares, worth, ddof=0, aweights=preactivations)[0, 1]
    assert abs(lacks) > 0.01
    assert found == pytest.approx(exact - lacks, rel=1e-5, abs=1e-6)
    for alike in ((np.full(4, 0.3), worth), (shares, np.full(4, -2.0))):
        exact, found = (through(*alike, preactivations, pooled=pooled) for pooled in (False, True))
        assert found == pytest.approx(exact, rel=1e-5)
