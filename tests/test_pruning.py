"""Pruning: what stays, and that every row still closes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosslayer.attribution.node import Node
from crosslayer.errors import UserError
from making_graphs import dense, graph_of, published, random_graph


def test_the_published_example_loses_what_carries_little():
    pruned = published().prune(0.8, 1.0)
    kept = {node.feature for node in pruned.nodes if node.kind == "feature"}
    assert kept == {1, 3, 6, 8}
    assert {node.position for node in pruned.nodes if node.kind == "token"} == {0, 1}
    row = dense(pruned)[pruned.index["feature/2/0/3"]]
    assert {pruned.nodes[i].id for i in np.flatnonzero(row)} == {"feature/1/0/1", "feature/0/0/6", "error/0/0"}


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_every_row_closes_before_and_after(seed, node_threshold, edge_threshold):
    graph = random_graph(seed)
    pruned = graph.prune(node_threshold, edge_threshold)
    assert pruned.scores.worst_row_gap < 1e-6
    for id, row in zip((node.id for node in pruned.nodes), dense(pruned, biases=True), strict=True):
        if id in graph.index:
            before = dense(graph, biases=True)[graph.index[id]].sum()
            assert row.sum() == pytest.approx(before, abs=1e-5)
            assert torch.equal(
                pruned.preactivation[pruned.index[id]].nan_to_num(), graph.preactivation[graph.index[id]].nan_to_num()
            )


def dense_pruning(graph, node_threshold: float, edge_threshold: float) -> set[tuple[str, str]]:
    """The edges (target, source) between nodes kept, by matrices and a list sorted by hand."""

    def spread(matrix):
        A = np.abs(matrix) / np.maximum(np.abs(matrix).sum(1, keepdims=True), 1e-300)
        w = graph.target_weight.double().numpy()
        return A, w @ np.linalg.inv(np.eye(len(w)) - A)

    def carriers(scores, threshold):
        order, carried, chosen = np.argsort(-scores, axis=None), 0.0, np.zeros(scores.size, bool)
        for i in order:
            if carried >= threshold * scores.sum() and chosen.any():
                break
            chosen[i], carried = True, carried + scores.flat[i]
        return chosen.reshape(scores.shape)

    matrix, features = dense(graph), graph.of_kind("feature")
    fixed = ~features & ~graph.of_kind("error")
    had_row = features & matrix.any(1)
    nodes = fixed | carriers(spread(matrix)[1] - graph.target_weight.double().numpy(), node_threshold)
    A, through = spread(matrix * np.outer(nodes, nodes))
    edges = carriers(A * through[:, None], edge_threshold) & (A > 0)
    for _ in nodes:
        edges &= np.outer(nodes, nodes)
        nodes = nodes & (fixed | edges.any(0)) & (~had_row | edges.any(1))
    return {(graph.nodes[t].id, graph.nodes[s].id) for t, s in zip(*edges.nonzero(), strict=True)}


@given(st.integers(0, 10_000), st.floats(0.1, 0.99), st.floats(0.1, 0.99))
def test_what_is_kept_is_what_matrices_say(seed, node_threshold, edge_threshold):
    graph = random_graph(seed)
    pruned = graph.prune(node_threshold, edge_threshold)
    made = {"error", "bias"}
    kept = {
        (pruned.nodes[t].id, pruned.nodes[s].id)
        for t, s in zip(pruned.target.tolist(), pruned.source.tolist(), strict=True)
        if pruned.nodes[s].kind not in made
    }
    wanted = dense_pruning(graph, node_threshold, edge_threshold)
    assert kept == {(target, source) for target, source in wanted if source.split("/")[0] not in made}


def test_pruned_mass_joins_the_error_of_its_layer_and_position():
    nodes = [
        Node(kind="token", position=0),
        Node(kind="feature", layer=0, position=1, feature=1),
        Node(kind="feature", layer=0, position=1, feature=2),
        Node(kind="error", layer=0, position=1),
        Node(kind="feature", layer=1, position=0, feature=3),
        Node(kind="target", position=3, vocab=1),
    ]
    edges = {(1, 0): 1.0, (2, 0): 1.0, (4, 0): 1.0, (5, 1): 8.0, (5, 2): -0.5, (5, 3): 0.25, (5, 4): 0.125, (5, 0): 2.0}
    graph = graph_of(nodes, edges, [0, 0, 0, 0, 0, 1.0])
    keep_nodes = np.array([True, True, False, True, False, True])
    kept = graph.keep(keep_nodes, np.array([source != 0 or target != 5 for target, source in edges]))
    row = {
        kept.nodes[s].id: w
        for t, s, w in zip(kept.target, kept.source, kept.weight.tolist(), strict=True)
        if kept.nodes[t].kind == "target"
    }
    assert row == {"feature/0/1/1": 8.0, "error/0/1": -0.25, "error/1/0": 0.125, "error/-/0": 2.0}


def test_rows_of_a_graph_in_float64_close_to_its_precision():
    graph = random_graph(6, features=20)
    total = torch.from_numpy(graph.edges.into(graph.edges.weight))
    rows = torch.where(graph.preactivation.isnan(), torch.nan, total)
    exact = replace(graph, weight=graph.weight.double(), preactivation=rows)
    assert exact.prune(0.5, 0.5).scores.worst_row_gap < 1e-14


def test_keeping_everything_changes_nothing():
    graph = random_graph(7)
    same = graph.prune(1.0, 1.0).keep(*(np.ones(n, bool) for n in (len(graph.nodes), len(graph.target))))
    assert np.allclose(dense(same, biases=True).sum(), dense(graph, biases=True).sum(), atol=1e-4)
    everything = graph.keep(np.ones(len(graph.nodes), bool), np.ones(len(graph.target), bool))
    assert {n.id for n in everything.nodes} <= set(graph.index)
    assert len(everything.target) == len(graph.target)
    assert everything.scores.replacement_score == pytest.approx(graph.scores.replacement_score)


def test_pruning_lowers_the_scores_as_pruned_mass_is_error():
    graph = random_graph(8, features=20)
    assert graph.prune(0.5, 0.5).scores.replacement_score < graph.scores.replacement_score


@pytest.mark.parametrize("thresholds", [{"node_threshold": 1.2}, {"edge_threshold": -0.1}])
def test_a_threshold_that_is_no_share_is_refused(thresholds):
    with pytest.raises(UserError, match=rf"{next(iter(thresholds))} is .*; choose a share of influence from 0 to 1"):
        random_graph(9).prune(**thresholds)
