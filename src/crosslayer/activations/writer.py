"""Adding rows to a store: whole shards, one after the other, written by a thread while the next one is filled."""

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from crosslayer.activations.manifest import MANIFEST, Manifest, Shard, write_manifest
from crosslayer.activations.record import Padded
from crosslayer.activations.rows import ORIGIN, Rows
from crosslayer.activations.store import sha256
from crosslayer.data.skipped import SKIPPED
from crosslayer.errors import UserError
from crosslayer.files import disk_room, size_text, write_tensors

STORE_FILES = (MANIFEST, "shard-*.safetensors", SKIPPED)
"""What an overwritten store leaves."""
SHARD_BYTES = 2**29
"""Size that a shard does not pass, unless one batch alone does."""


class StoreWriter:
    """Grows a store from where its manifest ends; used as a context.

    A shard ends where the next batch would make it larger, on disk or in memory, than the `shard_bytes` of the
    manifest's source, and at the end of a chunk: that depends on the data alone, so a store that was resumed is the
    same as one that was not.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        bytes_a_row = max(manifest.row_bytes, manifest.working_bytes)
        self._shard_rows = max(1, manifest.source["shard_bytes"] // bytes_a_row)
        self._parts, self._rows, self._chunk = list[Rows | Padded](), 0, 0
        self._thread, self._writing = ThreadPoolExecutor(1), Future[None]()
        self._writing.set_result(None)

    def add(self, part: Rows | Padded, chunk: int, batch: int) -> None:
        """Add a batch of rows in main memory, at its place in the stream, without its padding if there is some."""
        if self._rows and (chunk != self._chunk or self._rows + len(part) > self._shard_rows):
            self._end_shard(chunk, batch)
        self._parts.append(part)
        self._rows, self._chunk = self._rows + len(part), chunk

    def finish(self, chunk: int, batch: int) -> Manifest:
        """Write what is left; the next row would have been at this place of the stream."""
        if self._rows:
            self._end_shard(chunk, batch)
        self._writing.result()
        self.manifest = replace(self.manifest, next_chunk=chunk, next_batch=batch, finished=True)
        write_manifest(self.folder, self.manifest)
        return self.manifest

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True)

    def _end_shard(self, chunk: int, batch: int) -> None:
        self._writing.result()  # at most one shard is written while another is filled
        parts, self._parts, self._rows = self._parts, [], 0
        self._writing = self._thread.submit(self._write, parts, self._chunk, chunk, batch)

    def _write(self, parts: list[Rows | Padded], chunk: int, next_chunk: int, next_batch: int) -> None:
        rows = Rows.concatenate([part if isinstance(part, Rows) else Rows.of(part.tokens()) for part in parts])
        form = self.manifest.encoding
        file = shard_name(len(self.manifest.shards))
        x, y = form.encode("x", rows.x), form.encode("y", rows.y)
        columns = {name: getattr(rows, name).to(dtype) for name, dtype in ORIGIN.items()}
        write_tensors(self.folder / file, {**x, **y, **columns})
        errors = form.added_error("x", x, rows.x), form.added_error("y", y, rows.y)
        shard = Shard(file, len(rows), chunk, sha256(self.folder / file), *errors)
        grown = [*self.manifest.shards, shard]
        self.manifest = replace(self.manifest, shards=grown, next_chunk=next_chunk, next_batch=next_batch)
        write_manifest(self.folder, self.manifest)


def shard_name(number: int) -> str:
    """Name of a shard's file."""
    return f"shard-{number:06d}.safetensors"


def check_room(folder: Path, manifest: Manifest, rows: int) -> None:
    """Say how much room so many more rows will take.

    Raises:
        UserError: when there is less.
    """
    needed, free = rows * manifest.row_bytes, disk_room(folder)
    said = f"{folder}: about {size_text(needed)} for {rows:,} tokens, {size_text(manifest.row_bytes)} each"
    if needed > free:
        raise UserError(f"{said}; only {size_text(free)} are free: choose fewer, --store-dtype int8 or another disk")
    tqdm.write(f"{said}; {size_text(free)} are free", file=sys.stderr)
