"""A run folder written by many ranks, each its own rows: no process ever holds more than its part of the coder.

The files are what one process would have written, byte for byte: every rank writes its rows straight to where they
belong in the safetensors file (a length, a JSON header, then the tensors one after another in row-major order).
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from crosslayer.coders.checkpoint import complete_run, plan_files
from crosslayer.errors import UserError
from crosslayer.files import UNFINISHED, sync

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Names of safetensors; its files are sorted by type, the last of these first, and then by name."""
PIECE = 64 << 20
"""Bytes that are copied from a device at a time."""


def export_run(path: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a run as `coders.checkpoint.write_run` does, by all ranks together; all must see the same file system.

    Args:
        path: folder of the run, made where it does not exist.
        config: JSON values.
        tensors: by name, the same names in the same order on all ranks: DTensors whose first axis is sharded or that
            are replicated, or plain tensors that are equal on all ranks. On any device.

    Raises:
        UserError: on all ranks, when the file system refuses one of them.
    """
    plan = plan_files(tensors)
    layouts = {
        file: _layout({name: tensors[name] for name in names}) for file, names in plan.filename_to_tensors.items()
    }
    parts = {file: path / f".{file}{UNFINISHED}" for file in layouts}
    try:
        with _together(path):
            if _is_first():
                path.mkdir(parents=True, exist_ok=True)
                for file, layout in layouts.items():
                    _make(parts[file], layout)
        with _together(path):
            for file, layout in layouts.items():
                _fill(parts[file], layout, tensors)
        with _together(path):
            if _is_first():
                for file, part in parts.items():
                    os.replace(part, path / file)
                sync(path)
                complete_run(path, config, plan)
    finally:
        if _is_first():
            for part in parts.values():
                with suppress(OSError):
                    part.unlink()


@dataclass(frozen=True)
class _Layout:
    """Where the tensors of one file lie in it."""

    header: bytes
    begins: dict[str, int]
    """The byte at which a tensor begins."""
    size: int
    """Bytes of the file."""


def _layout(tensors: dict[str, Tensor]) -> _Layout:
    order = list(DTYPES)
    header, begins, end = {}, {}, 0
    for name in sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name)):
        begins[name], end = end, end + tensors[name].numel() * tensors[name].element_size()
        about = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape)}
        header[name] = {**about, "data_offsets": [begins[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    begins = {name: start + begin for name, begin in begins.items()}
    return _Layout(len(text).to_bytes(8, "little") + text, begins, start + end)


def _make(part: Path, layout: _Layout) -> None:
    with part.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.size)


def _fill(part: Path, layout: _Layout, tensors: Mapping[str, Tensor]) -> None:
    """Write what is this rank's to write of a file."""
    with part.open("r+b", buffering=0) as file:
        for name, begin in layout.begins.items():
            rows, first = _own_rows(tensors[name])
            row_bytes = math.prod(tensors[name].shape[1:]) * tensors[name].element_size()
            file.seek(begin + first * row_bytes)
            for piece in rows.reshape(-1).split(PIECE // rows.element_size()):
                _write_all(file, piece)
        os.fsync(file.fileno())


def _own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows that this rank writes, maybe none, and the number of the first; each row is written by one rank."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return (tensor if _is_first() else tensor.new_empty(0)), 0
    place = tensor.device_mesh.get_coordinate()
    kinds = tensor.placements
    assert all(kind.is_replicate() or kind.is_shard(0) for kind in kinds), f"{kinds} are not rows"
    if place is None or any(place[axis] for axis, kind in enumerate(kinds) if kind.is_replicate()):
        return tensor.to_local().new_empty(0), 0
    chunk = tensor.__create_chunk_list__()[0]
    return tensor.to_local(), chunk.offsets[0] if chunk.offsets else 0


def _write_all(file: Any, piece: Tensor) -> None:
    left = piece.cpu().view(torch.uint8).numpy()
    while len(left):
        left = left[file.write(left) :]


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def _together(path: Path) -> Iterator[None]:
    """Wait for all ranks at the end; what the file system refused one of them is an error of all.

    Raises:
        UserError: for that.
    """
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{path}: cannot write ({error.strerror}); free some room or choose another folder"
    problems = [problem]
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    if found := [problem for problem in problems if problem]:
        raise UserError(found[0])
