"""Effects against a forward pass over the graph, and the sums that they must give."""

import numpy as np
import pytest

from crosslayer.attribution.effects import effects
from crosslayer.attribution.graph import AttributionGraph
from making_graphs import dense, random_graph


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
