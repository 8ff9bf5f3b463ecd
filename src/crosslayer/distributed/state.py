"""What a training of many ranks leaves on disk: its state while it runs, and its run in the end."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from crosslayer.coders.checkpoint import CONFIG
from crosslayer.coders.sharing import Sharing, axis_of
from crosslayer.distributed.checkpoint import Checkpointer, has_checkpoint, load, read_header, remove
from crosslayer.distributed.export import export_run
from crosslayer.distributed.group import team_of
from crosslayer.distributed.mesh import Mesh, hearing
from crosslayer.errors import UserError
from crosslayer.files import sweep
from crosslayer.team import together
from crosslayer.training.config import TrainConfig
from crosslayer.training.state import Kept, check_same, header_of, kept, truncate_log
from crosslayer.training.stream import Place
from crosslayer.training.trainer import Trainer

CHECKPOINT = "checkpoint"
"""Folder, in that of the run, of the state."""


class ShardedState:
    """Keeps the state of a training as a checkpoint of all ranks, to which each writes its share.

    Args:
        run: folder of the run.
        context: what else must be the same for a resume to make sense (model, data); JSON values.
        mesh: the ranks.
    """

    def __init__(self, run: Path, context: dict[str, Any], mesh: Mesh):
        self.run, self.context, self.mesh, self.everyone = run, context, mesh, team_of(mesh).everyone
        self._saving: Checkpointer | None = None

    def load(self, config: TrainConfig, device: torch.device) -> Kept:
        """See `States.load`; the checkpoint may be one of another number of ranks."""
        header: dict[str, Any] = {}
        with together(self.everyone):
            header = self._header(config)
        with together(self.everyone):
            if self.everyone.rank == 0:
                sweep(self.run)
                truncate_log(self.run, header)
        axes = header["axes"]
        with hearing():
            saved = load(self.run / CHECKPOINT, lambda name, shape, kind: self._empty(axes.get(name), shape, kind))
        tensors = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in saved.tensors.items()}
        return kept({name: tensor.to(device) for name, tensor in tensors.items()}, header)

    def save(self, trainer: Trainer, place: Place) -> None:
        """See `States.save`; returns once the state is copied, and writes it meanwhile."""
        if self._saving is None:
            with hearing():
                self._saving = Checkpointer(self.run / CHECKPOINT, timedelta(seconds=self.mesh.timeout))
        tensors, header = trainer.state()[0], header_of(trainer, place, self.context)
        spread = {name: spread_over(self.mesh, tensor, header["axes"].get(name)) for name, tensor in tensors.items()}
        with hearing():
            self._saving.save(spread, header)

    def close(self) -> None:
        """See `States.close`."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with hearing():
                saving.close()

    def remove(self) -> None:
        """See `States.remove`."""
        with together(self.everyone):
            if self.everyone.rank == 0:
                remove(self.run / CHECKPOINT)

    def _header(self, config: TrainConfig) -> dict[str, Any]:
        if not has_checkpoint(self.run / CHECKPOINT):
            found = "is finished already" if (self.run / CONFIG).is_file() else "holds no state to resume from"
            raise UserError(f"{self.run}: {found}; start without --resume")
        header = read_header(self.run / CHECKPOINT)
        check_same(header, config, self.context, self.run)
        return header

    def _empty(self, axis: int | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        sizes = list(shape)
        if axis is not None:
            sizes[axis] //= self.mesh.n_feature
        return spread_over(self.mesh, torch.empty(sizes, dtype=dtype), axis)


def export_shares(mesh: Mesh, sharing: Sharing, path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a run of which each rank holds a share; see `crosslayer.coders.checkpoint.write_run`."""
    export_run(path, config, {name: spread_over(mesh, t, axis_of(sharing, name)) for name, t in tensors.items()})


def spread_over(mesh: Mesh, own: Tensor, axis: int | None) -> Tensor:
    """The tensor of which the feature ranks hold these parts along an axis, the data ranks the same; None: whole."""
    if axis is None:
        return own
    kinds = (Replicate(), Shard(axis % own.dim()))
    return DTensor.from_local(own.contiguous(), mesh.devices, kinds, run_check=False)
