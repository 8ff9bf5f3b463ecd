"""Tensors of a file that stay on disk until they are touched, and that the system may drop again."""

import ctypes
import json
import mmap
import sys
from collections.abc import Iterable
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crosslayer.errors import UserError

NORESERVE = 0x4000
"""Linux's MAP_NORESERVE, which Python has no name for before 3.13."""
PAGEMAP = Path("/proc/self/pagemap")
"""What Linux tells of each page of this process: 8 bytes, see its Documentation/admin-guide/mm/pagemap.rst."""
PRESENT, SWAPPED, OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))
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


def give_back(tensors: Iterable[Tensor]) -> None:
    """Let go of what is in memory of tensors that are maps of a file; it is read again when it is next touched.

    The system maps whole folios around each page that is touched, many times what is used of a few rows. A tensor that
    has been written to, or that lies in no file, stays as it is, and so do all where the system does not tell. No other
    thread may write to them meanwhile.
    """
    if sys.platform != "linux":
        return
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.nbytes:
            first = tensor.data_ptr() // mmap.PAGESIZE
            n = -(-(tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE) - first
            if _as_in_file(first, n):
                start, length = (ctypes.c_size_t(pages * mmap.PAGESIZE) for pages in (first, n))
                ctypes.CDLL(None).madvise(start, length, mmap.MADV_DONTNEED)


def _as_in_file(first: int, n: int) -> bool:
    """Whether some of n pages are in memory, and all that are belong to a file: a private copy does not."""
    try:
        with PAGEMAP.open("rb", buffering=0) as file:
            file.seek(8 * first)
            told = file.read(8 * n)
    except OSError:
        return False
    if len(told) < 8 * n:
        return False
    pages = np.frombuffer(told, dtype=np.uint64)
    there = pages[(pages & (PRESENT | SWAPPED)) != 0]
    return len(there) > 0 and bool(((there & OF_FILE) != 0).all() and ((there & SWAPPED) == 0).all())
