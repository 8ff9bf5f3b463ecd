"""Tensors of a file that stay on disk until they are touched, and that the system may drop again."""

import json
import mmap
import sys
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crosslayer.errors import UserError

NORESERVE = 0x4000
"""Linux's MAP_NORESERVE, which Python has no name for before 3.13."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The floating-point tensors of a safetensors file as private maps of it.

    A page is read when it is first touched and can be dropped while memory is short; one that is written to becomes a
    copy of this process's own, and the file stays as it is. safetensors maps files too, but has the system set memory
    aside for all of it, which is refused where a file is larger than memory.

    Raises:
        UserError: when it is missing, damaged, or holds numbers of another kind.
    """
    try:
        with safe_open(path, framework="pt"):  # checks the header and the file's length
            pass
        with path.open("rb") as file:
            n = int.from_bytes(file.read(8), "little")
            header, whole = json.loads(file.read(n)), _map(file.fileno())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy or make it again") from None
    header.pop("__metadata__", None)
    if other := [name for name, entry in header.items() if entry["dtype"] not in DTYPES]:
        raise UserError(f"{path}: {other[0]} is of type {header[other[0]]['dtype']}; {', '.join(DTYPES)} are read")
    return {name: _tensor(whole, 8 + n, **entry) for name, entry in header.items()}


def _map(file: int) -> mmap.mmap:
    if sys.platform == "linux":
        return mmap.mmap(file, 0, mmap.MAP_PRIVATE | NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(file, 0, access=mmap.ACCESS_COPY)


def _tensor(whole: mmap.mmap, start: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    if not prod(shape):
        return torch.empty(shape, dtype=DTYPES[dtype])
    found = torch.frombuffer(whole, dtype=DTYPES[dtype], count=prod(shape), offset=start + data_offsets[0])
    return found.view(shape)
