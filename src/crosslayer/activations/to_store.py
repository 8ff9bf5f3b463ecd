"""Capturing a data set to disk: what it needs, the rows in the stream's order, and going on after any end."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, tee
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crosslayer.activations.capture import ModelSource
from crosslayer.activations.manifest import MANIFEST, Manifest, check_same, read_manifest, write_manifest
from crosslayer.activations.record import Padded
from crosslayer.activations.rows import Rows
from crosslayer.activations.store import Store
from crosslayer.activations.together import drop_chunks, fill_together
from crosslayer.activations.writer import SHARD_BYTES, STORE_FILES, StoreWriter, check_room
from crosslayer.data.examples import Example, Examples, digest
from crosslayer.data.skipped import SKIPPED
from crosslayer.distributed.crew import ALONE, Crew
from crosslayer.errors import UserError
from crosslayer.files import check_folder, claim_folder, sweep
from crosslayer.memory import keep_freed_memory
from crosslayer.models.load import LoadedModel

ROOM_PROMPTS = 64
"""Prompts on which the length of all is estimated."""


def capture_to_store(
    model: LoadedModel,
    data: Sequence[Example],
    out: str | Path,
    *,
    tokens: int | None = None,
    prompts: int | None = None,
    dtype: str = "bf16",
    layers: range | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    resume: bool = False,
    overwrite: bool = False,
    crew: Crew = ALONE,
) -> Store:
    """Keep what a model's MLPs read and write on disk, in the order in which a training with this seed sees it.

    Args:
        model: frozen, with its sites proved.
        data: what to run it on, visited in a new order each epoch.
        out: folder of the store.
        tokens: rows to keep; `prompts` instead, or every example once, when left out.
        prompts: examples to keep all tokens of.
        dtype: fp32, bf16 or int8 (with a scale for each token and layer).
        layers: consecutive layers to keep; all when left out, and a training needs all.
        seed: of the order of the data.
        shard_bytes: size that a file does not pass.
        resume: go on after the last whole shard in `out`; the result is that of an uninterrupted capture.
        overwrite: replace the store that `out` holds.
        crew: the processes that share the work, chunk by chunk; the store is the same however many they are.

    Raises:
        UserError: when the disk is too small or gets full, for another model, data or settings than those of the
            store to resume, and for settings that cannot work.
    """
    folder = Path(out)
    source = ModelSource(_of_layers(model, layers), data, seed=seed)
    asked = Manifest(
        model=model.id,
        revision=model.revision,
        read=model.sites.read,
        n_layers=model.n_layers,
        d_model=model.d_model,
        x_layers=list(layers or range(model.n_layers)),
        y_layers=list(layers or range(model.n_layers)),
        dtype=dtype,
        source=_settings(source, tokens, prompts, shard_bytes),
    )
    crew.agree(lambda: {**asked.settings(), "digest": digest(data)})
    crew.first(lambda: _start(folder, asked, source, resume, overwrite))
    keep_freed_memory()
    manifest = read_manifest(folder)
    with _bar(manifest) as bar:
        try:
            if not crew.alone:
                manifest = fill_together(folder, manifest, source, crew, _fill, bar)
            crew.first(lambda: _fill(folder, manifest, source, bar).finished)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command with --resume goes on after the last shard") from None
    return Store(folder)


def _start(folder: Path, asked: Manifest, source: ModelSource, resume: bool, overwrite: bool) -> None:
    """Make the folder ready for what is asked for, or see that it is."""
    manifest = _to_resume(folder, asked) if resume else asked
    check_folder(folder, overwrite or resume)
    check_room(folder, manifest, _rows_left(source, manifest))
    if not resume:
        claim_folder(folder, overwrite, STORE_FILES)
        write_manifest(folder, manifest)
    if isinstance(source.examples, Examples):
        source.examples.skipped.list_in(folder / SKIPPED, resume=resume)
    drop_chunks(folder)


def _of_layers(model: LoadedModel, layers: range | None) -> LoadedModel:
    """The same model as if it had these layers only."""
    if layers is None:
        return model
    if layers.step != 1 or not (0 <= layers.start < layers.stop <= model.n_layers):
        raise UserError(f"layers are {layers}; choose consecutive ones of 0 to {model.n_layers - 1}")
    sites, chosen = model.sites, slice(layers.start, layers.stop)
    return replace(model, sites=replace(sites, layers=sites.layers[chosen], names=sites.names[chosen]))


def _settings(source: ModelSource, tokens: int | None, prompts: int | None, shard_bytes: int) -> dict[str, Any]:
    if tokens is not None and prompts is not None:
        raise UserError(f"tokens is {tokens} and prompts is {prompts}; give one of them")
    if min(n for n in (tokens, prompts, shard_bytes) if n is not None) < 1:
        raise UserError(f"tokens {tokens}, prompts {prompts}, shard_bytes {shard_bytes}: choose at least 1")
    if tokens is None and prompts is None:
        prompts = len(source.examples)
    return {
        "n_examples": len(source.examples),
        "seed": source.seed,
        "tokens": tokens,
        "prompts": prompts,
        "chunk_prompts": source.chunk_prompts,
        "batch_prompts": source.batch_prompts,
        "shard_bytes": shard_bytes,
    }


def _to_resume(folder: Path, asked: Manifest) -> Manifest:
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: holds no {MANIFEST} to resume from; start without --resume")
    kept = read_manifest(folder)
    check_same(folder, kept, asked)
    if kept.finished:
        raise UserError(f"{folder}: is finished already; capture into another folder for more")
    sweep(folder)
    return kept


def _rows_left(source: ModelSource, manifest: Manifest) -> int:
    """Rows that are not in the store yet, by the mean length of a few prompts where those are what is counted."""
    settings = manifest.source
    if settings["prompts"] is None:
        return settings["tokens"] - manifest.rows
    seen = manifest.next_chunk * settings["chunk_prompts"] + manifest.next_batch * settings["batch_prompts"]
    return max(0, settings["prompts"] - seen) * source.count_tokens(ROOM_PROMPTS) // ROOM_PROMPTS


def _bar(manifest: Manifest) -> tqdm:
    total = manifest.source["tokens"]
    return tqdm(total=total, initial=manifest.rows, unit="tok", unit_scale=True, desc="capture", dynamic_ncols=True)


def _fill(folder: Path, manifest: Manifest, source: ModelSource, bar: tqdm) -> Manifest:
    """Capture what is missing."""
    following = (manifest.next_chunk, manifest.next_batch)
    with StoreWriter(folder, manifest) as writer:
        for chunk, batch, part in _missing(source, manifest):
            writer.add(part if part.can_wait else Rows.of(part.tokens()), chunk, batch)
            following = (chunk, batch + 1)
            bar.update(len(part))
        return writer.finish(*following)


def _missing(source: ModelSource, manifest: Manifest) -> Iterator[tuple[int, int, Padded]]:
    """Batches of the stream after the numbers of their chunk and of themselves in it, until there are enough."""
    left = (manifest.source["tokens"] or sys.maxsize) - manifest.rows
    places, ahead = tee(_places(source, manifest))
    parts = source.captured((numbers for *_, numbers in ahead), manifest.encoding.working_dtype)
    found = zip(places, parts, strict=True)
    while left > 0 and (following := next(found, None)):
        (chunk, batch, _), part = following
        yield chunk, batch, part.first(left)
        left -= len(part)


def _places(source: ModelSource, manifest: Manifest) -> Iterator[tuple[int, int, list[int]]]:
    """Each batch that the store lacks: its chunk, its number in that and those of its examples; endless without
    a number of prompts."""
    prompts, skip = manifest.source["prompts"] or sys.maxsize, manifest.next_batch
    for chunk in count(manifest.next_chunk):
        n = min(source.chunk_prompts, prompts - chunk * source.chunk_prompts)
        if n <= 0:
            return
        for batch, numbers in enumerate(source.batches(chunk, n)[skip:], skip):
            yield chunk, batch, numbers
        skip = 0
