"""Sparsity: which features of a token count as active. Each variant is an object that is passed in."""

from crosslayer.coders.sparsity.batch import BatchTopK
from crosslayer.coders.sparsity.largest import GroupMax, JointTopK, TopK
from crosslayer.coders.sparsity.penalised import JumpReLU, Penalised, ReLU
from crosslayer.coders.sparsity.protocol import Encoded, Encoder, Sparsity
from crosslayer.coders.sparsity.registry import KINDS, read_sparsity, write_sparsity
from crosslayer.coders.sparsity.selection import Selecting, Thresholds, encode_patterns, split_by_source

__all__ = [
    "KINDS",
    "BatchTopK",
    "Encoded",
    "Encoder",
    "GroupMax",
    "JointTopK",
    "JumpReLU",
    "Penalised",
    "ReLU",
    "Selecting",
    "Sparsity",
    "Thresholds",
    "TopK",
    "encode_patterns",
    "read_sparsity",
    "split_by_source",
    "write_sparsity",
]
