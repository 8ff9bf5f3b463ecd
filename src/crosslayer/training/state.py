"""The state of an unfinished training on disk: one safetensors file, replaced atomically, never pickled."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosslayer.coders.checkpoint import CONFIG
from crosslayer.errors import UserError
from crosslayer.files import read_tensors, sweep, write_tensors, write_text
from crosslayer.training.config import TrainConfig
from crosslayer.training.scales import Scales
from crosslayer.training.stream import Place
from crosslayer.training.trainer import Trainer

STATE = "training_state.safetensors"
METRICS = "metrics.jsonl"


def save_state(run: Path, trainer: Trainer, place: Place, context: dict[str, Any]) -> None:
    """Keep everything that the rest of the training depends on.

    Args:
        run: folder of the run.
        trainer: between two steps.
        place: where in the stream the next batch lies.
        context: what else must be the same for a resume to make sense (model, data); JSON values.
    """
    tensors, counters = trainer.state()
    header = {"config": trainer.config.record(), "context": context, "counters": counters, "place": vars(place)}
    write_tensors(run / STATE, tensors, {"crosslayer": json.dumps(header)})


@dataclass(frozen=True)
class Kept:
    """What the state of an unfinished training holds."""

    tensors: dict[str, Tensor]
    counters: dict[str, int]
    scales: Scales
    place: Place


def load_state(run: Path, config: TrainConfig, context: dict[str, Any], device: torch.device) -> Kept:
    """What was kept, on `device`; log lines written after that state are dropped.

    Raises:
        UserError: when there is no state, or it belongs to another configuration, model or data set.
    """
    if not (run / STATE).is_file():
        finished = (run / CONFIG).is_file()
        found = "is finished already" if finished else f"holds no {STATE} to resume from"
        raise UserError(f"{run}: {found}; start without --resume")
    sweep(run)
    tensors, metadata = read_tensors(run / STATE)
    header = json.loads(metadata["crosslayer"])
    _check_same({**header["config"], **header["context"]}, {**config.record(), **context}, run)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    scales = Scales(**{name: tensors[f"scales.{name}"] for name in Scales.__dataclass_fields__})
    _truncate_log(run / METRICS, header["counters"]["step_number"])
    return Kept(tensors, header["counters"], scales, Place(**header["place"]))


def _check_same(kept: dict[str, Any], asked: dict[str, Any], run: Path) -> None:
    asked = json.loads(json.dumps(asked))
    for key in sorted(kept | asked):
        if kept.get(key) != asked.get(key):
            raise UserError(
                f"{run}: was started with {key} = {kept.get(key)}, now {asked.get(key)} is asked for; "
                "resume with the same settings or start another run"
            )


def _truncate_log(path: Path, step: int) -> None:
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(path, "".join(kept))
