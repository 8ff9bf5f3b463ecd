"""Sparsities by name, to and from JSON."""

from typing import Any

from crosslayer.coders.sparsity.batch import BatchTopK
from crosslayer.coders.sparsity.largest import GroupMax, JointTopK, TopK
from crosslayer.coders.sparsity.penalised import JumpReLU, ReLU
from crosslayer.coders.sparsity.protocol import Sparsity
from crosslayer.variants import read_variant, write_variant

KINDS: dict[str, type] = {
    "joint-topk": JointTopK,
    "topk": TopK,
    "batch-topk": BatchTopK,
    "groupmax": GroupMax,
    "relu": ReLU,
    "jumprelu": JumpReLU,
}


def write_sparsity(sparsity: Sparsity) -> dict[str, Any]:
    """The JSON form of a sparsity: its kind and its settings."""
    return write_variant(KINDS, sparsity)


def read_sparsity(record: dict[str, Any]) -> Sparsity:
    """The sparsity that a JSON form describes; unknown kinds and settings are errors."""
    return read_variant("sparsity", KINDS, record)
