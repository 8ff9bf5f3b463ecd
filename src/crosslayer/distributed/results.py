"""What one process tells others, as bytes: a safetensors file with the rest as JSON in its metadata."""

import json
from collections.abc import Mapping
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

Result = Mapping[str, Any]
"""What a piece of work gives: tensors, and values that JSON knows, by name."""


def encode(result: Result) -> bytes:
    """A result as bytes."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in result.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in result.items() if name not in tensors}
    return save(tensors, {"rest": json.dumps(rest, ensure_ascii=False)})


def decode(data: bytes) -> Result:
    """The result again: tensors on the CPU, tuples as lists."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["rest"]) | load(data)
