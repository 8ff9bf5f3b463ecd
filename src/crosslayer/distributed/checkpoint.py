"""The state of an unfinished training of many ranks: written beside the training, read onto any number of ranks.

A folder holds one checkpoint: `save-000007/`, safetensors files of which each rank writes its own, and `latest.json`,
which names that folder. What `latest.json` does not name does not count, so an end at any moment leaves the checkpoint
before. All ranks must see the same file system.

Built on torch.distributed.checkpoint with its safetensors storage, as its own pickles. (Its ranks exchange pickled
plans over the process group before they write or read; nothing of the sort comes from a file.)
"""

import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.distributed.checkpoint.state_dict_saver import async_save

from crosslayer.errors import UserError
from crosslayer.files import read_json, sweep, sync, write_json

LATEST = "latest.json"
SAVES = "save-{:06d}"
FORMAT_VERSION = 1
FILE_BYTES = 2 << 30
"""Bytes of the tensors in a set of files, one a rank; a rank holds what it writes of them in memory twice more."""
TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the slowest writer."""


class Checkpointer:
    """Saves the training state of all ranks again and again, at most one save at a time, while the training goes on.

    All ranks make one together, call `save` together and `close` it together; what earlier jobs have left unfinished is
    swept. It talks over a process group (gloo) of its own, so that the training may use the others at any time.

    Args:
        folder: where the checkpoint lies or will lie.
        timeout: how long a rank waits for the slowest writer.
    """

    def __init__(self, folder: Path, timeout: timedelta = TIMEOUT):
        self.folder = folder
        self.group: Any = dist.new_group(backend="gloo", timeout=timeout)
        self._number = _number(folder)
        self._running: Any = None
        if dist.get_rank() == 0:
            _clear_up(folder, self._number)
        dist.barrier(self.group)

    def save(self, tensors: Mapping[str, Tensor], header: dict[str, Any]) -> None:
        """Copy the state to the CPU and return; it is written meanwhile, after the one before is.

        Args:
            tensors: by name, the same on all ranks: DTensors, or plain tensors that are equal on all ranks.
            header: JSON values, the same on all ranks.

        Raises:
            UserError: when the one before could not be written.
        """
        self.wait()
        self._number += 1
        writer = _Writer(self.folder, self._number, header, _files(tensors))
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._running = async_save(dict(tensors), storage_writer=writer, planner=planner, process_group=self.group)

    def wait(self) -> None:
        """Return when the last state that was saved is on disk.

        Raises:
            UserError: when it could not be written; the one before it still counts then.
        """
        running, self._running = self._running, None
        try:
            if running:
                running.result()
        except CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            raise UserError(
                f"{self.folder}: rank {rank} could not write its part of the checkpoint ({cause}); "
                "the one before still counts; free some room or choose another folder"
            ) from error

    def close(self) -> None:
        """Wait for the save that is under way, and leave the process group.

        Raises:
            UserError: when it could not be written.
        """
        try:
            self.wait()
        finally:
            dist.destroy_process_group(self.group)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read."""

    tensors: dict[str, Tensor]
    header: dict[str, Any]


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint to load."""
    return (folder / LATEST).is_file()


def read_header(folder: Path) -> dict[str, Any]:
    """The header of the checkpoint, without its tensors.

    Raises:
        UserError: when there is no checkpoint, or it is of another version.
    """
    return _latest(folder)["header"]


def load(folder: Path, empty: Callable[[str, torch.Size, torch.dtype], Tensor] | None = None) -> Saved:
    """Read the checkpoint, onto as many ranks as there are now, or into one process without a process group.

    Args:
        folder: where a `Checkpointer` saved it.
        empty: makes the tensor to fill from its name, shape and type: a DTensor on any mesh, of which a rank reads what
            it holds, or a plain one, which is read whole. Plain ones on the CPU by default. The same on all ranks.

    Raises:
        UserError: when there is no checkpoint, it is of another version, or a file is missing or damaged.
    """
    latest = _latest(folder)
    saved = folder / SAVES.format(latest["number"])
    for file, size in latest["files"].items():
        found = (saved / file).stat().st_size if (saved / file).is_file() else 0
        if found != size:
            raise UserError(f"{saved / file}: has {found} bytes of {size}; copy the checkpoint again or start anew")
    tensors = {name: _make(empty, name, **about) for name, about in latest["tensors"].items()}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            read_tensors(tensors, storage_reader=HuggingFaceStorageReader(str(saved)), planner=planner)
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise UserError(f"{saved}: rank {rank} cannot read it ({cause}); copy the checkpoint again") from error
    return Saved(tensors, latest["header"])


def remove(folder: Path) -> None:
    """Remove a checkpoint that is no longer needed; by one rank, while no other saves or loads it."""
    (folder / LATEST).unlink(missing_ok=True)
    _clear_up(folder, 0)
    with suppress(OSError):  # there is something else in it
        folder.rmdir()


class _Writer(HuggingFaceStorageWriter):
    """Writes a state beside `latest.json`, and names it there once all ranks have written."""

    def __init__(self, folder: Path, number: int, header: dict[str, Any], files: dict[str, int]):
        super().__init__(str(folder / SAVES.format(number)), files, save_distributed=True)
        self.folder, self.number, self.header = folder, number, header

    def stage(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the CPU; torch's own leave out DTensors without dimensions."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state_dict.items()}

    def write_data(self, plan, planner):
        """Write this rank's part to the disk; torch's own leaves the end of a file in its buffer when it syncs."""
        written = super().write_data(plan, planner)
        for file in {result.storage_data.relative_path for result in written.wait()}:
            sync(Path(self.path) / file)
        sync(Path(self.path))
        return written

    def finish(self, metadata, results) -> None:
        """Make this the checkpoint that counts; on the first rank, when all have written."""
        saved = Path(self.path)
        tensors = {
            name: {"shape": list(about.size), "dtype": str(about.properties.dtype).removeprefix("torch.")}
            for name, about in metadata.state_dict_metadata.items()
            if isinstance(about, TensorStorageMetadata)
        }
        files = {file.name: file.stat().st_size for file in sorted(saved.iterdir())}
        latest = {"number": self.number, "header": self.header, "tensors": tensors, "files": files}
        write_json(self.folder / LATEST, {"format_version": FORMAT_VERSION, **latest})
        sync(self.folder)
        _clear_up(self.folder, self.number)


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The file, from 1 on, that each tensor goes to."""
    files, total = {}, 0
    for name, tensor in tensors.items():
        files[name] = total // FILE_BYTES + 1
        total += tensor.numel() * tensor.element_size()
    return files


def _make(empty: Callable | None, name: str, shape: list[int], dtype: str) -> Tensor:
    kind = getattr(torch, dtype)
    return empty(name, torch.Size(shape), kind) if empty else torch.empty(shape, dtype=kind)


def _latest(folder: Path) -> dict[str, Any]:
    if not has_checkpoint(folder):
        raise UserError(f"{folder}: holds no checkpoint to resume from; start anew")
    latest = read_json(folder / LATEST)
    found = latest["format_version"]
    if found != FORMAT_VERSION:
        raise UserError(f"{folder}: checkpoint format {found}, this crosslayer reads {FORMAT_VERSION}; start anew")
    return latest


def _number(folder: Path) -> int:
    """Of the checkpoint that counts; 0 without one."""
    return _latest(folder)["number"] if has_checkpoint(folder) else 0


def _clear_up(folder: Path, number: int) -> None:
    """Remove all that does not count; what cannot be removed now is the next one's."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    for saved in folder.glob("save-*"):
        if saved.name != SAVES.format(number):
            shutil.rmtree(saved, ignore_errors=True)
