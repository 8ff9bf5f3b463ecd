"""Attribution graphs in circuit-tracer's JSON, to be opened in its viewer: `SLUG.json` and `graph-metadata.json`.

Nodes that circuit-tracer lacks: a patch is an `embedding` that gives its position its label, a bias a `bias` of its
layer. Its own files give errors the id `0_{layer}_{position}`, which collides with feature `layer` of layer 0; here it
is `{layer}_-1_{position}`.

Source: github.com/decoderesearch/circuit-tracer at 4bb8c0e: frontend/graph_models.py, utils/create_graph_files.py.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crosslayer.attribution.graph import AttributionGraph
from crosslayer.attribution.node import INPUTS, Node
from crosslayer.errors import UserError
from crosslayer.files import read_json, write_json

METADATA = "graph-metadata.json"


def write_circuit_tracer_graph(
    graph: AttributionGraph,
    folder: str | Path,
    slug: str,
    scan: str = "crosslayer",
    node_threshold: float | None = None,
    supernodes: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Write a graph and list it in the folder's `graph-metadata.json`; returns the graph's file.

    Args:
        graph: a pruned graph, best: the viewer draws every node.
        folder: where the viewer looks; graphs that are there already stay, one of the same slug is replaced.
        slug: the graph's name, which becomes its file's.
        scan: under which name the viewer looks for the features' pages.
        node_threshold: what the graph was pruned with, if it was.
        supernodes: groups of ids by name, which the viewer shows as such.

    Raises:
        UserError: for a slug that is no file name, a supernode's id that the graph lacks, a list that is damaged.
    """
    folder = Path(folder)
    if slug != Path(slug).name or slug in ("", ".", ".."):
        raise UserError(f"slug is {slug!r}; it becomes a file name, so choose letters, digits and dashes")
    file = folder / f"{slug}.json"
    listed = _listed(folder / METADATA, slug)
    ids = [_id(i, node, graph.n_layers) for i, node in enumerate(graph.nodes)]
    patches = {node.position: node.label for node in graph.nodes if node.kind == "patch"}
    metadata = {
        "slug": slug,
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": [patches.get(p) or token for p, token in enumerate(graph.tokens)],
        "prompt": graph.prompt,
        "node_threshold": node_threshold,
        "schema_version": 1,
    }
    groups = [[name, *(ids[_place(graph, name, id)] for id in group)] for name, group in (supernodes or {}).items()]
    settings = {"pinnedIds": [], "supernodes": groups, "linkType": "both", "clickedId": "", "sg_pos": ""}
    nodes = _nodes(graph, ids, 1.0 if node_threshold is None else node_threshold)
    record = {"metadata": metadata, "qParams": settings, "nodes": nodes, "links": _links(graph, ids)}
    write_json(file, record)
    write_json(folder / METADATA, {"graphs": [*listed, metadata]})
    return file


def _listed(file: Path, slug: str) -> list[dict[str, Any]]:
    """The graphs of the folder, but for one of the same slug."""
    if not file.exists():
        return []
    try:
        return [graph for graph in read_json(file)["graphs"] if graph["slug"] != slug]
    except (KeyError, TypeError):
        raise UserError(f"{file}: no list of graphs as circuit-tracer writes it; choose another folder") from None


def _place(graph: AttributionGraph, name: str, id: str) -> int:
    if id not in graph.index:
        raise UserError(f"supernode {name}: {id} is no node of this graph")
    return graph.index[id]


def _nodes(graph: AttributionGraph, ids: list[str], carried: float) -> list[dict[str, Any]]:
    """With all fields. Influence is cumulative there: the share of a node and of all above it.

    The viewer hides what lies past `node_threshold` unless it has no influence at all, so the nodes that are left reach
    up to just that, and targets and biases have none.
    """
    order = np.argsort(-graph.influence.node, kind="stable")
    cumulative = np.empty(len(order))
    cumulative[order] = np.cumsum(graph.influence.node[order]) * carried / max(graph.influence.node.sum(), 1e-300)
    likeliest = int(graph.target_weight.argmax()) if len(graph.nodes) else -1
    return [
        {
            "node_id": id,
            **_what(i, node, graph.n_layers),
            "ctx_idx": node.position or 0,
            "token_prob": node.probability or 0.0,
            "is_target_logit": i == likeliest and node.kind == "target",
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "jsNodeId": f"{id}-0",
            "influence": None if node.kind in ("target", "bias") else min(float(cumulative[i]), carried),
            "activation": node.activation,
        }
        for i, (node, id) in enumerate(zip(graph.nodes, ids, strict=True))
    ]


def _links(graph: AttributionGraph, ids: list[str]) -> list[dict[str, Any]]:
    ends = zip(graph.source.tolist(), graph.target.tolist(), graph.weight.tolist(), strict=True)
    return [{"source": ids[source], "target": ids[target], "weight": weight} for source, target, weight in ends]


def _id(i: int, node: Node, n_layers: int) -> str:
    layer, position = _layer(node, n_layers), "x" if node.position is None else node.position
    if node.kind in INPUTS:
        read_at = "" if node.layer is None else f"-{node.layer}"
        return f"E_{node.vocab or 0}{read_at}_{position}"
    number = {"feature": node.feature, "error": -1, "bias": -2, "target": _target_number(i, node)}[node.kind]
    return f"{layer}_{number}_{position}"


def _what(i: int, node: Node, n_layers: int) -> dict[str, Any]:
    """Type, number, layer and caption."""
    layer = _layer(node, n_layers)
    if node.kind == "feature":
        kind, number, clerp = "cross layer transcoder", _cantor(int(layer), node.feature or 0), node.label
    elif node.kind == "error":
        kind, number, clerp = "mlp reconstruction error", -1, node.label
    elif node.kind == "bias":
        kind, number, clerp = "bias", -2, node.label or f"Bias of layer {layer}"
    elif node.kind == "target":
        clerp = f'Output "{node.label}" (p={node.probability or 0.0:.3f})'  # the viewer reads p from here
        kind, number = "logit", _target_number(i, node)
    else:
        kind, number, clerp = "embedding", node.position, node.label
    return {"feature": number, "layer": layer, "feature_type": kind, "clerp": clerp}


def _layer(node: Node, n_layers: int) -> str:
    if node.kind == "target":
        return str(n_layers + 1)
    return "E" if node.kind in INPUTS or node.layer is None else str(node.layer)


def _target_number(i: int, node: Node) -> int:
    """The token's id; for a direction, a number of its own below those of errors and biases."""
    return -3 - i if node.vocab is None else node.vocab


def _cantor(a: int, b: int) -> int:
    """One number for a pair of numbers, and for no other pair."""
    return (a + b) * (a + b + 1) // 2 + b
