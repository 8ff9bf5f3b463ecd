"""Many processes that fill one store: each captures whole chunks beside it, and rank 0 takes their shards over."""

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from uuid import uuid4

from tqdm import tqdm

from crosslayer.activations.capture import ModelSource
from crosslayer.activations.manifest import Manifest, Shard, write_manifest
from crosslayer.activations.writer import shard_name
from crosslayer.data.examples import hear
from crosslayer.distributed.crew import Crew
from crosslayer.distributed.results import Result

CHUNKS = ".chunks"
"""Folder in a store, with a small store for each chunk that is not taken over yet; gone when all have left."""
Fill = Callable[[Path, Manifest, ModelSource, tqdm], Manifest]


def fill_together(folder: Path, manifest: Manifest, source: ModelSource, crew: Crew, fill: Fill, bar: tqdm) -> Manifest:
    """Capture all whole chunks that are missing; where the tokens asked for end inside of one, that is left.

    A process alone makes the same shards of a chunk, as one never holds rows of two.

    Args:
        folder: of the store.
        manifest: where it stands.
        source: of the rows.
        crew: the processes, all of which call this.
        fill: captures what a manifest lacks into a folder.
        bar: shows the tokens.

    Returns:
        Where it stands then.
    """
    first, size, prompts = manifest.next_chunk, source.chunk_prompts, manifest.source["prompts"]
    tokens = manifest.source["tokens"] or sys.maxsize
    n = sys.maxsize if prompts is None else -(-prompts // size) - first

    grown, made, taken = manifest, set[str](), set[str]()

    def make(i: int) -> Result:
        name, (apart, notes) = f"{first + i:06d}-{uuid4().hex[:8]}", source.apart(crew)
        made.add(name)
        done = fill(folder / CHUNKS / name, _of_chunk(manifest, first + i, i == 0), apart, tqdm(disable=True))
        shards = [asdict(shard) for shard in done.shards]
        return {"folder": name, "shards": shards, "next": [done.next_chunk, done.next_batch], "looks": notes.looks}

    for captured in crew.map(make, n):
        shards = [Shard(**shard) for shard in captured["shards"]]
        rows = sum(shard.rows for shard in shards)
        if grown.rows + rows > tokens:
            break
        taken.add(captured["folder"])
        if crew.leads:
            hear(source.examples, captured["looks"])
            _take_over(folder, captured["folder"], shards, len(grown.shards))
        named = [replace(shard, file=shard_name(i)) for i, shard in enumerate(shards, len(grown.shards))]
        chunk, batch = captured["next"]
        grown = replace(grown, shards=[*grown.shards, *named], next_chunk=chunk, next_batch=batch)
        if crew.leads:
            write_manifest(folder, grown)
        bar.update(rows)
    for name in made - taken:
        shutil.rmtree(folder / CHUNKS / name)
    with suppress(OSError):  # while others hold some
        (folder / CHUNKS).rmdir()
    return grown


def drop_chunks(folder: Path) -> None:
    """Remove the chunks that nobody will take over."""
    shutil.rmtree(folder / CHUNKS, ignore_errors=True)


def _of_chunk(manifest: Manifest, chunk: int, begun: bool) -> Manifest:
    """What an empty store says that is to hold this chunk, or the rest of it where it is begun, and no more."""
    prompts = (chunk + 1) * manifest.source["chunk_prompts"]
    source = manifest.source | {"tokens": None, "prompts": min(prompts, manifest.source["prompts"] or prompts)}
    batch = manifest.next_batch if begun else 0
    return replace(manifest, shards=[], next_chunk=chunk, next_batch=batch, source=source)


def _take_over(folder: Path, chunk: str, shards: list[Shard], number: int) -> None:
    """Put the shards of a chunk behind those that the store has."""
    for i, shard in enumerate(shards, number):
        os.replace(folder / CHUNKS / chunk / shard.file, folder / shard_name(i))
    shutil.rmtree(folder / CHUNKS / chunk)
