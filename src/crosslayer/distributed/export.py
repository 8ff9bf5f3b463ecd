"""A run folder written by many ranks, each its own rows: no process ever holds more than its part of the coder.

The files are what one process would have written, byte for byte: every rank writes its rows straight to where they
belong in the safetensors file (a length, a JSON header, then the tensors one after another in row-major order). Where
ranks hold columns, they swap them for rows, some at a time.
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
from torch.distributed.tensor import DTensor, Shard

from crosslayer.coders.checkpoint import complete_run, plan_files
from crosslayer.distributed.group import RankGroup
from crosslayer.errors import UserError
from crosslayer.files import UNFINISHED, sync
from crosslayer.team import ALONE, shares, together

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
        tensors: by name, the same names in the same order on all ranks: DTensors of which one axis is sharded, evenly
            unless it is the first, or that are replicated, or plain tensors that are equal on all ranks. On any device.

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
    """Write what is this rank's to write of a file; one that cannot still swaps, as others wait for its columns."""
    problem = None
    for name, begin in layout.begins.items():
        row_bytes = math.prod(tensors[name].shape[1:]) * tensors[name].element_size()
        for rows, first in _own_rows(tensors[name].detach()):
            try:
                if problem is None:
                    _write(part, begin + first * row_bytes, rows)
            except OSError as error:
                problem = error
    if problem is not None:
        raise problem
    sync(part)


def _own_rows(tensor: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Rows that this rank writes and the number of the first of them; each row is written by one rank."""
    if not isinstance(tensor, DTensor):
        if _is_first():
            yield tensor, 0
        return
    place, kinds = tensor.device_mesh.get_coordinate(), tensor.placements
    if place is None or any(place[axis] for axis, kind in enumerate(kinds) if kind.is_replicate()):
        return
    split = [(axis, kind.dim) for axis, kind in enumerate(kinds) if isinstance(kind, Shard) and kind.dim]
    if split:
        yield from _swapped(tensor, *split[0])
    else:
        chunk = tensor.__create_chunk_list__()[0]
        yield tensor.to_local(), chunk.offsets[0] if chunk.offsets else 0


def _swapped(tensor: DTensor, mesh_axis: int, axis: int) -> Iterator[tuple[Tensor, int]]:
    """This rank's share of the rows, some at a time, from ranks that hold them cut along another axis."""
    group = RankGroup(tensor.device_mesh.get_group(mesh_axis))
    own, all_rows = tensor.to_local(), shares(group.size, len(tensor))
    step = max(1, PIECE // (math.prod(tensor.shape[1:]) * tensor.element_size()))
    for start in range(0, max(map(len, all_rows)), step):
        rows = [mine[start : start + step] for mine in all_rows]
        parts = group.swap([own[some.start : some.stop] for some in rows])
        yield torch.cat(list(parts), axis), rows[group.rank].start


def _write(part: Path, place: int, rows: Tensor) -> None:
    with part.open("r+b", buffering=0) as file:
        file.seek(place)
        for piece in rows.reshape(-1).split(PIECE // rows.element_size()):
            left: Any = piece.cpu().view(torch.uint8).numpy()
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
    with together(RankGroup(dist.group.WORLD) if dist.is_initialized() else ALONE.everyone):
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{path}: cannot write ({error.strerror}); free some room or choose another folder"
            ) from error
