"""Norms of a coder's own, between what a layer reads and its encoder: some transcoders trained elsewhere have one."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import layer_norm

from crosslayer.errors import UserError
from crosslayer.variants import read_variant, write_variant


@runtime_checkable
class InputNorm(Protocol):
    """Takes what a layer reads to what its encoder reads, token by token."""

    def __call__(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """The normalised x, of norm sqrt(D) or so."""
        ...


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean x) / sqrt(var x + eps) over the D entries of a token; a gain and a bias are the encoder's business.

    Source: Ba et al. 2016, "Layer normalization"; `torch.nn.LayerNorm` without its affine part.
    """

    eps: float = 1e-5
    """Added to the variance."""

    def __post_init__(self):
        if not 0 < self.eps < float("inf"):
            raise UserError(f"the LayerNorm's eps is {self.eps}; choose a small number above 0, such as 1e-5")

    def __call__(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """See `InputNorm.__call__`."""
        return layer_norm(x, x.shape[-1:], eps=self.eps)


NORMS: dict[str, type] = {"layer-norm": LayerNorm}


def write_norm(norm: InputNorm | None) -> dict[str, Any] | None:
    """The JSON form of a norm: its kind and its settings; None where there is none."""
    return None if norm is None else write_variant(NORMS, norm)


def read_norm(record: dict[str, Any] | None) -> InputNorm | None:
    """The norm that a JSON form describes; unknown kinds and settings are errors."""
    return None if record is None else read_variant("input_norm", NORMS, record)
