"""Activations of many tokens at all sites: what transcoders are trained on."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosslayer.team import Group


@dataclass(frozen=True)
class Activations:
    """N tokens: what every MLP read and wrote, and where each token came from."""

    x: Float[Tensor, "N L D"]
    """What each layer's MLP read."""
    y: Float[Tensor, "N L D"]
    """What each layer's MLP wrote."""
    image: Bool[Tensor, " N"]
    """True at image tokens."""
    position: Int[Tensor, " N"]
    """Position in the prompt, padding not counted."""
    sample: Int[Tensor, " N"]
    """Number of the prompt in its data set."""
    token: Int[Tensor, " N"]
    """Its id in the model's vocabulary."""

    def __len__(self) -> int:
        return self.x.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> "Activations":
        """The chosen tokens; `rows` is a slice, a mask [N] or indices."""
        return Activations(**{name: value[rows] for name, value in vars(self).items()})

    @staticmethod
    def concatenate(parts: "list[Activations]") -> "Activations":
        """All tokens of the parts, in order."""
        names = Activations.__dataclass_fields__
        return Activations(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def gather(self, group: Group) -> "Activations":
        """The tokens of all processes of a group, by rank."""
        return Activations(**{name: torch.cat(group.gather(value)) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Padded:
    """A batch as it was recorded, padding among its tokens: leaving that out costs a copy, which can wait."""

    activations: Activations
    kept: Int[Tensor, " K"]
    """Which are no padding."""

    def __len__(self) -> int:
        return len(self.kept)

    def first(self, n: int) -> "Padded":
        """The first n tokens that are no padding, at most."""
        return Padded(self.activations, self.kept[:n])

    @property
    def can_wait(self) -> bool:
        """Whether padding may stay for a while: in main memory, where it is half of all tokens at most."""
        return self.kept.device.type == "cpu" and 2 * len(self) >= len(self.activations)

    def tokens(self) -> Activations:
        """Those that are no padding."""
        return self.activations if len(self) == len(self.activations) else self.activations[self.kept]
