"""Paths against their enumeration."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslayer.attribution.node import Node
from crosslayer.attribution.paths import path_lengths, top_paths
from making_graphs import dense, graph_of, published, random_graph


def every_path(graph) -> list[tuple[float, int, tuple[str, ...]]]:
    """Strength, sign and ids of all paths from inputs to targets, by walking back along every edge."""
    matrix = dense(graph)
    share = np.abs(matrix) / np.maximum(np.abs(matrix).sum(1, keepdims=True), 1e-300)
    found = []

    def walk(path, strength, sign):
        if graph.nodes[path[0]].kind in ("token", "patch"):
            found.append((strength, sign, tuple(graph.nodes[i].id for i in path)))
        for source in np.flatnonzero(matrix[path[0]]):
            step = int(np.sign(matrix[path[0], source]))
            walk((source, *path), strength * share[path[0], source], sign * step)

    for i, weight in enumerate(graph.target_weight.double().tolist()):
        if weight:
            walk((i,), weight, 1)
    return sorted(found, reverse=True)


@given(st.integers(0, 10_000))
def test_the_top_paths_are_those_of_all_that_there_are(seed):
    graph = random_graph(seed, features=3, density=0.6)
    wanted = every_path(graph)[:20]
    found = [(path.strength, path.sign, path.nodes) for path in top_paths(graph, 20)]
    assert [path[1:] for path in found] == [path[1:] for path in wanted]
    assert np.allclose([path[0] for path in found], [path[0] for path in wanted])


@given(st.integers(0, 10_000))
def test_path_lengths_are_those_of_all_that_there_are(seed):
    graph = random_graph(seed, features=3, density=0.6)
    paths = every_path(graph)
    total = sum(strength for strength, _, _ in paths)
    lengths = path_lengths(graph)
    mean = sum(strength * (len(ids) - 1) for strength, _, ids in paths) / total if total else np.nan
    assert lengths.mean == pytest.approx(mean, nan_ok=True)
    assert total == 0 or lengths.share.sum() == pytest.approx(1)


def test_the_published_example_by_hand():
    lengths = path_lengths(published())
    assert lengths.share.tolist() == pytest.approx([0, 0, 0.6, 0.4])
    assert lengths.mean == pytest.approx(2.4)
    first = top_paths(published(), 1)[0]
    assert first.nodes == ("token/0", "feature/1/0/1", "target/-/1/-/0/c")
    assert (first.strength, first.sign) == (pytest.approx(1 / 8), 1)


def test_paths_to_one_target_count_it_fully_and_a_path_of_two_suppressions_raises():
    nodes = [
        Node(kind="token", position=0),
        Node(kind="feature", layer=0, position=0, feature=1),
        Node(kind="target", position=0, vocab=1, label="x"),
        Node(kind="target", position=0, vocab=2, label="y"),
    ]
    graph = graph_of(nodes, {(1, 0): -1.0, (2, 1): -3.0, (2, 0): -1.0, (3, 0): 1.0}, [0, 0, 0.3, 0.7])
    paths = top_paths(graph, 5, targets=(nodes[2].id,))
    assert [(path.strength, path.sign, len(path.nodes)) for path in paths] == [(0.75, 1, 3), (0.25, -1, 2)]


def test_a_graph_without_inputs_has_no_paths():
    graph = graph_of([Node(kind="error", position=0), Node(kind="target", position=0)], {(1, 0): 1.0}, [0, 1.0])
    assert top_paths(graph) == []
    assert np.isnan(path_lengths(graph).mean)
