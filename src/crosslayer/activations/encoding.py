"""The forms in which a store keeps activations: as floating-point numbers, or as bytes with a scale a row."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from crosslayer.errors import UserError


@runtime_checkable
class Encoding(Protocol):
    """How an array [n, L, D] is kept, as named tensors [n, L, ...]."""

    @property
    def working_dtype(self) -> torch.dtype:
        """What to hold the array in before it is encoded, and after."""
        ...

    def bytes_a_vector(self, d_model: int) -> int:
        """Room for one token at one layer."""
        ...

    def encode(self, name: str, array: Tensor) -> dict[str, Tensor]:
        """The tensors to keep for the array of this name."""
        ...

    def decode(self, name: str, tensors: dict[str, Tensor], rows: slice, out: Tensor) -> None:
        """Put some rows of the array into `out` [n, L, D]."""
        ...

    def added_error(self, name: str, tensors: dict[str, Tensor], array: Tensor) -> list[float]:
        """By layer, the share of the array's sum of squares that its encoded form is off by; nothing where that is 0
        or mere rounding."""
        ...


@dataclass(frozen=True)
class Plain:
    """Numbers of a floating-point type, as they are."""

    working_dtype: torch.dtype

    def bytes_a_vector(self, d_model: int) -> int:
        """See `Encoding`."""
        return d_model * self.working_dtype.itemsize

    def encode(self, name: str, array: Tensor) -> dict[str, Tensor]:
        """See `Encoding`."""
        return {name: array.to(self.working_dtype)}

    def decode(self, name: str, tensors: dict[str, Tensor], rows: slice, out: Tensor) -> None:
        """See `Encoding`."""
        out.copy_(tensors[name][rows])

    def added_error(self, name: str, tensors: dict[str, Tensor], array: Tensor) -> list[float]:
        """See `Encoding`."""
        return []


@dataclass(frozen=True)
class Int8:
    """Bytes from -127 to 127, with one fp32 scale for each token and layer: the largest magnitude / 127."""

    working_dtype: torch.dtype = torch.float32

    def bytes_a_vector(self, d_model: int) -> int:
        """See `Encoding`."""
        return d_model + 4

    def encode(self, name: str, array: Tensor) -> dict[str, Tensor]:
        """See `Encoding`; a row with a number that is not finite gets a scale that is not, so that it shows."""
        scale = array.float().abs().amax(2) / 127
        codes = (array / scale.clamp_min(1e-38)[:, :, None]).nan_to_num(0, 0, 0).round_().to(torch.int8)
        return {name: codes, _scale(name): scale}

    def decode(self, name: str, tensors: dict[str, Tensor], rows: slice, out: Tensor) -> None:
        """See `Encoding`."""
        torch.mul(tensors[name][rows], tensors[_scale(name)][rows][:, :, None], out=out)

    def added_error(self, name: str, tensors: dict[str, Tensor], array: Tensor) -> list[float]:
        """See `Encoding`."""
        decoded = torch.empty(array.shape)
        self.decode(name, tensors, slice(None), decoded)
        squares = array.float().square().sum((0, 2)).clamp_min(1e-38)
        return ((decoded - array).square().sum((0, 2)) / squares).tolist()


ENCODINGS: dict[str, Encoding] = {"fp32": Plain(torch.float32), "bf16": Plain(torch.bfloat16), "int8": Int8()}
"""By the name under which a manifest knows them."""


def encoding(dtype: str) -> Encoding:
    """The encoding of this name.

    Raises:
        UserError: when there is none.
    """
    if dtype not in ENCODINGS:
        raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(ENCODINGS)}")
    return ENCODINGS[dtype]


def _scale(name: str) -> str:
    return f"{name}_scale"
