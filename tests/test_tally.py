"""One graph by roles against sums over its nodes and edges, one at a time."""

from collections import defaultdict

import numpy as np
import pytest

from crosslayer import UserError
from crosslayer.attribution.effects import effects
from crosslayer.attribution.node import Node
from crosslayer.attribution.roles import places, roles
from crosslayer.attribution.tally import Pruning, Tally, read_tally, tally, write_tally
from making_graphs import graph_of, random_graph


def test_places_are_told_from_the_answer_the_patches_and_the_target():
    nodes = [Node(kind="patch", position=p, label="") for p in (1, 2)]
    nodes += [Node(kind="token", position=p, vocab=0) for p in (0, 3, 4, 5, 6)]
    nodes += [Node(kind="target", position=6, label="x")]
    graph = graph_of(nodes, {}, [0.0] * 7 + [1.0], tokens=tuple("abcdefg"))
    assert places(graph, 0, {}) == ["prompt", "image", "image", "prompt", "prompt", "prompt", "last"]
    named = places(graph, 2, {1: "lead"})
    assert named == ["prompt", "image", "lead", "prompt", "prompt", "answer", "last"]


@pytest.mark.parametrize("seed", range(3))
def test_a_tally_is_the_sum_over_the_nodes_and_edges_of_each_role(seed):
    graph = random_graph(seed, features=8)
    found, given, effect = tally(graph, token=2), roles(graph, 2), effects(graph)
    nodes, edges = defaultdict(float), defaultdict(float)
    for i, role in enumerate(given):
        nodes[role] += graph.influence.node[i]
    chosen = graph.selection(0.8, 0.98)
    for e in np.flatnonzero(chosen.edges):
        ends = given[graph.source[e]], given[graph.target[e]]
        edges[ends] += effect.edge[e]
    assert len(nodes) < len(graph.nodes)
    assert dict(zip(found.roles, found.influence, strict=True)) == pytest.approx(nodes)
    ends = zip(found.source, found.target, strict=True)
    listed = dict(zip([(found.roles[s], found.roles[t]) for s, t in ends], found.edge_effect, strict=True))
    assert listed == pytest.approx({key: value for key, value in edges.items() if value})
    left_out = 1 - graph.influence.edge[chosen.edges].sum() / graph.influence.edge.sum()
    assert found.edges_left_out == pytest.approx(left_out)


def test_what_a_circuit_keeps_is_what_pruning_keeps():
    graph = random_graph(5, features=8)
    found = tally(graph, pruning=Pruning(node_threshold=0.6))
    kept = {role for role, yes in zip(found.roles, found.kept, strict=True) if yes and role.kind == "feature"}
    pruned = graph.prune(0.6, 0.98)
    assert kept == {role for role in roles(pruned) if role.kind == "feature"}
    assert len(kept) < sum(role.kind == "feature" for role in found.roles)


def test_a_tally_comes_back_from_disk_and_nothing_else_in_its_place(tmp_path):
    found, file = tally(random_graph(2), "one", "set"), tmp_path / "one.json"
    write_tally(file, found, {"run": "runs/a 12", "token": 0})
    again = read_tally(file, {"run": "runs/a 12", "token": 0})
    for name in Tally.__dataclass_fields__:
        assert np.all(np.asarray(getattr(again, name)) == np.asarray(getattr(found, name))), name
    with pytest.raises(UserError, match="run = runs/a 12, now runs/b 34"):
        read_tally(file, {"run": "runs/b 34", "token": 0})
    file.write_text("{}")
    with pytest.raises(UserError, match="schema None"):
        read_tally(file, {})
