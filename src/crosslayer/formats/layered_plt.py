"""Per-layer transcoders trained elsewhere: one PyTorch state dict a layer, or one safetensors file.

The module of layer l is `decoder(relu(encoder(norm(x))))`, all three with weight and bias as `torch.nn` stores them: a
LayerNorm of width D, `Linear(D, F)` and `Linear(F, D)`. Layer l is the number in the file's name.

Axes: F features a layer, D d_model.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosslayer.coders.input_norm import LayerNorm
from crosslayer.coders.sparsity import ReLU
from crosslayer.coders.transcoder import CrossLayerTranscoder, Provenance
from crosslayer.errors import UserError
from crosslayer.files import read_tensors
from crosslayer.formats.checks import check_read, checked, matrix_shape
from crosslayer.wiring import Wiring

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
NAMES = ("enc.0", "enc.1", "dec")
UNWRITTEN = ("keep", "zero")


@torch.no_grad()
def read_layered_plt(
    path: Path,
    *,
    names: Sequence[str] = NAMES,
    target_offset: int = 1,
    unwritten: str = "keep",
    norm_eps: float = LayerNorm.eps,
    read: str = "resid",
) -> CrossLayerTranscoder:
    """A folder of transcoders, a file a layer, as one run of the same function, in float32.

    The norm's gain and bias are folded into the encoders; what cannot be folded, centring and dividing, stays as the
    run's `input_norm`. Files are read one at a time.

    With `target_offset` 1 the files are those of all layers but the last: nobody writes to layer 0, and the last layer
    has no features. The first position has no value (see `read_circuit_tracer`).

    Args:
        path: the folder.
        names: prefixes, in the files, of the norm, the encoder and the decoder.
        target_offset: how many layers after the one that is read lies the MLP whose output was the target: 0 or 1.
        unwritten: `keep` the original MLP where nobody writes, or write `zero` there.
        norm_eps: the LayerNorms' eps, which a state dict does not hold.
        read: the site that was read.

    Raises:
        UserError: naming the file and the tensor, layer or setting that is missing, wrong or one too many.
    """
    path = Path(path)
    if unwritten not in UNWRITTEN:
        raise UserError(f"unwritten is {unwritten!r}; choose one of {', '.join(UNWRITTEN)}")
    if target_offset not in (0, 1):
        raise UserError(f"target_offset is {target_offset}; choose 0 (a layer's own MLP) or 1 (the next layer's)")
    site, files = check_read(read), _files(path)
    wiring = Wiring(len(files) + target_offset, 1, target_offset)
    kept = [t for t in range(wiring.n_layers) if unwritten == "keep" and not wiring.n_sources(t)]
    shapes = _shapes(files[0], _read(files[0]), names)
    F, D = shapes[f"{names[1]}.weight"]
    coder = CrossLayerTranscoder(wiring, D, F, ReLU(), input_norm=LayerNorm(norm_eps), kept_layers=kept)
    for i, file in enumerate(files):
        tensors = _read(file)
        with _naming(tensors):
            _fill(coder, i, checked(file, tensors, shapes), names)
    coder.provenance = Provenance(read=site)
    return coder


def _files(folder: Path) -> list[Path]:
    """The file of every layer, from 0 on."""
    found = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES) if folder.is_dir() else []
    if not found:
        raise UserError(f"{folder}: holds no {', '.join(SUFFIXES)} file; give the folder that has one for every layer")
    by_layer: dict[int, Path] = {}
    for file, layer in zip(found, _layers(found), strict=True):
        if layer in by_layer:
            raise UserError(f"{folder}: {by_layer[layer].name} and {file.name} are both of layer {layer}; keep one")
        by_layer[layer] = file
    missing = next(layer for layer in count() if layer not in by_layer)
    if missing < len(by_layer):
        last = by_layer[max(by_layer)].name
        raise UserError(f"{folder}: has no file of layer {missing}, but {last}; all layers from 0 on are wanted")
    return [by_layer[layer] for layer in range(missing)]


def _layers(files: Sequence[Path]) -> list[int]:
    """The layer of every file: the one number in its name that is not the same in all names."""
    rows = [[int(digits) for digits in re.findall(r"\d+", file.stem)] for file in files]
    for file, row in zip(files, rows, strict=True):
        if not row or len(row) != len(rows[0]):
            raise UserError(f"{file}: its name should hold its layer's number, and as many as {files[0].name} in all")
    columns = list(zip(*rows, strict=True))
    differing = [column for column in columns if len(set(column)) > 1] or columns
    if len(differing) > 1:
        raise UserError(f"{files[-1]}: several numbers in its name may be the layer's; rename the files to layer_0 ...")
    return list(differing[0])


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, and nothing but tensors."""
    state = read_tensors(file)[0] if file.suffix == ".safetensors" else _unpack(file)
    for name, value in state.items():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        if not (isinstance(kind, torch.dtype) and kind.is_floating_point):
            raise UserError(f"{file}: {name} is {kind}, no tensor of weights; save the state dict alone")
    return state


def _unpack(file: Path) -> dict[str, Any]:
    """What a file of torch.save holds, without its code: tensors and plain containers."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # as many kinds as there are ways to damage a file
        raise UserError(
            f"{file}: is no state dict, or is damaged ({type(error).__name__}); save module.state_dict() with "
            "torch.save, as nothing else is unpickled"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{file}: holds a {type(state).__name__}; save module.state_dict() with torch.save")
    return state


def _shapes(file: Path, first: dict[str, Tensor], names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Every tensor that a file must hold; a linear layer may lack its bias, in all files alike."""
    norm, encoder, decoder = names
    with _naming(first):
        F, D = matrix_shape(file, first, f"{encoder}.weight")
    biases = {f"{encoder}.bias": (F,), f"{decoder}.bias": (D,)}
    shapes = {f"{norm}.weight": (D,), f"{norm}.bias": (D,), f"{encoder}.weight": (F, D), f"{decoder}.weight": (D, F)}
    return shapes | {name: shape for name, shape in biases.items() if name in first}


@contextmanager
def _naming(tensors: dict[str, Tensor]) -> Iterator[None]:
    """Add to an error what the file holds, and how to say what that is."""
    try:
        yield
    except UserError as error:
        held = ", ".join(list(tensors)[:8])
        raise UserError(f"{error}; it holds {held} (--names says which are LayerNorm, encoder and decoder)") from None


def _fill(coder: CrossLayerTranscoder, i: int, tensors: dict[str, Tensor], names: Sequence[str]) -> None:
    """Copy one file's weights, in place, with the norm's gain and bias in the encoder's."""
    norm, encoder, decoder = names
    gain, shift, W = (tensors[name].double() for name in (f"{norm}.weight", f"{norm}.bias", f"{encoder}.weight"))
    coder.W_enc[i].copy_(W * gain)
    coder.b_enc[i].copy_(W @ shift + tensors.get(f"{encoder}.bias", 0))
    coder.W_dec[i].copy_(tensors[f"{decoder}.weight"].T[:, None])
    coder.b_dec[coder.wiring.targets(i).start] = tensors.get(f"{decoder}.bias", 0)
