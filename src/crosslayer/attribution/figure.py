"""An attribution graph as one HTML file that opens offline: inline SVG, hover for details."""

from dataclasses import dataclass
from importlib.resources import files
from math import isnan
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Int

from crosslayer.attribution.graph import AttributionGraph
from crosslayer.attribution.influence import ByNode
from crosslayer.attribution.layout import PATCH, Layout, arrange, chosen, radius
from crosslayer.attribution.node import Box, Node
from crosslayer.attribution.paths import Path as StrongPath
from crosslayer.attribution.paths import path_lengths, top_paths
from crosslayer.files import write_text

LISTED = 8
"""Edges that the details list each way."""


@dataclass(frozen=True)
class Mark:
    """A node as it is drawn."""

    number: int
    kind: str
    x: float
    y: float
    r: float
    label: str
    probability: str
    box: Box | None


@dataclass(frozen=True)
class Curve:
    """An edge as it is drawn."""

    target: int
    source: int
    path: str
    sign: str
    width: float
    opacity: float


def write_figure(graph: AttributionGraph, path: str | Path, most_nodes: int = 300, most_edges: int = 1200) -> None:
    """Write the figure. It says what it leaves out.

    Args:
        graph: a pruned graph, best.
        path: of the HTML file.
        most_nodes: how many features and errors to draw, the most influential first.
        most_edges: how many edges to draw, likewise.

    Raises:
        UserError: when the file system refuses.
    """
    write_text(Path(path), figure(graph, most_nodes, most_edges))


def figure(graph: AttributionGraph, most_nodes: int = 300, most_edges: int = 1200) -> str:
    """The page that `write_figure` writes."""
    drawn = chosen(graph, most_nodes)
    layout = arrange(graph, drawn)
    marks = _marks(graph, layout)
    edges = _strongest_edges(graph, drawn, most_edges)
    source = files("crosslayer.attribution").joinpath("figure.html.jinja").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    return page.render(
        graph=graph,
        layout=layout,
        marks=marks,
        curves=_curves(graph, layout, edges),
        stats=_stats(graph),
        missing=_missing(graph, drawn, edges),
        paths=[_path(graph, path) for path in top_paths(graph, 6)],
        details=_details(graph, drawn),
        heat=_heat(graph),
    )


def _strongest_edges(graph: AttributionGraph, drawn: list[int], most: int) -> list[int]:
    """The edges to draw, the strongest last, so that they lie on top."""
    inside = np.zeros(len(graph.nodes), bool)
    inside[drawn] = True
    seen = np.flatnonzero(inside[graph.edges.source] & inside[graph.edges.target] & (graph.influence.edge > 0))
    return seen[np.argsort(graph.influence.edge[seen], kind="stable")][-most:].tolist() if most else []


def _marks(graph: AttributionGraph, layout: Layout) -> list[Mark]:
    inner = graph.influence.node[graph.of_kind("feature", "error")]
    largest = float(inner.max(initial=0.0))
    marks = []
    for i, (x, y) in layout.places.items():
        node = graph.nodes[i]
        r = radius(min(float(graph.influence.node[i]), largest), largest)
        r = r if node.kind != "patch" else PATCH / 2 if node.layer is None else PATCH / 4
        chance = "" if node.probability is None else f"{node.probability:.2f}"
        marks.append(Mark(i, node.kind, round(x, 1), round(y, 1), round(r, 1), _written(node), chance, node.box))
    return marks


def _written(node: Node) -> str:
    """What stands beside a mark, at most 16 letters of it."""
    text = node.label.strip() or node.label
    return text if len(text) <= 16 else text[:15] + "…"


def _curves(graph: AttributionGraph, layout: Layout, edges: list[int]) -> list[Curve]:
    largest = float(graph.influence.edge[edges].max(initial=0.0)) if edges else 1.0
    curves = []
    for edge in edges:
        target, source = int(graph.edges.target[edge]), int(graph.edges.source[edge])
        strength = (float(graph.influence.edge[edge]) / largest) ** 0.5
        sign = "plus" if graph.edges.weight[edge] > 0 else "minus"
        path = _bend(layout.places[source], layout.places[target])
        curves.append(
            Curve(target, source, path, sign, round(0.5 + 3.2 * strength, 2), round(0.13 + 0.57 * strength, 2))
        )
    return curves


def _bend(start: tuple[float, float], end: tuple[float, float]) -> str:
    """A curve that leaves upwards and arrives upwards; beside the nodes between where it stays in its column."""
    (x0, y0), (x1, y1) = start, end
    lift = (y0 - y1) * 0.45
    aside = 16 if abs(x1 - x0) < 8 and lift > 20 else 0
    return f"M{x0:.1f} {y0:.1f}C{x0 + aside:.1f} {y0 - lift:.1f} {x1 + aside:.1f} {y1 + lift:.1f} {x1:.1f} {y1:.1f}"


def _stats(graph: AttributionGraph) -> list[tuple[str, str]]:
    scores = graph.scores
    return [
        ("replacement score", _share(scores.replacement_score)),
        ("completeness score", _share(scores.completeness_score)),
        ("mean path length", f"{path_lengths(graph).mean:.2f}"),
        ("worst row gap", f"{scores.worst_row_gap:.0e}"),
        ("left out", _share(scores.left_out)),
    ]


def _missing(graph: AttributionGraph, drawn: list[int], edges: list[int]) -> str:
    """What is not drawn, in words."""
    total = graph.influence.edge.sum()
    carried = graph.influence.edge[edges].sum() / total if total > 0 and edges else 0.0
    what = f"{len(drawn):,} of {len(graph.nodes):,} nodes and {len(edges):,} of {len(graph.weight):,} edges are drawn, "
    return what + f"which carry {carried:.0%} of the edges' influence. Edges from biases are listed, not drawn."


def _path(graph: AttributionGraph, path: StrongPath) -> dict[str, Any]:
    nodes = [graph.index[id] for id in path.nodes]
    names = [graph.captions[i] for i in nodes]
    return {
        "share": _share(path.strength),
        "sign": "plus" if path.sign > 0 else "minus",
        "nodes": nodes,
        "names": names,
    }


def _details(graph: AttributionGraph, drawn: list[int]) -> dict[int, dict[str, Any]]:
    """What a person reads on hovering over a node."""
    n, edges = len(graph.nodes), graph.edges
    incoming, outgoing = ByNode(edges.target, n), ByNode(edges.source, n)
    return {
        i: {
            "title": graph.captions[i],
            "facts": _facts(graph, i),
            "in": _listed(graph, incoming[i], edges.source),
            "out": _listed(graph, outgoing[i], edges.target),
        }
        for i in drawn
    }


def _facts(graph: AttributionGraph, i: int) -> list[tuple[str, str]]:
    node, preactivation = graph.nodes[i], float(graph.preactivation[i])
    facts = [
        ("influence", "" if node.kind in ("target", "bias") else _share(graph.influence.node[i])),
        ("probability", "" if node.probability is None else f"{node.probability:.3f}"),
        ("activation", "" if node.activation is None else f"{node.activation:.4g}"),
        ("sum of edges", "" if isnan(preactivation) else f"{preactivation:.4g}"),
        ("stands for positions", ", ".join(map(str, node.pooled))),
        ("id", node.id),
    ]
    return [fact for fact in facts if fact[1]]


def _listed(
    graph: AttributionGraph, edges: Int[np.ndarray, " some"], ends: Int[np.ndarray, " E"]
) -> list[tuple[int, str, float]]:
    """The strongest of the edges at a node: the node at its other end, what that is called, and the weight."""
    weight = graph.edges.weight
    strongest = edges[np.argsort(-np.abs(weight[edges]), kind="stable")][:LISTED]
    return [(int(ends[e]), graph.captions[ends[e]], float(weight[e])) for e in strongest]


def _heat(graph: AttributionGraph) -> list[tuple[int, Box, float]]:
    """Patches with their boxes, and their influence over that of the most influential one."""
    largest = graph.influence.node[graph.of_kind("patch")].max(initial=0.0) or 1.0
    patches = [(i, node.box) for i, node in enumerate(graph.nodes) if node.kind == "patch"]
    return [(i, box, float(graph.influence.node[i] / largest)) for i, box in patches if box is not None]


def _share(value: float) -> str:
    return "–" if isnan(value) else f"{value:.1%}"
