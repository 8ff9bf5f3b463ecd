"""What a training can minimise, as settings; `FVU` needs activations alone, the others a language model."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from crosslayer.errors import UserError
from crosslayer.variants import read_variant, write_variant


@runtime_checkable
class Loss(Protocol):
    """Settings of an objective; `crosslayer.workflow` builds it."""


@dataclass(frozen=True)
class FVU:
    """Fraction of variance unexplained of the original MLPs' outputs, mean over layers."""


@dataclass(frozen=True)
class _EndToEnd:
    """What the end-to-end losses share."""

    weight: float = 1.0
    """Weight of the end-to-end part."""
    fvu_weight: float = 0.0
    """Weight of the fraction of variance unexplained on the original stream beside it; 0 leaves it out."""

    def __post_init__(self):
        if self.weight <= 0 or self.fvu_weight < 0:
            raise UserError(f"weight is {self.weight} and fvu_weight {self.fvu_weight}; choose > 0 and >= 0")


@dataclass(frozen=True)
class KL(_EndToEnd):
    """KL divergence of the replacement model's next-token distribution from the original's. Mixed: kl-fvu."""


@dataclass(frozen=True)
class CrossEntropy(_EndToEnd):
    """The replacement model's cross-entropy on the tokens that follow."""


LOSSES: dict[str, type] = {"fvu": FVU, "kl": KL, "ce": CrossEntropy}


def write_loss(loss: Loss) -> dict[str, Any]:
    """The JSON form of a loss's settings."""
    return write_variant(LOSSES, loss)


def read_loss(record: dict[str, Any]) -> Loss:
    """The settings that a JSON form describes; unknown kinds and settings are errors."""
    return read_variant("loss", LOSSES, record)
