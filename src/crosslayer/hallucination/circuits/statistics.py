"""What a graph is like, in figures that are known before its token is given and know nothing of the truth.

Axes: n graphs, C columns.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from crosslayer.attribution.tables import tables
from crosslayer.attribution.tally import Tally
from crosslayer.hallucination.circuits.foresight import Block
from crosslayer.hallucination.circuits.parts import renamed

IMAGE = "image"
KINDS = ("token", "patch", "feature", "error", "bias")
PLACES = (IMAGE, "prompt", "answer", "last")
EFFECTS = 64
"""Nodes whose effects a classifier sees."""


def blocks(found: Sequence[Tally], places: Sequence[Sequence[str]], n_layers: int) -> list[Block]:
    """Statistics of each graph, and the effects of its features.

    Args:
        found: the graphs.
        places: names that each one's patches were given; they are taken away again, as they tell what is there.
        n_layers: of the model.
    """
    nameless = [renamed(one, dict.fromkeys(names, IMAGE)) for one, names in zip(found, places, strict=True)]
    nodes, _ = tables(nameless)
    features = np.array([role.kind == "feature" for role in nodes.keys])
    return [
        Block(np.array([statistics(one, n_layers) for one in nameless])),
        Block(nodes.effect[:, np.flatnonzero(features)].toarray(), EFFECTS),
    ]


def statistics(found: Tally, n_layers: int) -> Float[np.ndarray, " C"]:
    """Scores, margin, lengths of paths, entropy, and shares of influence and effect by kind, place and layer."""
    feature, error = (np.array([role.kind == kind for role in found.roles]) for kind in ("feature", "error"))
    layer = np.array([-1 if role.layer is None else role.layer for role in found.roles])
    masks = [np.array([role.kind == kind for role in found.roles]) for kind in KINDS]
    masks += [feature & np.array([role.place == place for role in found.roles]) for place in PLACES]
    masks += [kind & (layer == number) for kind in (feature, error) for number in range(n_layers)]
    sums = [values[mask].sum() for mask in masks for values in (found.influence, found.effect)]
    whole = [found.replacement_score, found.completeness_score, found.left_out, found.value]
    return np.nan_to_num(np.array([*whole, path_length(found), entropy(found.influence), feature.sum(), *sums]))


def path_length(found: Tally) -> float:
    """Edges that a path to the target has on average, by strength, whatever it comes from: all edges' influence."""
    listed = 1 - found.edges_left_out
    return float(found.edge_influence.sum() / listed) if listed > 0 else float("nan")


def entropy(influence: Float[np.ndarray, " R"]) -> float:
    """Of how influence is spread over the nodes, in nats."""
    share = influence[influence > 0] / max(influence.sum(), 1e-30)
    return float(-(share * np.log(share)).sum())
