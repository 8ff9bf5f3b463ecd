"""The figure: it says what it draws, opens offline, and nothing in a prompt can break out of it."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from crosslayer.attribution.figure import figure, write_figure
from crosslayer.attribution.graph import Picture
from crosslayer.attribution.layout import arrange, chosen
from crosslayer.attribution.node import Node
from making_graphs import graph_of, random_graph

PICTURE = Picture("data:image/png;base64,AA==", 16, 32, 4, 1)


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def having(self, attribute: str) -> list[str]:
        return [attrs[attribute] for _, attrs in self.tags if attribute in attrs]


def test_every_node_that_is_drawn_has_its_details_and_every_edge_its_ends():
    graph = replace(random_graph(1, features=8), picture=PICTURE)
    text = figure(graph)
    page, details = Page(text), json.loads(re.search(r"const details = (.*);", text)[1])
    nodes = set(page.having("data-node"))
    assert nodes == set(details)
    assert {end for ends in page.having("data-ends") for end in ends.split()} <= nodes
    strongest = int(np.argmax(np.where(graph.of_kind("feature"), graph.influence.node, 0)))
    row = graph.edges.target == strongest
    first = details[str(strongest)]["in"][0]
    assert abs(first[2]) == pytest.approx(np.abs(graph.edges.weight[row]).max())
    assert first[1] == graph.captions[first[0]]


def test_the_figure_opens_offline():
    graph = replace(random_graph(2), picture=PICTURE)
    links = [value for _, attrs in Page(figure(graph)).tags for name, value in attrs.items() if name in ("src", "href")]
    assert set(links) <= {PICTURE.uri, "#picture"}
    assert not re.search(r"https?://|@import|url\(", figure(graph))


def test_text_of_a_prompt_stays_text():
    evil = "</script><script>alert(1)</script>"
    nodes = [Node(kind="token", position=0, label=evil), Node(kind="target", position=0, label=evil)]
    page = figure(graph_of(nodes, {(1, 0): 1.0}, [0, 1.0], prompt=evil, tokens=(evil,)))
    assert "<script>alert" not in page
    assert page.count("</script>") == 1


def test_only_the_strongest_are_drawn_and_the_figure_says_so():
    graph = random_graph(3, features=20)
    drawn = chosen(graph, 10)
    inner = graph.of_kind("feature", "error")
    kept = [i for i in drawn if inner[i]]
    assert len(kept) == 10
    assert min(graph.influence.node[kept]) >= max(graph.influence.node[np.setdiff1d(np.flatnonzero(inner), kept)])
    page = figure(graph, 10, 25)
    assert len(Page(page).having("data-ends")) == 25
    assert f"{len(drawn)} of {len(graph.nodes)} nodes and 25 of {len(graph.target):,} edges are drawn" in page


@pytest.mark.parametrize("features", [0, 2, 100])
def test_no_two_nodes_lie_on_each_other_and_layers_run_up(features):
    graph = random_graph(4, features)
    layout = arrange(graph, chosen(graph, 300))
    places = list(layout.places.values())
    assert len(set(places)) == len(places)
    assert all(0 < x < layout.width and 0 < y < layout.height for x, y in places)
    for i, (_, y) in layout.places.items():
        if graph.nodes[i].layer is not None and graph.nodes[i].kind in ("feature", "error"):
            top, bottom = layout.layers[graph.nodes[i].layer]
            assert top < y < bottom
    assert layout.layers[2][1] == layout.layers[1][0]
    assert max(layout.columns[p] for p in (2, 3)) < min(layout.columns[p] for p in (0, 1)), "the picture comes first"


def test_a_patch_that_a_later_layer_reads_stands_in_its_row():
    nodes = [Node(kind="patch", layer=layer, position=0, box=(0, 0, 8, 8)) for layer in (None, 0, 1)]
    graph = graph_of(
        [*nodes, Node(kind="target", position=3, label="x")], {(3, i): 1.0 for i in range(3)}, [0, 0, 0, 1.0]
    )
    heights = [arrange(graph, chosen(graph, 9)).places[i][1] for i in range(3)]
    assert heights[0] > heights[1] > heights[2]
    assert figure(replace(graph, picture=PICTURE)).count('<use href="#picture"/>') == 3


def test_a_graph_of_nothing_but_a_target_has_a_figure(tmp_path):
    write_figure(graph_of([Node(kind="target", position=0, label="x")], {}, [1.0]), tmp_path / "deep" / "g.html")
    assert "There are none" in (tmp_path / "deep" / "g.html").read_text()
