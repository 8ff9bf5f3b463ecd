"""What an intervention does to an activation. Each variant is an object that is passed in."""

from dataclasses import dataclass, fields
from math import isfinite
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from crosslayer.errors import UserError


@runtime_checkable
class Action(Protocol):
    """A function of activations, of any shape, element by element."""

    def __call__(self, acts: Tensor) -> Tensor:
        """The new activations."""
        ...


class _Number:
    """Base of the actions with a number, which must be one."""

    def __post_init__(self):
        for f in fields(self):  # type: ignore[arg-type]
            if not isfinite(value := getattr(self, f.name)):
                raise UserError(f"the {f.name} of {type(self).__name__} is {value}; a finite number is wanted")


@dataclass(frozen=True)
class Ablate:
    """Nothing is left."""

    def __call__(self, acts: Tensor) -> Tensor:
        """See `Action.__call__`."""
        return torch.zeros_like(acts)


@dataclass(frozen=True)
class Scale(_Number):
    """A multiple of what is there; a feature that is not active stays so."""

    factor: float

    def __call__(self, acts: Tensor) -> Tensor:
        """See `Action.__call__`."""
        return acts * self.factor


@dataclass(frozen=True)
class Set(_Number):
    """A value, whatever was there: a feature that is not active becomes so."""

    value: float

    def __call__(self, acts: Tensor) -> Tensor:
        """See `Action.__call__`."""
        return torch.full_like(acts, self.value)


@dataclass(frozen=True)
class Add(_Number):
    """More, or less, than what is there; also where a feature is not active."""

    amount: float

    def __call__(self, acts: Tensor) -> Tensor:
        """See `Action.__call__`."""
        return acts + self.amount


ACTIONS: dict[str, type] = {"ablate": Ablate, "scale": Scale, "set": Set, "add": Add}
