"""The state of an unfinished training on disk: one safetensors file, replaced atomically, never pickled."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from crosslayer.coders.checkpoint import CONFIG
from crosslayer.coders.sharing import axis_of
from crosslayer.errors import UserError
from crosslayer.files import read_tensors, sweep, write_tensors, write_text
from crosslayer.training.config import TrainConfig
from crosslayer.training.scales import Scales
from crosslayer.training.stream import Place
from crosslayer.training.trainer import Trainer

STATE = "training_state.safetensors"
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Kept:
    """What the state of an unfinished training holds."""

    tensors: dict[str, Tensor]
    counters: dict[str, int]
    scales: Scales
    place: Place


@runtime_checkable
class States(Protocol):
    """Where the state of an unfinished training is kept; all processes of its team make the same calls."""

    def load(self, config: TrainConfig, device: torch.device) -> Kept:
        """What was kept, on `device`.

        Raises:
            UserError: when there is no state, or it belongs to another configuration, model or data set.
        """
        ...

    def save(self, trainer: Trainer, place: Place) -> None:
        """Keep everything that the rest of the training depends on."""
        ...

    def close(self) -> None:
        """Return when what was saved is on disk."""
        ...

    def remove(self) -> None:
        """Remove what is kept of a training that is finished."""
        ...


class StateFile:
    """Keeps the state of a training in one file of its run, as one process does.

    Args:
        run: folder of the run.
        context: what else must be the same for a resume to make sense (model, data); JSON values.
    """

    def __init__(self, run: Path, context: dict[str, Any]):
        self.run, self.context = run, context

    def load(self, config: TrainConfig, device: torch.device) -> Kept:
        """See `States.load`; log lines written after that state are dropped."""
        run = self.run
        if not (run / STATE).is_file():
            finished = (run / CONFIG).is_file()
            found = "is finished already" if finished else f"holds no {STATE} to resume from"
            raise UserError(f"{run}: {found}; start without --resume")
        sweep(run)
        tensors, metadata = read_tensors(run / STATE)
        header = json.loads(metadata["crosslayer"])
        check_same(header, config, self.context, run)
        truncate_log(run, header)
        return kept({name: tensor.to(device) for name, tensor in tensors.items()}, header)

    def save(self, trainer: Trainer, place: Place) -> None:
        """See `States.save`."""
        header = header_of(trainer, place, self.context)
        write_tensors(self.run / STATE, trainer.state()[0], {"crosslayer": json.dumps(header)})

    def close(self) -> None:
        """See `States.close`."""

    def remove(self) -> None:
        """See `States.remove`."""
        (self.run / STATE).unlink()


def read_state_header(file: Path) -> dict[str, Any]:
    """What a `StateFile` keeps beside the tensors.

    Raises:
        UserError: when the file is damaged.
    """
    return json.loads(read_tensors(file)[1]["crosslayer"])


def header_of(trainer: Trainer, place: Place, context: dict[str, Any]) -> dict[str, Any]:
    """What is kept beside the tensors: JSON values."""
    counters, axes = trainer.counters(), _axes(trainer)
    settings = {"config": trainer.config.record(), "context": context}
    return {**settings, "counters": counters, "place": vars(place), "axes": axes}


def _axes(trainer: Trainer) -> dict[str, int]:
    """The axis along which feature ranks share a tensor, or would: those of the coder, their moments, and densities."""
    coder, tensors = trainer.coder, trainer.state()[0]
    axes = {name: axis_of(coder.sharing, name) for name in tensors if name.startswith("coder.")}
    axis_by_id = {id(p): axis_of(coder.sharing, name) for name, p in coder.named_parameters()}
    for number, optimizer in enumerate(trainer.optimizers):
        for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            axes |= {f"optimizer.{number}.{index}.{key}": axis_by_id.get(id(p)) for key in ("exp_avg", "exp_avg_sq")}
    return {name: axis for name, axis in (axes | {"density": -1}).items() if name in tensors and axis is not None}


def kept(tensors: dict[str, Tensor], header: dict[str, Any]) -> Kept:
    """A state of its tensors and its header."""
    scales = Scales(**{name: tensors[f"scales.{name}"] for name in Scales.__dataclass_fields__})
    return Kept(tensors, header["counters"], scales, Place(**header["place"]))


def check_same(header: dict[str, Any], config: TrainConfig, context: dict[str, Any], run: Path) -> None:
    """Refuse the state of another training.

    Raises:
        UserError: naming the setting that differs.
    """
    kept, asked = {**header["config"], **header["context"]}, {**config.record(), **context}
    asked = json.loads(json.dumps(asked))
    for key in sorted(kept | asked):
        if kept.get(key) != asked.get(key):
            raise UserError(
                f"{run}: was started with {key} = {kept.get(key)}, now {asked.get(key)} is asked for; "
                "resume with the same settings or start another run"
            )


def truncate_log(run: Path, header: dict[str, Any]) -> None:
    """Drop the lines of the log that were written after a state."""
    path, step = run / METRICS, header["counters"]["step_number"]
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(path, "".join(kept))
