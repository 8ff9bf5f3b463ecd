"""A store from activations that were captured elsewhere, proved and completed by the model where it is at hand."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from crosslayer.activations.manifest import Manifest, write_manifest
from crosslayer.activations.rows import NOT_KNOWN, UNKNOWN, Rows
from crosslayer.activations.store import Store
from crosslayer.activations.writer import SHARD_BYTES, STORE_FILES, StoreWriter, check_room
from crosslayer.errors import UserError
from crosslayer.files import claim_folder
from crosslayer.formats import LayeredBatches
from crosslayer.models.load import LoadedModel

CHUNK_BYTES = 2**30
"""What a chunk of the store takes in memory, about."""
OFFSETS = (0, 1, 2)
"""Target offsets that are tried where the one given is wrong."""
CLOSE = 0.05
"""Relative gap, up to which a write counts as an MLP's own: half precision leaves about 0.01."""


def store_batches(
    source: LayeredBatches,
    out: str | Path,
    *,
    model: LoadedModel | None = None,
    dtype: str = "bf16",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Store:
    """Keep a foreign capture as a store, one batch of all layers in memory at a time.

    With the model it is proved that the reads are what its MLPs read and the writes what they make of it, and writes
    that are missing are computed from the reads of their layer. Prompts start where the files start, or where
    [B, T, D] says; token ids and modalities are not known.

    Args:
        source: its files.
        out: folder of the store.
        model: that the activations are of.
        dtype: fp32, bf16 or int8.
        shard_bytes: size that a file does not pass.
        overwrite: replace the store that `out` holds.

    Raises:
        UserError: when the model is another one, and as `capture_to_store` does.
    """
    completed = sorted({*source.y_layers, *(() if model is None else source.x_layers)})
    n_layers = 1 + max(source.x_layers[-1], source.y_layers[-1])
    if model is not None:
        _prove(source, model)
        n_layers = model.n_layers
    manifest = Manifest(
        model="" if model is None else model.id,
        revision="" if model is None else model.revision,
        n_layers=n_layers,
        d_model=source.d_model,
        x_layers=list(source.x_layers),
        y_layers=completed,
        dtype=dtype,
        source={"folder": str(source.folder), "target_offset": source.target_offset, "shard_bytes": shard_bytes},
    )
    folder = Path(out)
    check_room(folder, manifest, len(source) * sum(source[0].lengths))
    claim_folder(folder, overwrite, STORE_FILES)
    write_manifest(folder, manifest)
    _fill(folder, manifest, source, model)
    return Store(folder)


def _fill(folder: Path, manifest: Manifest, source: LayeredBatches, model: LoadedModel | None) -> None:
    chunk_rows = max(1, CHUNK_BYTES // manifest.working_bytes)
    done = 0
    with StoreWriter(folder, manifest) as writer:
        for batch, part in enumerate(tqdm(_rows(source, manifest, model), "import", len(source), dynamic_ncols=True)):
            writer.add(part, done // chunk_rows, batch)
            done += len(part)
        writer.finish(done // chunk_rows, len(source))


def _rows(source: LayeredBatches, manifest: Manifest, model: LoadedModel | None) -> Iterator[Rows]:
    prompts, dtype = 0, manifest.encoding.working_dtype
    for number in range(len(source)):
        batch = source[number]
        y = [
            batch.y[:, layer - source.y_layers[0]]
            if layer in source.y_layers
            else _write(model, layer, batch.x[:, layer - source.x_layers[0]])
            for layer in manifest.y_layers
        ]
        n = len(batch.lengths)
        lengths = torch.tensor(batch.lengths)
        unknown = torch.full((len(batch.x),), NOT_KNOWN)
        yield Rows(
            x=batch.x.to(dtype),
            y=torch.stack([write.to(dtype) for write in y], 1),
            token=unknown,
            position=torch.cat([torch.arange(length) for length in batch.lengths]),
            sample=torch.arange(prompts, prompts + n).repeat_interleave(lengths),
            modality=torch.full_like(unknown, UNKNOWN),
        )
        prompts += n


@torch.no_grad()
def _write(model: LoadedModel | None, layer: int, read: Tensor) -> Tensor:
    """What a layer's MLP makes of the stream [N, D]."""
    assert model is not None, "only a model's own layers are completed"
    site, stream = model.sites.layers[layer], read[None].to(model.device, model.model.dtype)
    out = site.mlp(stream if site.norm is None else site.norm(stream))
    out = out if isinstance(out, Tensor) else out[0]
    out = out if site.write is site.mlp else site.write(out)
    return (out if site.scale is None else out * site.scale)[0].cpu()


def _prove(source: LayeredBatches, model: LoadedModel) -> None:
    """Refuse files that are not of this model, or whose writes are those of other layers."""
    wanted = (source.d_model, max(source.x_layers[-1], source.y_layers[-1]))
    if model.d_model != wanted[0] or model.n_layers <= wanted[1]:
        raise UserError(
            f"{source.folder}: is of width {wanted[0]} up to layer {wanted[1]}; {model.id} has width {model.d_model} "
            f"and layers up to {model.n_layers - 1}"
        )
    gaps = _gaps(source, model, source.target_offset)
    for layer, gap in gaps.items():
        if not gap <= CLOSE:
            right = [o for o in OFFSETS if max(_gaps(source, model, o).values(), default=1.0) <= CLOSE]
            hint = "x is not what the MLP reads (the stream before its norm), or it is of another model"
            raise UserError(
                f"{source.folder}: y for MLP {layer} is not what {model.id}'s makes of its x, relative gap {gap:.2g}; "
                + (f"with --target-offset {right[0]} it is" if right else hint)
            )


def _gaps(source: LayeredBatches, model: LoadedModel, target_offset: int) -> dict[int, float]:
    """How far, by layer, the first batch's writes are from the MLPs' own, were this the offset."""
    batch, gaps = source[0], {}
    for i, target in enumerate(source.y_layers):
        layer = target - source.target_offset + target_offset
        if layer in source.x_layers:
            wanted = _write(model, layer, batch.x[:, layer - source.x_layers[0]]).float()
            gaps[layer] = float((batch.y[:, i].float() - wanted).norm() / wanted.norm())
    return gaps
