"""Verbs that exchange transcoders and activations with other tools."""

from inspect import signature
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from crosslayer.activations.from_batches import store_batches
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.data.load import load_data
from crosslayer.errors import UserError
from crosslayer.files import check_folder, claim_folder
from crosslayer.formats import (
    read_circuit_tracer,
    read_eleuther,
    read_gemma_scope,
    read_layered_batches,
    read_layered_plt,
    write_circuit_tracer,
    write_eleuther,
)
from crosslayer.model_options import AS_IT_IS
from crosslayer.models.load import LoadedModel
from crosslayer.report import remarks, store_table, training_from
from crosslayer.verbs.arguments import Loading, Overwrite, Run
from crosslayer.workflow import RUN_FILES, adopt

LAYERED_BATCHES = "layered-batches"
READERS: dict[str, Any] = {
    "eleuther": read_eleuther,
    "circuit-tracer": read_circuit_tracer,
    "gemma-scope": read_gemma_scope,
    "layered-plt": read_layered_plt,
}
WRITERS: dict[str, Any] = {"eleuther": write_eleuther, "circuit-tracer": write_circuit_tracer}


def import_(
    format: Annotated[Positional[str], arg(metavar="FORMAT", help=f"One of {', '.join(READERS)}, {LAYERED_BATCHES}.")],
    source: Annotated[Positional[Path], arg(metavar="SRC", help="Folder to read.")],
    out: Annotated[Path, arg(help="Folder of the run, or of the store, to write.")],
    model: Annotated[str | None, arg(help="Model it is of; its writes at first positions are measured.")] = None,
    data: Annotated[str | None, arg(help="Data to measure that on.")] = None,
    read: Annotated[
        str | None, arg(help="Site that was read, resid or mlp_in, where it is not what the format says.")
    ] = None,
    names: Annotated[
        tuple[str, str, str] | None,
        arg(help="layered-plt: what LayerNorm, encoder and decoder are called; enc.0 enc.1 dec by default."),
    ] = None,
    target_offset: Annotated[
        int | None,
        arg(help="layered-*: what file or folder l writes is the output of MLP l + 1 (1, the default) or of l (0)."),
    ] = None,
    unwritten: Annotated[
        str | None,
        arg(help="layered-plt: a layer that no file writes to can keep its own MLP (keep, the default) or write zero."),
    ] = None,
    norm_eps: Annotated[float | None, arg(help="layered-plt: eps of the LayerNorms, 1e-5 by default.")] = None,
    store_dtype: Annotated[
        str | None, arg(help="layered-batches: form of the store, bf16 (default), fp32 or int8.")
    ] = None,
    overwrite: Overwrite = False,
    loading: Loading = AS_IT_IS,
) -> None:
    """Turn transcoders trained elsewhere into a run that every verb takes, or foreign activations into a store.

    layered-plt: one PyTorch state dict (or safetensors file) a layer, of LayerNorm, linear encoder, ReLU and linear
    decoder; the number in a file's name is its layer's.

    layered-batches: folders L0, L1, ... of batch_{i}_x.pt and batch_{i}_y.pt, or of batch_{i}.pt with 'x' and
    'targets'. With --model the reads and writes are proved to be its MLPs' own, and writes that are missing are
    computed.
    """
    check_folder(out, overwrite)
    settings = {"read": read, "names": names, "target_offset": target_offset, "unwritten": unwritten}
    settings |= {"norm_eps": norm_eps, "store_dtype": store_dtype, "data": data}
    if format == LAYERED_BATCHES:
        loaded = None if model is None else loading.load(model)
        _import_batches(source, out, loaded, overwrite, **_settings_of(_import_batches, format, settings))
        return
    reader = _format(READERS, format)
    coder = reader(source, **_settings_of(reader, format, {**settings, "data": None}))
    if (model is None) != (data is None):
        raise UserError("give --model and --data together, or neither")
    if model is not None and data is not None:
        loaded = loading.load(model, coder.provenance.read)
        adopt(loaded, load_data(data, model=loaded), coder)
    claim_folder(out, overwrite, RUN_FILES)
    coder.save(out)
    sizes = f"{out}: {coder.wiring.n_layers} layers of {coder.d_transcoder:,} features"
    named = "" if coder.provenance.model_id else " --model MODEL"
    print("\n".join([sizes, *remarks(coder), f"next: crosslayer evaluate {out}{named}"]))


def _import_batches(
    source: Path, out: Path, model: LoadedModel | None, overwrite: bool, *, target_offset: int = 1, store_dtype="bf16"
) -> None:
    batches = read_layered_batches(source, target_offset)
    store = store_batches(batches, out, model=model, dtype=store_dtype, overwrite=overwrite)
    print(store_table(store) + training_from(store, "MODEL" if model is None else model.id))


def export(
    format: Annotated[Positional[str], arg(metavar="FORMAT", help=f"One of {', '.join(WRITERS)}.")],
    run: Run,
    out: Annotated[Path, arg(help="Folder to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Write a run in another tool's format."""
    write = _format(WRITERS, format)
    write(CrossLayerTranscoder.load(run), out, overwrite=overwrite)
    print(f"{out}: written for {format}")


def _format(formats: dict[str, Any], name: str) -> Any:
    if name not in formats:
        raise UserError(f"format is {name!r}; choose one of {', '.join(formats)}")
    return formats[name]


def _settings_of(reader: Any, format: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given, all of which must be this reader's."""
    given = {name: value for name, value in settings.items() if value is not None}
    if foreign := given.keys() - signature(reader).parameters:
        raise UserError(f"--{min(foreign).replace('_', '-')} is given, but {format} has no use for it; leave it out")
    return given
