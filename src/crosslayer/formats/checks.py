"""What all formats check alike: a file's tensors, the site that is read, and what a coder must be to be exported."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Size, Tensor

from crosslayer.coders.checkpoint import check_tensors
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.files import read_tensors

READS = ("resid", "mlp_in")
Shapes = Mapping[str, Sequence[int]]


def read_checked(file: Path, wanted: Shapes) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which are exactly those wanted.

    Raises:
        UserError: naming the file, and the tensor that is missing, of another shape, or one too many.
    """
    return checked(file, read_tensors(file)[0], wanted)


def checked(file: Path, tensors: dict[str, Tensor], wanted: Shapes) -> dict[str, Tensor]:
    """The same for tensors that were read from `file` already."""
    try:
        check_tensors({name: Size(shape) for name, shape in wanted.items()}, tensors)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return tensors


def matrix_shape(file: Path, tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Rows and columns of the matrix that tells a format's sizes.

    Raises:
        UserError: when it is missing or is no matrix.
    """
    if name not in tensors:
        raise UserError(f"{file}: tensor {name} is missing")
    if tensors[name].ndim != 2:
        raise UserError(f"{file}: tensor {name} has shape {list(tensors[name].shape)}; a matrix is wanted")
    rows, columns = tensors[name].shape
    return rows, columns


def count_layers(folder: Path, *patterns: str) -> int:
    """How many layers a folder has files for, by the largest number in names such as `layer_{}.safetensors`.

    Raises:
        UserError: when there is none.
    """
    found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    numbers = [
        int(match[1])
        for pattern in patterns
        for name in found
        if (match := re.fullmatch(pattern.replace(".", r"\.").format(r"(\d+)"), name))
    ]
    if not numbers:
        raise UserError(f"{folder}: holds no {patterns[0].format(0)}; give the folder that has a file for every layer")
    return max(numbers) + 1


def check_read(read: str) -> str:
    """The site, which must be one of ours."""
    if read not in READS:
        raise UserError(f"read is {read!r}; choose one of {', '.join(READS)}")
    return read


def check_export(coder: CrossLayerTranscoder) -> None:
    """Refuse what no other format can hold.

    Raises:
        UserError: naming it.
    """
    if coder.input_scale is not None:
        raise UserError("this transcoder is still in training, with scales of its own; fold them before exporting it")
    if coder.input_norm is not None:
        raise UserError(f"this transcoder reads x through a {coder.input_norm}, which this format has no place for")
    if coder.kept_layers:
        raise UserError(f"this transcoder keeps the MLP of layer {coder.kept_layers[0]}, which this format cannot say")
    if getattr(coder.decoder.settings, "topk_coalesced", None) is not None:
        raise UserError("topk_coalesced makes a target choose among features, which this format has no place for")
