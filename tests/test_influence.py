"""Influence and scores against a dense inverse, the published example, and numbers worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslayer.attribution.node import Node
from making_graphs import dense, graph_of, published, random_graph


def dense_influence(graph) -> tuple[np.ndarray, np.ndarray]:
    """A, and w B by the inverse, in float64."""
    magnitude = np.abs(dense(graph))
    A = magnitude / np.maximum(magnitude.sum(1, keepdims=True), 1e-300)
    w = graph.target_weight.double().numpy()
    return A, w @ (np.linalg.inv(np.eye(len(w)) - A) - np.eye(len(w)))


def test_the_published_example_of_12_nodes():
    twelfths = [1, 4, 0, 3, 0, 0, 4, 0, 3, 3, 2, 0]
    assert np.allclose(published().influence.node, np.array(twelfths) / 12)


def test_the_published_example_after_its_nodes_were_pruned():
    graph = published(pruned=True)
    wanted = np.zeros((12, 12))
    wanted[11, [1, 3, 6, 8]], wanted[3, [1, 6]], wanted[1, [9, 10]] = 1 / 4, 1 / 8, 3 / 16
    edge = np.zeros((12, 12))
    edge[graph.edges.target, graph.edges.source] = graph.influence.edge
    assert np.allclose(edge, wanted)


@given(st.integers(0, 10_000), st.integers(0, 8), st.floats(0, 1))
def test_influence_is_that_of_the_dense_inverse(seed, features, density):
    graph = random_graph(seed, features, density)
    A, node = dense_influence(graph)
    assert np.allclose(graph.influence.node, node, atol=1e-12)
    edges = (
        A[graph.edges.target, graph.edges.source] * (node + graph.target_weight.double().numpy())[graph.edges.target]
    )
    assert np.allclose(graph.influence.edge, edges, atol=1e-12)


@given(st.integers(0, 10_000))
def test_influence_is_conserved(seed):
    graph = random_graph(seed, density=1.0)
    leaves = np.bincount(graph.edges.target, minlength=len(graph.nodes)) == 0
    assert graph.influence.node[leaves].sum() == pytest.approx(graph.target_weight.double().sum().item())
    assert np.allclose(graph.edges.out_of(graph.influence.edge), graph.influence.node)
    assert not graph.influence.node[graph.of_kind("bias")].any()


@given(st.integers(0, 10_000), st.floats(0.2, 1))
def test_scores_are_those_of_dense_matrices(seed, density):
    graph = random_graph(seed, density=density)
    A, node = dense_influence(graph)
    inputs, errors = node[graph.of_kind("token", "patch")].sum(), node[graph.of_kind("error")].sum()
    through = node + graph.target_weight.double().numpy()
    complete = ((1 - A[:, graph.of_kind("error")].sum(1)) * through).sum() / through.sum()
    assert graph.scores.replacement_score == pytest.approx(inputs / (inputs + errors), nan_ok=True)
    assert graph.scores.completeness_score == pytest.approx(complete)


def test_scores_of_a_small_graph_by_hand():
    nodes = [
        Node(kind="token", position=0),
        Node(kind="bias", layer=0),
        Node(kind="error", layer=0, position=0),
        Node(kind="feature", layer=0, position=0, feature=1),
        Node(kind="feature", layer=1, position=0, feature=2),
        Node(kind="target", position=0, vocab=1),
    ]
    edges = {(3, 0): 2.0, (3, 1): 5.0, (5, 3): -3.0, (5, 2): 1.0, (5, 4): 1.0, (5, 1): -9.0}
    graph = graph_of(nodes, edges, [0, 0, 0, 0, 0, 1.0])
    assert graph.influence.node.tolist() == pytest.approx([0.6, 0, 0.2, 0.6, 0.2, 0])
    assert graph.scores.replacement_score == pytest.approx(0.6 / 0.8)
    assert graph.scores.completeness_score == pytest.approx((1.6 + 0.8) / 2.6)
    assert graph.scores.left_out == pytest.approx(0.2)
