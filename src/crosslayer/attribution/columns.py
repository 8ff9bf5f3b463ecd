"""Which node of a graph each part of a row comes from; a node may stand for several, whose contributions add up.

Axes: P positions, L layers, A active features, R rows, N nodes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.attribution.rows import Rows


@dataclass(frozen=True)
class Columns:
    """Numbers of nodes, for the parts of `Rows`."""

    stream: Int[Tensor, " P"]
    between: dict[int, Int[Tensor, " P"]]
    biases: Int[Tensor, " L_plus_1"]
    features: Int[Tensor, " A"]
    """Of the first A active features: those that have a node."""
    errors: Int[Tensor, "L P"]

    def by_node(self, rows: Rows, n_nodes: int) -> Float[Tensor, "R N"]:
        """What flows into each row from each node, in main memory."""
        features = rows.features[:, : len(self.features)]
        values = [rows.stream, *rows.between.values(), rows.biases, features, rows.errors.flatten(1)]
        columns = [self.stream, *(self.between[layer] for layer in rows.between), self.biases]
        columns += [self.features, self.errors.flatten()]
        found = torch.zeros(len(features), n_nodes, dtype=features.dtype)
        for nodes, value in zip(columns, values, strict=True):
            found.index_add_(1, nodes, value.cpu())
        return found
