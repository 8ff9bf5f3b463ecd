"""The record: what it refuses, that its rows close, and that what is saved is loaded."""

import json
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch

from crosslayer.attribution.graph import AttributionGraph, Picture
from crosslayer.attribution.node import KEYS, Node
from crosslayer.errors import UserError
from making_graphs import graph_of, random_graph

TOKEN = Node(kind="token", position=0, label="a")
FEATURE = Node(kind="feature", layer=1, position=0, feature=5)
TARGET = Node(kind="target", position=3, vocab=7, label=" yes", probability=0.5)


def changed(graph: AttributionGraph, **fields) -> AttributionGraph:
    return replace(graph, **fields)


def test_ids_of_different_nodes_never_collide():
    places = [None, 0, 1, 10]
    nodes = [
        Node(kind=kind, **dict(zip(("layer", "position", "feature"), place, strict=True)))
        for kind in KEYS
        for place in np.stack(np.meshgrid(*[[0, 1, 10, 11]] * 3), -1).reshape(-1, 3).tolist()
    ]
    of_error = {Node(kind="error", layer=layer, position=p).id for layer in places for p in (0, 1, 10)}
    keys = {(node.kind, *(getattr(node, name) for name in KEYS[node.kind])) for node in nodes}
    assert len({node.id for node in nodes}) == len(keys)
    assert len(of_error) == 12
    assert FEATURE.id == "feature/1/0/5"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "neuron"}, "kind 'neuron'; choose from token, patch"),
        ({"kind": "feature", "layer": 1, "feature": 3}, "kind feature has no position"),
        ({"kind": "token", "position": -1}, "position -1; a whole number from 0"),
    ],
)
def test_a_node_that_lacks_something_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Node(**fields)


def test_a_graph_whose_rows_close_says_so_and_one_that_does_not_says_by_how_much():
    graph = graph_of([TOKEN, FEATURE, TARGET], {(1, 0): 2.0, (2, 1): 3.0, (2, 0): 1.0}, [0, 0, 0.5])
    assert graph.scores.worst_row_gap == 0
    off = changed(graph, preactivation=torch.tensor([torch.nan, 2.5, 4.0]))
    assert off.scores.worst_row_gap == pytest.approx(0.2)
    assert random_graph(1).scores.worst_row_gap < 1e-6


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ({(1, 4): 1.0}, "graph of 4 nodes has no such node"),
        ({(1, 2): 1.0}, "edge from target/-/3/-/7/ yes to feature/1/0/5 does not run forward"),
        ({(2, 2): 1.0}, "does not run forward"),
        ({(3, 0): 1.0}, "edge runs to error/1/0; only features and targets have rows"),
        ({(2, 1): float("inf")}, "not finite"),
    ],
)
def test_impossible_edges_are_refused(edges, message):
    error = Node(kind="error", layer=1, position=0)
    good = graph_of([TOKEN, FEATURE, TARGET, error], {(2, 1): 3.0}, [0, 0, 0.5, 0])
    ((target, source), weight) = next(iter(edges.items()))
    ends = {"target": torch.tensor([target]), "source": torch.tensor([source]), "weight": torch.tensor([weight])}
    with pytest.raises(UserError, match=message):
        changed(good, **ends)


def test_what_is_there_twice_or_out_of_bounds_is_refused():
    graph = graph_of([TOKEN, FEATURE, TARGET], {(2, 1): 3.0, (2, 0): 1.0}, [0, 0, 0.5])
    with pytest.raises(UserError, match="token/0 is in the graph twice"):
        changed(graph, nodes=(TOKEN, TOKEN, TARGET))
    with pytest.raises(UserError, match="two edges run between the same nodes"):
        changed(graph, source=torch.tensor([1, 1]))
    with pytest.raises(UserError, match="beyond the model's 1 layers"):
        changed(graph, n_layers=1)
    with pytest.raises(UserError, match="a node other than a target"):
        changed(graph, target_weight=torch.tensor([0.5, 0, 0]))
    with pytest.raises(UserError, match=r"add up to 1\.5"):
        changed(graph, target_weight=torch.tensor([0, 0, 1.5]))


def test_what_is_saved_is_loaded(tmp_path):
    picture = Picture("data:image/png;base64,AA==", 16, 16, 1, 2)
    graph = changed(random_graph(2), picture=picture, left_out="features past the 100th", prompt="naïve ☃")
    graph.save(tmp_path / "g.json")
    loaded = AttributionGraph.load(tmp_path / "g.json")
    for name in (field.name for field in fields(loaded)):
        value = getattr(loaded, name)
        same = (
            torch.equal(value.nan_to_num(), getattr(graph, name).nan_to_num())
            if torch.is_tensor(value)
            else (value == getattr(graph, name))
        )
        assert same, name
    assert loaded.scores == graph.scores
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.json", "g.safetensors"]


def test_the_file_holds_what_the_format_promises(tmp_path):
    graph = random_graph(3)
    graph.save(tmp_path / "g.json")
    record = json.loads((tmp_path / "g.json").read_text())
    assert record["schema"] == 1
    assert {"prompt", "tokens", "targets", "scores", "nodes"} <= set(record)
    assert {"replacement_score", "completeness_score", "worst_row_gap", "left_out"} <= set(record["scores"])
    wanted = {"id", "kind", "layer", "position", "feature", "activation", "influence", "box"}
    assert all(wanted <= set(node) for node in record["nodes"])
    influence = [node["influence"] for node in record["nodes"]]
    assert influence == pytest.approx(graph.influence.node.tolist())
    assert set(record["targets"]) == {node.id for node in graph.nodes if node.kind == "target"}


def damage(path, **fields):
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema": 7}, "graph schema 7, this crosslayer reads 1"),
        ({"nodes": [{"kind": "token"}]}, "damaged"),
        ({"nodes": []}, "damaged"),
        ({"tokens": 3}, "damaged"),
        ({"edges_sha256": "0"}, "not the edges of g.json"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, fields, message):
    random_graph(4).save(tmp_path / "g.json")
    damage(tmp_path / "g.json", **fields)
    with pytest.raises(UserError, match=message):
        AttributionGraph.load(tmp_path / "g.json")


def test_edges_that_are_cut_off_or_missing_are_refused(tmp_path):
    random_graph(5).save(tmp_path / "g.json")
    edges = tmp_path / "g.safetensors"
    edges.write_bytes(edges.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"g\.safetensors: cannot be read"):
        AttributionGraph.load(tmp_path / "g.json")
    with pytest.raises(UserError, match=r"h\.json: no such file"):
        AttributionGraph.load(tmp_path / "h.json")
    with pytest.raises(UserError, match=r"ends in \.json"):
        random_graph(5).save(tmp_path / "g")


def test_a_graph_without_edges_has_no_scores_and_is_saved_all_the_same(tmp_path):
    graph = graph_of([TOKEN, TARGET], {}, [0, 0.5])
    graph.save(tmp_path / "g.json")
    scores = AttributionGraph.load(tmp_path / "g.json").scores
    assert np.isnan(scores.replacement_score)
    assert json.loads((tmp_path / "g.json").read_text())["scores"]["replacement_score"] is None
    assert asdict(scores)["worst_row_gap"] == 0
