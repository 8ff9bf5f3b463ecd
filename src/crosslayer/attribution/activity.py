"""How active the features of a graph are, position by position, where a pooled node keeps only the sum.

Axes: N nodes, P positions.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.attribution.node import Node
from crosslayer.attribution.parts import active_pairs
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.models.prompts import Batch
from crosslayer.replacement.local import LocalReplacement


def feature_of(node: Node) -> tuple[int, int]:
    """Layer and number of a feature."""
    assert node.layer is not None, node.id
    assert node.feature is not None, node.id
    return node.layer, node.feature


@torch.no_grad()
def activations(
    local: LocalReplacement, coder: CrossLayerTranscoder, batch: Batch, nodes: Sequence[Node]
) -> Float[Tensor, "N P"]:
    """What features are active by at the positions that their nodes stand for; 0 elsewhere.

    Args:
        local: the prompt, traced.
        coder: the transcoder.
        batch: the prompt.
        nodes: features.
    """
    found = local.stream.new_zeros(len(nodes), local.stream.shape[1])
    for i, layer in enumerate(coder.sources):
        if mine := [n for n, node in enumerate(nodes) if node.layer == layer]:
            positions, features, values = active_pairs(local, coder, i, batch.position[0] == 0)
            for n in mine:
                here = torch.isin(positions, positions.new_tensor(nodes[n].positions)) & (features == nodes[n].feature)
                found[n, positions[here]] = values[here].to(found)
    return found
