"""A run on disk: `config.json` beside `model.safetensors`, sharded as the hub does past 5 GB. Nothing is unpickled."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Size, Tensor

from crosslayer.errors import UserError
from crosslayer.files import read_json, write_json, write_tensors
from crosslayer.mapped import map_tensors

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
FORMAT_VERSION = 1


def write_run(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the tensors, then the configuration, each atomically: a folder with `config.json` is complete.

    Args:
        path: folder of the run, made where it does not exist.
        config: JSON values; `format_version` is added.
        tensors: name to tensor, on any device.
    """
    plan = plan_files(tensors)
    for file, names in plan.filename_to_tensors.items():
        write_tensors(path / file, {name: tensors[name] for name in names})
    complete_run(path, config, plan)


def plan_files(tensors: Mapping[str, Tensor]) -> StateDictSplit:
    """Which file each tensor goes to, by shapes and types alone."""
    return split_torch_state_dict_into_shards(
        {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    )


def complete_run(path: Path, config: dict[str, Any], plan: StateDictSplit) -> None:
    """Write what tells where the tensors are, then the configuration, once the files of the plan are there."""
    if plan.is_sharded:
        write_json(path / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    else:
        (path / INDEX).unlink(missing_ok=True)  # of a sharded run that was here before
    write_json(path / CONFIG, {"format_version": FORMAT_VERSION, **config})


def read_run(source: str, revision: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration of a run, from a folder or the hub, and its tensors as maps of its files.

    Raises:
        UserError: when there is no run at `source`, or it is of another format version, or a file is damaged.
    """
    folder = run_folder(source, revision)
    config = read_json(folder / CONFIG)
    found = config.get("format_version") if isinstance(config, dict) else None
    if found != FORMAT_VERSION:
        raise UserError(
            f"{folder}: run format {found}, this crosslayer reads {FORMAT_VERSION}; retrain or re-export it"
        )
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        tensors |= map_tensors(folder / file)
    return config, tensors


def is_run(source: str) -> bool:
    """Whether this is the folder of a run, and not that of a model, whose configuration has the same name."""
    path = Path(source) / CONFIG
    return path.is_file() and "format_version" in read_json(path)


def run_folder(source: str, revision: str | None = None) -> Path:
    """The local folder of a run; anything that is not on disk and looks like `owner/name` is asked of the hub.

    Raises:
        UserError: when there is none.
    """
    folder = Path(source)
    if (folder / CONFIG).is_file():
        return folder
    if folder.exists():
        raise UserError(f"{folder}: holds no {CONFIG}, so it is no finished run; train one or resume its training")
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or folder.parent.is_dir():
        raise UserError(f"{source}: no such run; give the folder that `crosslayer train --out` wrote")
    try:
        return Path(snapshot_download(source, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{source}: no such run on disk, and the hub did not give it ({reason})") from None


def check_tensors(wanted: Mapping[str, Size], found: Mapping[str, Tensor]) -> None:
    """Refuse a set of tensors that lacks one, has one too many, or has one of another shape.

    Raises:
        UserError: naming the tensor.
    """
    for name, shape in wanted.items():
        if name not in found:
            raise UserError(f"tensor {name} is missing from the run")
        if found[name].shape != shape:
            raise UserError(f"tensor {name} has shape {list(found[name].shape)}; {list(shape)} is wanted")
    if extra := sorted(set(found) - set(wanted)):
        raise UserError(f"tensor {extra[0]} is in the run but its configuration has no place for it")


def _weight_files(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        return sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    return ["model.safetensors"]
