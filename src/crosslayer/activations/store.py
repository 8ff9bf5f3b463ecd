"""Activations on disk, mapped into memory: any rows of them, and whether they are still what was written."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from hashlib import file_digest
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from crosslayer.activations.manifest import Manifest, Shard, read_manifest
from crosslayer.activations.rows import ORIGIN, Rows
from crosslayer.errors import UserError
from crosslayer.files import read_tensors

READERS = 4
"""Threads that read, copy and convert rows."""


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one shard."""

    shard: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Store:
    """A folder of shards; `Store(path)` reads its manifest, and a shard is mapped when it is first asked for.

    Raises:
        UserError: when there is no store, it is damaged, of another schema version, or empty.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path)
        self._mapped: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self.manifest.rows

    @cached_property
    def _readers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(READERS, "store")

    def chunk(self, index: int) -> list[Piece]:
        """Where the rows of a chunk lie, as the stream that was captured had them."""
        return [Piece(i, 0, shard.rows) for i, shard in enumerate(self.manifest.shards) if shard.chunk == index]

    @property
    def n_chunks(self) -> int:
        """Chunks that the rows came in."""
        return len({shard.chunk for shard in self.manifest.shards})

    def read(self, start: int, stop: int) -> Rows:
        """The rows from `start` up to `stop`, whatever shards they lie in."""
        ends = list(accumulate(shard.rows for shard in self.manifest.shards))
        pieces = []
        for i, (shard, end) in enumerate(zip(self.manifest.shards, ends, strict=True)):
            first = end - shard.rows
            if first < stop and start < end:
                pieces.append(Piece(i, max(start, first) - first, min(stop, end) - first))
        return self.gather(pieces)

    def column(self, name: str) -> Tensor:
        """Token id, position, sample or modality of every row, by name."""
        none = torch.empty(0, dtype=ORIGIN[name])
        return torch.cat([none, *(self._map(i)[name] for i in range(len(self.manifest.shards)))])

    def gather(self, pieces: Sequence[Piece]) -> Rows:
        """The rows of these pieces, in order, read by several threads; x and y in the store's working precision."""
        manifest, n = self.manifest, sum(len(piece) for piece in pieces)
        dtype, D = manifest.encoding.working_dtype, manifest.d_model
        x = torch.empty(n, len(manifest.x_layers), D, dtype=dtype)
        y = torch.empty(n, len(manifest.y_layers), D, dtype=dtype)
        origin = {name: torch.empty(n, dtype=torch.int64) for name in ORIGIN}
        rows = Rows(x, y, **origin)
        starts = accumulate((len(piece) for piece in pieces), initial=0)
        mapped = [self._map(piece.shard) for piece in pieces]
        done = self._readers.map(lambda job: self._copy(rows, *job), zip(pieces, mapped, starts, strict=False))
        for _ in done:
            pass
        return rows

    def _copy(self, rows: Rows, piece: Piece, tensors: dict[str, Tensor], start: int) -> None:
        there, here = slice(piece.start, piece.stop), slice(start, start + len(piece))
        for name in ("x", "y"):
            self.manifest.encoding.decode(name, tensors, there, getattr(rows, name)[here])
        for name in ORIGIN:
            getattr(rows, name)[here] = tensors[name][there]

    def verify(self) -> None:
        """Compare every shard with its checksum.

        Raises:
            UserError: naming the first shard that is missing or not what was written.
        """
        for shard, fault in zip(
            self.manifest.shards, self._readers.map(self._fault, self.manifest.shards), strict=True
        ):
            if fault:
                raise UserError(f"{self.path / shard.file}: {fault}; capture the store again")

    def _fault(self, shard: Shard) -> str:
        path = self.path / shard.file
        if not path.is_file():
            return "is missing"
        found = sha256(path)
        return "" if found == shard.sha256 else f"has checksum {found[:12]}, {shard.sha256[:12]} was written"

    def _map(self, index: int) -> dict[str, Tensor]:
        if index not in self._mapped:
            shard = self.manifest.shards[index]
            tensors = read_tensors(self.path / shard.file)[0]
            self._check_shapes(shard, tensors)
            self._mapped[index] = tensors
        return self._mapped[index]

    def _check_shapes(self, shard: Shard, tensors: dict[str, Tensor]) -> None:
        manifest = self.manifest
        layers = {"x": len(manifest.x_layers), "y": len(manifest.y_layers)}
        wanted = {name: [shard.rows, n, manifest.d_model] for name, n in layers.items()}
        wanted |= {name: [shard.rows] for name in ORIGIN}
        for name, shape in wanted.items():
            found = list(tensors[name].shape) if name in tensors else "nothing"
            if found != shape:
                raise UserError(f"{self.path / shard.file}: {name} is {found}, {shape} is wanted; run `store verify`")


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
