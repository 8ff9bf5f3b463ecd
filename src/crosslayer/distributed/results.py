"""What one process tells others, as bytes: a safetensors file with the rest as JSON in its metadata."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from scipy.sparse import csr_array
from torch import Tensor

Result = Mapping[str, Any]
"""What a piece of work gives: tensors, sparse arrays, and values that JSON knows, by name."""
PARTS = ("data", "indices", "indptr")
"""What a sparse array is made of."""


def encode(result: Result) -> bytes:
    """A result as bytes."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in result.items() if isinstance(value, Tensor)}
    sparse = {name: value for name, value in result.items() if isinstance(value, csr_array)}
    rest = {name: value for name, value in result.items() if name not in tensors.keys() | sparse.keys()}
    for name, array in sparse.items():
        tensors |= {f"{name}.{part}": torch.from_numpy(getattr(array, part)) for part in PARTS}
    shapes = {name: array.shape for name, array in sparse.items()}
    return save(tensors, {"rest": json.dumps(rest, ensure_ascii=False), "shapes": json.dumps(shapes)})


def decode(data: bytes) -> Result:
    """The result again: tensors on the CPU, tuples as lists."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    tensors = load(data)
    sparse = {
        name: csr_array(tuple(tensors.pop(f"{name}.{part}").numpy() for part in PARTS), shape)
        for name, shape in json.loads(header["shapes"]).items()
    }
    return json.loads(header["rest"]) | tensors | sparse
