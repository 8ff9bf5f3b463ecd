"""The summary and the networkx graph say what the record says."""

from dataclasses import replace

import networkx
import pytest

from crosslayer.attribution.networks import to_networkx
from crosslayer.attribution.node import Node
from crosslayer.attribution.summary import summary
from making_graphs import graph_of, published, random_graph


def test_the_summary_of_the_published_example():
    lines = [line.strip() for line in summary(replace(published(), left_out="rows past the 5th")).splitlines()]
    assert lines[1] == "9 features, 2 tokens, 1 target; 10 edges"
    assert lines[2] == "replacement score 1.000, completeness score 1.000"
    assert lines[3].endswith("left out: 58.3% of influence (rows past the 5th)")
    assert lines[4] == "path length 2.40 on average (2: 60%, 3: 40%)"
    assert '1.000  output "c"' in lines
    assert '12.5% +  "a" (0) -> layer 1 feature 1 at "a" (0) -> output "c"' in lines
    assert '33.3%  layer 1 feature 1 at "a" (0), active at 10' in lines


def test_a_summary_without_paths_leaves_them_out():
    text = summary(graph_of([Node(kind="target", position=0, label="x")], {}, [1.0]))
    assert "paths" not in text
    assert "replacement score nan" in text


def test_a_patch_gives_its_position_its_name():
    graph = random_graph(1)
    assert graph.captions[graph.index["patch/-/2"]] == "patch 2 (2)"
    assert graph.captions[graph.index["error/1/2"]] == "layer 1 error at patch 2 (2)"
    assert graph.captions[graph.index["bias/0/-"]] == "bias layer 0"


def test_networkx_gets_every_node_and_edge_and_agrees_on_the_paths():
    graph = random_graph(2)
    network = to_networkx(graph)
    assert networkx.is_directed_acyclic_graph(network)
    assert set(network) == set(graph.index)
    assert network.number_of_edges() == len(graph.target)
    for id in ("target/-/3/-/7/ yes", "error/0/1"):
        incoming = sum(data["weight"] for _, _, data in network.in_edges(id, data=True))
        rows = graph.preactivation.nan_to_num()[graph.index[id]].item()
        assert incoming == pytest.approx(rows, abs=1e-5)
    outgoing = sum(data["influence"] for _, _, data in network.out_edges("token/1", data=True))
    assert outgoing == pytest.approx(network.nodes["token/1"]["influence"])
