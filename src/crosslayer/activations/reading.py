"""A store as a stream: the very chunks that were captured, and after them new mixtures of all shards."""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import torch

from crosslayer.activations.manifest import Manifest
from crosslayer.activations.record import Activations
from crosslayer.activations.rows import IMAGE, Rows
from crosslayer.activations.store import Piece, Store
from crosslayer.errors import UserError
from crosslayer.team import ALONE, Team, share
from crosslayer.wiring import Wiring

BLOCK, BLOCK_BYTES = 256, 2**21
"""Consecutive rows that stay together in a mixture, at most; and their bytes, which are enough to be read fast."""
UNREAD = 1.0
"""What stands for the reads of a layer that no source reads: any number that is finite."""


class StoreSource:
    """Chunks of activations from a store; the same index always gives the same tokens.

    A store captured with the same `seed` gives, the first time round, the chunks of the stream that it was captured
    from, so that a training on it is the training on that stream. From then on, and with any other seed, a chunk is
    a random draw of blocks of rows from all shards. The next chunk is read while one is in use: two are in memory.
    In a team every process reads the rows of its share of the tokens.

    Raises:
        UserError: when the store is empty or unfinished, or lacks what the wiring asks for.
    """

    def __init__(
        self, store: Store, wiring: Wiring, seed: int = 0, device: str | torch.device = "cpu", team: Team = ALONE
    ):
        check_trainable(store, wiring)
        self.store, self.seed, self.device, self.team = store, seed, torch.device(device), team
        self._thread = ThreadPoolExecutor(1, "store-ahead")
        self._read: dict[int, Future[Rows]] = {}

    def chunk(self, index: int) -> Activations:
        """All tokens of chunk `index`; in a team, those of this process, after those of the ranks below it."""
        self._read = {i: self._read.get(i) or self._start(i) for i in (index, index + 1)}
        return self._activations(self._read[index].result())

    def _start(self, index: int) -> Future[Rows]:
        return self._thread.submit(lambda: self.store.gather(self._own_pieces(index)))

    def _own_pieces(self, index: int) -> list[Piece]:
        pieces, own, first = self._pieces(index), [], 0
        mine = share(self.team.tokens, sum(map(len, pieces)))
        for piece in pieces:
            start, stop = max(0, mine.start - first), min(len(piece), mine.stop - first)
            if start < stop:
                own.append(Piece(piece.shard, piece.start + start, piece.start + stop))
            first += len(piece)
        return own

    def _pieces(self, index: int) -> list[Piece]:
        epoch, place = divmod(index, self.store.n_chunks)
        if epoch == 0 and self.store.manifest.source.get("seed") == self.seed:
            return self.store.chunk(place)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self._blocks), generator=generator).tensor_split(self.store.n_chunks)[place]
        return [self._blocks[i] for i in order.sort().values.tolist()]

    @cached_property
    def _blocks(self) -> list[Piece]:
        manifest = self.store.manifest
        n = max(1, min(BLOCK, BLOCK_BYTES // manifest.working_bytes))
        return [
            Piece(i, start, min(start + n, shard.rows))
            for i, shard in enumerate(manifest.shards)
            for start in range(0, shard.rows, n)
        ]

    def _activations(self, rows: Rows) -> Activations:
        x, layers = rows.x, self.store.manifest.x_layers
        if len(layers) < self.store.manifest.n_layers:
            x = x.new_full((len(rows), self.store.manifest.n_layers, x.shape[2]), UNREAD)
            x[:, layers] = rows.x
        here = self.device
        origin = (rows.modality == IMAGE, rows.position, rows.sample, rows.token)
        return Activations(x.to(here), rows.y.to(here), *(column.to(here) for column in origin))


def check_trainable(store: Store, wiring: Wiring) -> None:
    """Refuse a wiring that asks for more than the store holds.

    Raises:
        UserError: naming the first layer that is missing.
    """
    manifest, path = store.manifest, store.path
    if not manifest.finished:
        raise UserError(f"{path}: is not finished; go on with `crosslayer capture --resume`, or import it again")
    if not len(store):
        raise UserError(f"{path}: holds no rows")
    if wiring.n_layers != manifest.n_layers:
        raise UserError(f"{path}: is of {manifest.n_layers} layers, the wiring is for {wiring.n_layers}")
    for layer in wiring.source_layers:
        if layer not in manifest.x_layers:
            wanted = f"a wiring of span {wiring.span}, first_target {wiring.first_target} needs"
            raise UserError(f"{path}: lacks what layer {layer}'s MLP reads, which {wanted}; {_held(manifest)}")
    for layer in range(manifest.n_layers):
        if layer not in manifest.y_layers:
            raise UserError(f"{path}: lacks what layer {layer}'s MLP writes; {_held(manifest)}")


def _held(manifest: Manifest) -> str:
    reads, writes = (f"{layers[0]} to {layers[-1]}" for layers in (manifest.x_layers, manifest.y_layers))
    return f"it holds reads of layers {reads} and writes of {writes}"
