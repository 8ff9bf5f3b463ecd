"""Attribution graphs for tests: random ones whose rows close, and the published one of 12 nodes."""

import numpy as np
import torch

from crosslayer.attribution.graph import AttributionGraph
from crosslayer.attribution.node import Node

LAYERS, POSITIONS = 3, 4


def graph_of(nodes: list[Node], edges: dict[tuple[int, int], float], target_weight: list[float], **more):
    """A graph from {(target, source): weight} whose rows close by construction."""
    total = np.full(len(nodes), np.nan)
    for (target, _), weight in edges.items():
        total[target] = np.nan_to_num(total[target]) + weight
    ends = torch.tensor(list(edges), dtype=torch.int64).reshape(-1, 2)
    known = {
        "prompt": "a b c d",
        "tokens": ("a", "b", "c", "d"),
        "model": "tiny",
        "run": "runs/clt",
        "n_layers": LAYERS,
    }
    return AttributionGraph(
        **known | more,
        nodes=tuple(nodes),
        target=ends[:, 0],
        source=ends[:, 1],
        weight=torch.tensor(list(edges.values()), dtype=torch.float32),
        preactivation=torch.tensor(total, dtype=torch.float32),
        target_weight=torch.tensor(target_weight, dtype=torch.float32),
    )


def random_graph(seed: int = 0, features: int = 5, density: float = 0.7) -> AttributionGraph:
    """Tokens, patches, biases, errors, features of random places and two targets, in random order."""
    rng = np.random.default_rng(seed)
    nodes = [Node(kind="token", position=p, label=f"w{p}", vocab=p) for p in range(2)]
    nodes += [
        Node(kind="patch", position=p, label=f"patch {p}", box=(0, 8 * p, 8, 8 * p + 8)) for p in range(2, POSITIONS)
    ]
    nodes += [Node(kind="bias", layer=layer) for layer in range(LAYERS)]
    nodes += [Node(kind="error", layer=layer, position=p) for layer in range(LAYERS) for p in range(POSITIONS)]
    for layer in range(LAYERS):
        for f in range(features):
            position, activation = int(rng.integers(POSITIONS)), float(rng.random())
            nodes.append(Node(kind="feature", layer=layer, position=position, feature=f, activation=activation))
    nodes += [
        Node(kind="target", position=3, vocab=v, label=t, probability=q)
        for v, t, q in ((7, " yes", 0.6), (8, " no", 0.3))
    ]
    nodes = [nodes[i] for i in rng.permutation(len(nodes))]
    edges = {}
    for i, target in enumerate(nodes):
        for j, source in enumerate(nodes):
            forward = source.rank(LAYERS) < target.rank(LAYERS)
            if target.kind in ("feature", "target") and forward and rng.random() < density:
                edges[i, j] = float(rng.normal())
    weights = [node.probability or 0.0 for node in nodes]
    return graph_of(nodes, edges, weights)


def dense(graph: AttributionGraph, biases: bool = False) -> np.ndarray:
    """Weights as a matrix (target, source), with zeros in the columns of biases unless wanted."""
    matrix = np.zeros((len(graph.nodes), len(graph.nodes)))
    matrix[graph.target.numpy(), graph.source.numpy()] = graph.weight.double().numpy()
    if not biases:
        matrix[:, graph.of_kind("bias")] = 0
    return matrix


def published(*, pruned: bool = False) -> AttributionGraph:
    """The example of 12 nodes in circuit-tracer's tests: nodes 9 and 10 are tokens, node 11 the target."""
    layers = {8: 0, 9: None, 10: None, 0: 0, 1: 1, 2: 1, 3: 2, 4: 2, 5: 2, 6: 0, 7: 2}
    features = [Node(kind="feature", layer=layers[i], position=0, feature=i, activation=10.0) for i in range(9)]
    tokens = [Node(kind="token", position=i - 9, label="ab"[i - 9], vocab=i - 9) for i in (9, 10)]
    target = Node(kind="target", position=1, vocab=0, label="c", probability=1.0)
    rows = {11: (1, 3, 6, 8), 3: (0, 1, 6), 1: (9, 10), 0: (9,)}
    if pruned:
        rows |= {3: (1, 6), 0: ()}
    edges = {(i, j): 10.0 for i, sources in rows.items() for j in sources}
    return graph_of([*features, *tokens, target], edges, [0.0] * 11 + [1.0])
