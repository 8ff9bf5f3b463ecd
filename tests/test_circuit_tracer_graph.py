"""circuit-tracer's graph JSON: every field, ids that do not collide, numbers that its viewer understands."""

import json

import numpy as np
import pytest

from crosslayer.attribution.node import Node
from crosslayer.errors import UserError
from crosslayer.formats.circuit_tracer_graph import write_circuit_tracer_graph
from making_graphs import graph_of, random_graph

FIELDS = {
    *("node_id", "feature", "layer", "ctx_idx", "feature_type", "token_prob", "is_target_logit", "run_idx"),
    *("reverse_ctx_idx", "jsNodeId", "clerp", "influence", "activation"),
}


def written(graph, tmp_path, **options) -> dict:
    return json.loads(write_circuit_tracer_graph(graph, tmp_path, "a-graph", **options).read_text())


def test_every_field_is_there_and_of_the_type_that_the_viewer_reads(tmp_path):
    graph = random_graph(1)
    record = written(graph, tmp_path, node_threshold=0.8)
    assert record["metadata"] == {
        "slug": "a-graph",
        "scan": "crosslayer",
        "transcoder_list": [],
        "prompt_tokens": ["a", "b", "patch 2", "patch 3"],
        "prompt": "a b c d",
        "node_threshold": 0.8,
        "schema_version": 1,
    }
    assert set(record["qParams"]) == {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"}
    for node in record["nodes"]:
        assert set(node) == FIELDS
        assert (type(node["feature"]), type(node["layer"]), type(node["ctx_idx"])) == (int, str, int)
        assert 0 <= node["ctx_idx"] < 4
        assert node["feature_type"] != "logit" or "(p=" in node["clerp"]
    assert len(record["nodes"]) == len(graph.nodes)
    assert sum(node["is_target_logit"] for node in record["nodes"]) == 1


def test_ids_are_unique_and_links_join_them(tmp_path):
    nodes = [
        Node(kind="feature", layer=layer, position=p, feature=f)
        for layer in range(3)
        for p in (0, 1)
        for f in (0, 1, 2)
    ]
    nodes += [Node(kind="error", layer=layer, position=p) for layer in (None, 0, 1, 2) for p in (0, 1)]
    nodes += [Node(kind="patch", layer=layer, position=p, vocab=9) for layer in (None, 0, 1) for p in (0, 1)]
    nodes += [Node(kind="bias", layer=layer) for layer in (None, 0, 1, 2)]
    targets = {"x": 1, "x - y": None, "y - x": None}
    nodes += [Node(kind="target", position=1, label=label, vocab=vocab) for label, vocab in targets.items()]
    graph = graph_of(nodes, {(len(nodes) - 1, 0): 2.5}, [0.0] * len(nodes))
    record = written(graph, tmp_path)
    ids = [node["node_id"] for node in record["nodes"]]
    assert len(set(ids)) == len(nodes)
    assert record["links"] == [{"source": "0_0_0", "target": ids[-1], "weight": 2.5}]


def test_each_kind_is_written_as_the_format_says(tmp_path):
    graph = random_graph(2)
    nodes = dict(zip(graph.index, written(graph, tmp_path)["nodes"], strict=True))
    feature = next(node for node in graph.nodes if node.kind == "feature" and node.layer == 2)
    as_written = nodes[feature.id]
    pair = 2 + feature.feature
    assert as_written["node_id"] == f"2_{feature.feature}_{feature.position}"
    assert as_written["feature"] == pair * (pair + 1) // 2 + feature.feature
    assert as_written["activation"] == feature.activation
    wanted = {
        "error/1/3": ("1_-1_3", -1, "1", "mlp reconstruction error"),
        "token/1": ("E_1_1", 1, "E", "embedding"),
        "patch/-/2": ("E_0_2", 2, "E", "embedding"),
        "bias/1/-": ("1_-2_x", -2, "1", "bias"),
        "target/-/3/-/7/ yes": ("4_7_3", 7, "4", "logit"),
    }
    for id, values in wanted.items():
        assert tuple(nodes[id][field] for field in ("node_id", "feature", "layer", "feature_type")) == values
    assert nodes["target/-/3/-/7/ yes"]["clerp"] == 'Output " yes" (p=0.600)'


def test_influence_is_the_cumulative_share_that_the_viewer_cuts_by(tmp_path):
    graph = random_graph(3)
    nodes = written(graph, tmp_path)["nodes"]
    influence = graph.influence.node
    for i in np.flatnonzero(graph.of_kind("feature") & (influence > 0)):
        assert nodes[i]["influence"] == pytest.approx(influence[influence >= influence[i]].sum() / influence.sum())


def test_the_viewer_hides_nothing_of_a_pruned_graph_at_first(tmp_path):
    nodes = written(random_graph(3).prune(0.7), tmp_path, node_threshold=0.7)["nodes"]
    shown = [node["influence"] is None or node["influence"] <= 0.7 for node in nodes]
    assert all(shown)
    assert max(node["influence"] or 0 for node in nodes) == pytest.approx(0.7)


def test_the_list_of_graphs_grows_and_replaces(tmp_path):
    for slug in ("one", "two", "one"):
        write_circuit_tracer_graph(random_graph(4), tmp_path, slug)
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert [graph["slug"] for graph in listed] == ["two", "one"]


def test_supernodes_are_named_by_their_ids(tmp_path):
    graph = random_graph(5)
    record = written(graph, tmp_path, supernodes={"words": ["token/0", "token/1"]})
    assert record["qParams"]["supernodes"] == [["words", "E_0_0", "E_1_1"]]
    with pytest.raises(UserError, match="supernode words: token/9 is no node"):
        written(graph, tmp_path, supernodes={"words": ["token/9"]})


def test_a_slug_that_leaves_the_folder_and_a_damaged_list_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"slug is '\.\./x'"):
        write_circuit_tracer_graph(random_graph(6), tmp_path, "../x")
    (tmp_path / "graph-metadata.json").write_text("[]")
    with pytest.raises(UserError, match="no list of graphs"):
        write_circuit_tracer_graph(random_graph(6), tmp_path, "x")
    assert not (tmp_path / "x.json").exists()
