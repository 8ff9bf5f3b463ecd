"""Attribution graphs as networkx graphs, for whatever else one wants to ask of them."""

from dataclasses import asdict

import networkx

from crosslayer.attribution.graph import AttributionGraph


def to_networkx(graph: AttributionGraph) -> networkx.DiGraph:
    """The graph with ids as nodes; edges run from source to target.

    Nodes carry what `Node` has, and `influence`, `preactivation` (NaN without a row) and `target_weight`; edges carry
    `weight` and `influence`. The graph itself carries `prompt`, `model` and `run`.
    """
    network = networkx.DiGraph(prompt=graph.prompt, model=graph.model, run=graph.run)
    values = zip(graph.influence.node, graph.preactivation.tolist(), graph.target_weight.tolist(), strict=True)
    for node, (influence, preactivation, target_weight) in zip(graph.nodes, values, strict=True):
        more = {"influence": float(influence), "preactivation": preactivation, "target_weight": target_weight}
        network.add_node(node.id, **asdict(node), **more)
    ids = [node.id for node in graph.nodes]
    ends = zip(graph.source.tolist(), graph.target.tolist(), strict=True)
    for (source, target), weight, influence in zip(ends, graph.weight.tolist(), graph.influence.edge, strict=True):
        network.add_edge(ids[source], ids[target], weight=weight, influence=float(influence))
    return network
