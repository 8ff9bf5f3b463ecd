"""Rows of a store: activations at the layers that it holds, and where each came from, as far as that is known."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.activations.record import Activations

ORIGIN = {"token": torch.int32, "position": torch.int32, "sample": torch.int32, "modality": torch.uint8}
"""What is kept beside x and y, with its type on disk."""
TEXT, IMAGE, UNKNOWN = 0, 1, 2
"""Values of `modality`."""
NOT_KNOWN = -1
"""A token id, position or sample id that is not known."""


@dataclass(frozen=True)
class Rows:
    """N tokens at X layers whose reads, and Y layers whose writes, are kept."""

    x: Float[Tensor, "N X D"]
    y: Float[Tensor, "N Y D"]
    token: Int[Tensor, " N"]
    position: Int[Tensor, " N"]
    sample: Int[Tensor, " N"]
    modality: Int[Tensor, " N"]

    def __len__(self) -> int:
        return self.x.shape[0]

    @staticmethod
    def of(activations: Activations) -> "Rows":
        """What a model was seen to read and write, as rows in main memory."""
        a = activations
        modality = torch.where(a.image, IMAGE, TEXT)
        return Rows(a.x.cpu(), a.y.cpu(), a.token.cpu(), a.position.cpu(), a.sample.cpu(), modality.cpu())

    @staticmethod
    def concatenate(parts: "list[Rows]") -> "Rows":
        """All rows of the parts, in order."""
        return Rows(**{name: torch.cat([getattr(part, name) for part in parts]) for name in Rows.__dataclass_fields__})
