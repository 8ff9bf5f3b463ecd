"""Where the nodes of an attribution graph stand in a figure: layers up, positions across, the picture's first.

Lengths are in pixels of the figure; y runs down.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np

from crosslayer.attribution.graph import AttributionGraph
from crosslayer.attribution.node import INPUTS

MOST_TOKENS, MOST_PATCHES = 64, 32
GUTTER, MARGIN, STEP, PAD = 84, 132, 16, 14
"""Left of the columns; right of them; between nodes of a cell; around a cell."""
NARROWEST, LOWEST, PILL, PATCH = 34, 300, 26, 28
"""A column; all layers together; a target with the room around it; a patch's side."""
WIDEST_CELL = 3
"""Nodes side by side in a cell; more start a new line."""


@dataclass(frozen=True)
class Layout:
    """A figure's measures."""

    places: dict[int, tuple[float, float]]
    """Centre of each node that is drawn, by its index in the graph."""
    columns: dict[int, float]
    """Centre of each position's column."""
    layers: dict[int, tuple[float, float]]
    """Top and bottom of each layer's row."""
    inputs: float
    """Centre of the row of inputs."""
    width: float
    height: float


def chosen(graph: AttributionGraph, most: int) -> list[int]:
    """Nodes to draw: targets, biases, and the strongest 64 tokens, 32 patches, and `most` features and errors."""

    def strongest(n: int, *kinds: str) -> list[int]:
        nodes = np.flatnonzero(graph.of_kind(*kinds))
        return nodes[np.argsort(-graph.influence.node[nodes], kind="stable")][:n].tolist()

    always = np.flatnonzero(graph.of_kind("target", "bias")).tolist()
    inner = [i for i in strongest(most, "feature", "error") if graph.influence.node[i] > 0]
    return sorted([*always, *strongest(MOST_TOKENS, "token"), *strongest(MOST_PATCHES, "patch"), *inner])


def arrange(graph: AttributionGraph, drawn: Sequence[int]) -> Layout:
    """Places for the nodes drawn."""
    cells: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i in sorted(drawn, key=lambda i: -graph.influence.node[i]):
        node = graph.nodes[i]
        if node.kind in ("feature", "error") or (node.kind in INPUTS and node.layer is not None):
            cells[-1 if node.layer is None else node.layer, node.position or 0].append(i)
    columns, right = _columns(graph, drawn, cells)
    layers, inputs, height, top = _rows(graph, drawn, cells)
    places: dict[int, tuple[float, float]] = {}
    for (layer, position), nodes in cells.items():
        middle = sum(layers[layer]) / 2 if layer >= 0 else inputs - PATCH
        places |= _in_cell(nodes, columns[position], middle)
    stacked: dict[int | None, int] = defaultdict(int)
    for i in sorted(drawn, key=lambda i: -float(graph.target_weight[i])):
        node = graph.nodes[i]
        if node.kind == "target":
            x = right - NARROWEST / 2 if node.position is None else columns[node.position]
            places[i] = (x, top - PAD - PILL * (stacked[node.position] + 0.5))
            stacked[node.position] += 1
        elif node.kind == "bias":
            places[i] = (GUTTER - 20.0, sum(layers[node.layer]) / 2 if node.layer in layers else inputs)
        elif i not in places:
            places[i] = (columns[node.position or 0], inputs)
    return Layout(places, columns, layers, inputs, right + MARGIN, height)


def _columns(
    graph: AttributionGraph, drawn: Sequence[int], cells: dict[tuple[int, int], list[int]]
) -> tuple[dict[int, float], float]:
    """Centres of the columns, those of the picture first, and where the last one ends."""
    patches = {node.position for node in graph.nodes if node.kind == "patch"}
    positions = {graph.nodes[i].position for i in drawn} - {None}
    centres, x = {}, float(GUTTER)
    for position in sorted(positions, key=lambda p: (p not in patches, p)):
        most = max((len(nodes) for (_, p), nodes in cells.items() if p == position), default=0)
        width = max(NARROWEST, STEP * min(most, WIDEST_CELL) + PAD)
        centres[position] = x + width / 2
        x += width
    return centres, x


def _rows(
    graph: AttributionGraph, drawn: Sequence[int], cells: dict[tuple[int, int], list[int]]
) -> tuple[dict[int, tuple[float, float]], float, float, float]:
    """Tops and bottoms of the layers, the last on top; the inputs' row; the height in all; where layers start."""
    at = [graph.nodes[i].position for i in drawn if graph.nodes[i].kind == "target"]
    y = top = 2.0 * PAD + PILL * max((at.count(position) for position in at), default=1)
    most = {layer: [len(nodes) for (at, _), nodes in cells.items() if at == layer] for layer in range(graph.n_layers)}
    heights = {layer: STEP * ceil(max([1, *counts]) / WIDEST_CELL) + PAD for layer, counts in most.items()}
    spare = max(0.0, LOWEST - sum(heights.values())) / graph.n_layers
    layers = {}
    for layer in reversed(range(graph.n_layers)):
        layers[layer] = (y, y + heights[layer] + spare)
        y = layers[layer][1]
    inputs = y + PATCH + PAD / 2
    longest = max((len(token) for token in graph.tokens), default=0)
    return layers, inputs, inputs + PATCH + 6.0 * min(longest, 14), top


def _in_cell(nodes: Sequence[int], x: float, y: float) -> dict[int, tuple[float, float]]:
    """Short lines, centred, the strongest on top."""
    lines = [nodes[i : i + WIDEST_CELL] for i in range(0, len(nodes), WIDEST_CELL)]
    return {
        i: (x + STEP * (column - (len(line) - 1) / 2), y + STEP * (row - (len(lines) - 1) / 2))
        for row, line in enumerate(lines)
        for column, i in enumerate(line)
    }


def radius(share: float, largest: float) -> float:
    """Of a node's mark, whose area grows with its influence."""
    return 3.2 + 4.3 * sqrt(share / largest) if largest > 0 else 3.2
