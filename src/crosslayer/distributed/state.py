"""What a training of many ranks leaves on disk: its state while it runs, and its run in the end."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from crosslayer.coders.checkpoint import CONFIG
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
ACROSS = ("density", "coder.thresholds")
"""Tensors whose features are the second axis; they are kept the other way round."""
HELD_BY_ALL = ("b_dec.", "first_write.", "W_skip.", "cut")
"""How the names of a run's tensors begin that every rank has in whole."""


class ShardedState:
    """Keeps the state of a training as a checkpoint of all ranks, to which each writes its rows.

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
        saved = load(self.run / CHECKPOINT, lambda name, shape, kind: self._empty(name in header["rows"], shape, kind))
        tensors = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in saved.tensors.items()}
        return kept({n: (t.T.contiguous() if n in ACROSS else t).to(device) for n, t in tensors.items()}, header)

    def save(self, trainer: Trainer, place: Place) -> None:
        """See `States.save`; returns once the state is copied, and writes it meanwhile."""
        if self._saving is None:
            with hearing():
                self._saving = Checkpointer(self.run / CHECKPOINT, timedelta(seconds=self.mesh.timeout))
        tensors, rows = trainer.state()[0], _rows(trainer)
        spread = {n: spread_rows(self.mesh, t.T if n in ACROSS else t) if n in rows else t for n, t in tensors.items()}
        with hearing():
            self._saving.save(spread, {**header_of(trainer, place, self.context), "rows": sorted(rows)})

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
            found = "is finished already" if (self.run / CONFIG).is_file() else "holds no checkpoint of several ranks"
            raise UserError(f"{self.run}: {found}; start without --resume")
        header = read_header(self.run / CHECKPOINT)
        check_same(header, config, self.context, self.run)
        return header

    def _empty(self, is_split: bool, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if not is_split:
            return torch.empty(shape, dtype=dtype)
        return spread_rows(self.mesh, torch.empty(shape[0] // self.mesh.n_feature, *shape[1:], dtype=dtype))


def export_rows(mesh: Mesh, path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a run of which each rank holds some rows; see `crosslayer.coders.checkpoint.write_run`."""
    spread = {n: t if n.startswith(HELD_BY_ALL) else spread_rows(mesh, t) for n, t in tensors.items()}
    export_run(path, config, spread)


def spread_rows(mesh: Mesh, rows: Tensor) -> Tensor:
    """The tensor of which the feature ranks hold these rows each, and the data ranks the same."""
    return DTensor.from_local(rows.contiguous(), mesh.devices, (Replicate(), Shard(0)), run_check=False)


def _rows(trainer: Trainer) -> set[str]:
    """Names of the tensors of a state of which a rank has some rows: parameters, their moments, what goes with them."""
    shared = trainer.coder.held_by_all()
    own = {id(p) for p in trainer.coder.parameters() if not any(p is other for other in shared)}
    names = {f"coder.{name}" for name, p in trainer.coder.named_parameters() if id(p) in own}
    for number, optimizer in enumerate(trainer.optimizers):
        for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            names |= {f"optimizer.{number}.{index}.{key}" for key in ("exp_avg", "exp_avg_sq") if id(p) in own}
    return {name for name in (*names, *ACROSS) if name in trainer.state()[0]}
