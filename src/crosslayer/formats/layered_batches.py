"""Activations captured for per-layer transcoders: a folder a layer, with a file or two for every batch of tokens.

`L{l}/batch_{i}_x.pt` is the input of layer l's MLP and `batch_{i}_y.pt` the output of MLP l + offset, [B, T, D] or
[N, D]; or `L{l}/batch_{i}.pt` holds {'x': tensor, 'targets': [tensor, ...]} for MLPs l + offset, l + offset + 1, ...
The same batch is the same tokens in every layer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.errors import UserError


@dataclass(frozen=True)
class LayeredBatch:
    """N tokens at the layers whose reads, and those whose writes, are in the files."""

    x: Float[Tensor, "N X D"]
    y: Float[Tensor, "N Y D"]
    lengths: list[int]
    """Tokens of each prompt, in order; a file of [N, D] counts as one."""


@dataclass(frozen=True)
class LayeredBatches:
    """The files of such a capture, checked: every layer has the same batches, of the same shapes."""

    folder: Path
    x_layers: range
    y_layers: range
    batches: tuple[int, ...]
    target_offset: int
    d_model: int

    def __len__(self) -> int:
        return len(self.batches)

    def x_file(self, batch: int) -> Path:
        """The file that holds what the first layer reads."""
        return _files(self.folder, self.x_layers[0], self.batches[batch])[0]

    def __getitem__(self, batch: int) -> LayeredBatch:
        """The batch at this place; files are mapped into memory, and one batch of all layers is copied out."""
        number = self.batches[batch]
        layers = [_read(self.folder, layer, number) for layer in self.x_layers]
        x = torch.stack([x.flatten(0, -2) for x, _ in layers], 1)
        y = torch.stack([self._written(layers, target).flatten(0, -2) for target in self.y_layers], 1)
        shape = layers[0][0].shape
        return LayeredBatch(x, y, [shape[1]] * shape[0] if len(shape) == 3 else [shape[0]])

    def _written(self, layers: Sequence[tuple[Tensor, list[Tensor]]], target: int) -> Tensor:
        """A layer's write: the nearest target of the layer before it, or a farther one of the last layer."""
        source = min(target - self.target_offset, self.x_layers[-1])
        return layers[source - self.x_layers[0]][1][target - self.target_offset - source]


def read_layered_batches(folder: Path, target_offset: int = 1) -> LayeredBatches:
    """Find and check the files of such a capture.

    Args:
        folder: holds `L0`, `L1`, ...
        target_offset: a `y` (or first target) of folder l is the output of MLP l + this.

    Raises:
        UserError: naming the first file that is missing, damaged, or of another shape than its fellows.
    """
    if target_offset < 0:
        raise UserError(f"target_offset is {target_offset}; choose 0 (the layer's own MLP) or more")
    layers = _layers(folder)
    batches = _batches(folder, layers[0])
    for layer in layers[1:]:
        if unequal := set(batches) ^ set(_batches(folder, layer)):
            raise UserError(f"{folder}: batch {min(unequal)} is not in both L{layers[0]} and L{layer}; complete them")
    d_model, n_targets = _sizes(folder, layers, batches)
    last = max(layer + n for layer, n in zip(layers, n_targets, strict=True)) + target_offset
    y_layers = range(layers[0] + target_offset, last)
    found = LayeredBatches(folder, layers, y_layers, tuple(batches), target_offset, d_model)
    _check_repeated(found)
    return found


def _layers(folder: Path) -> range:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the one that holds L0, L1, ...")
    numbers = sorted(int(path.name[1:]) for path in folder.iterdir() if re.fullmatch(r"L\d+", path.name))
    if not numbers:
        raise UserError(f"{folder}: holds no folders L0, L1, ...; give the one that does")
    for number, following in pairwise(numbers):
        if following != number + 1:
            raise UserError(f"{folder / f'L{number + 1}'}: is missing between L{number} and L{following}")
    return range(numbers[0], numbers[-1] + 1)


def _batches(folder: Path, layer: int) -> list[int]:
    """The numbers of a layer's batches, each with all its files."""
    names = {path.name for path in (folder / f"L{layer}").iterdir()}
    numbers = {int(match[1]) for name in names if (match := re.fullmatch(r"batch_(\d+)(?:_[xy])?\.pt", name))}
    if not numbers:
        raise UserError(f"{folder / f'L{layer}'}: holds no batch_0_x.pt or batch_0.pt")
    for number in sorted(numbers):
        for file in _files(folder, layer, number):
            if not file.is_file():
                raise UserError(f"{file}: is missing")
    return sorted(numbers)


def _files(folder: Path, layer: int, batch: int) -> list[Path]:
    one = folder / f"L{layer}" / f"batch_{batch}.pt"
    return [one] if one.is_file() else [one.with_name(f"batch_{batch}_{array}.pt") for array in "xy"]


def _sizes(folder: Path, layers: range, batches: list[int]) -> tuple[int, list[int]]:
    """Width, and targets of each layer, once all tensors of a batch agree in shape, and all batches in those."""
    first = [_read(folder, layer, batches[0]) for layer in layers]
    width, n_targets = first[0][0].shape[-1], [len(targets) for _, targets in first]
    for batch in batches:
        shape = _read(folder, layers[0], batch)[0].shape
        for layer, n in zip(layers, n_targets, strict=True):
            files, (x, targets) = _files(folder, layer, batch), _read(folder, layer, batch)
            _check(files[0], x, shape, width)
            for target in targets:
                _check(files[-1], target, shape, width)
            if len(targets) != n or not (n or layer == layers[-1]):
                raise UserError(f"{files[-1]}: has {len(targets)} targets; {n or 'at least 1'} are wanted")
    return width, n_targets


def _check(file: Path, tensor: Tensor, shape: torch.Size, width: int) -> None:
    if tensor.shape != shape or shape[-1] != width or len(shape) not in (2, 3):
        raise UserError(
            f"{file}: has shape {list(tensor.shape)}; its batch has {list(shape)} elsewhere, of width {width}: "
            "[B, T, D] or [N, D], the same in every layer, is wanted"
        )


def _check_repeated(found: LayeredBatches) -> None:
    """A layer's write that several folders hold must be the same in all: the batch is the same tokens."""
    number = found.batches[0]
    layers = [_read(found.folder, layer, number) for layer in found.x_layers]
    for layer, (_, targets) in zip(found.x_layers, layers, strict=True):
        for i, target in enumerate(targets):
            if not torch.equal(target, found._written(layers, layer + found.target_offset + i)):
                file = _files(found.folder, layer, number)[0]
                raise UserError(
                    f"{file}: target {i} is not what another folder has for MLP {layer + found.target_offset + i}"
                )


def _read(folder: Path, layer: int, batch: int) -> tuple[Tensor, list[Tensor]]:
    """What a layer read, and the targets of it."""
    files = _files(folder, layer, batch)
    if len(files) == 2:
        x, y = (_load(file) for file in files)
        return _tensor(files[0], x), [_tensor(files[1], y)]
    found = _load(files[0])
    if not isinstance(found, dict) or not isinstance(found.get("targets"), list | tuple):
        raise UserError(f"{files[0]}: needs a dict with 'x' and a list of 'targets'")
    return _tensor(files[0], found.get("x")), [_tensor(files[0], target) for target in found["targets"]]


def _load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # those of pickle among them, which is imported nowhere here
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{file}: cannot be read as tensors ({reason}); copy or save it again") from None


def _tensor(file: Path, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise UserError(f"{file}: holds {type(value).__name__}, a tensor of floating-point numbers is wanted")
    return value
