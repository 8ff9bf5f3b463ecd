"""What a sparsity offers, and what it needs of the coder that it serves.

Axes here and in the variants: N tokens, S source layers, F features a layer. `norms` are the lengths of a feature's
write vectors over all its targets, so that features of different layers are judged by what they write and not by how
their scale is split between encoder and decoder.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.coders.codes import Codes
from crosslayer.team import Places, Team


@runtime_checkable
class Encoder(Protocol):
    """What a sparsity needs of a coder. `i` counts source layers; `x` is in the coder's own units."""

    W_enc: torch.nn.ParameterList
    b_enc: torch.nn.ParameterList
    log_threshold: torch.nn.ParameterList
    sources: tuple[int, ...]
    d_transcoder: int
    team: Team
    training: bool
    cut: Tensor

    def preactivations(self, x: Tensor) -> Tensor:
        """[N, S, F] encoder outputs before any non-linearity, from all layers' x [N, L, D]."""
        ...

    def layer_preactivations(self, i: int, x: Tensor) -> Tensor:
        """[N, F] the same for one source layer, from its own x [N, D]."""
        ...

    def decoder_norms(self) -> Tensor:
        """[S, F] length of a feature's write vectors over all its targets."""
        ...


@dataclass(frozen=True)
class Encoded:
    """One batch, encoded."""

    x: Float[Tensor, "N L D"]
    """What was read, in the coder's own units."""
    pre: Float[Tensor, "N S F"]
    """Pre-activations."""
    codes: list[Codes]
    """Activations of each source."""
    places: Places
    """Where the tokens stand in the batch."""


@runtime_checkable
class Sparsity(Protocol):
    """Decides which features are active, in training and in a replacement model."""

    def check(self, n_sources: int, n_features: int) -> None:
        """Raise UserError where this sparsity cannot work on S layers of F features."""
        ...

    def budget(self, n_sources: int, n_features: int) -> int:
        """Features a token that a training step works with, over all layers: those active, or all of a dense one."""
        ...

    def at(self, progress: float) -> "Sparsity":
        """The sparsity to use at `progress` (0 to 1) of the training."""
        ...

    def encode(self, coder: Encoder, x: Float[Tensor, "N L D"], places: Places) -> Encoded:
        """Encode all layers of N tokens, with gradients for training."""
        ...

    def encode_layer(self, coder: Encoder, i: int, x: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N F"], Codes]:
        """Pre-activations and codes of one layer seen alone, as a replacement model sees it, with gradients.

        Raises:
            UserError: where the choice needs all layers at once.
        """
        ...

    def penalty(self, coder: Encoder, encoded: Encoded, progress: float) -> Tensor | float:
        """What is added to the loss: these tokens' part of the mean over all of the batch, summed over all features."""
        ...

    def thresholds(self, coder: Encoder) -> Float[Tensor, "S F"] | None:
        """The JumpReLU thresholds that the training itself arrived at; None where they are to be calibrated."""
        ...
