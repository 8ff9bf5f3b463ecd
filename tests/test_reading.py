"""A store as a stream: the chunks that were captured, then new mixtures of all shards; and what it refuses."""

from dataclasses import replace

import pytest
import torch

from crosslayer import Store, UserError, Wiring
from crosslayer.activations import reading
from crosslayer.activations.manifest import read_manifest, write_manifest
from crosslayer.activations.reading import BLOCK, StoreSource
from crosslayer.activations.record import Activations
from crosslayer.activations.rows import Rows
from crosslayer.activations.usable import usable
from crosslayer.training.stream import ChunkSource
from test_store import L, rows, same, written

SIZES = (700, 900, 300)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Three chunks of numbered rows, in shards of 400 rows at most, captured with seed 5."""
    folder = tmp_path_factory.mktemp("store")
    parts, chunks, first = [], [], 0
    for chunk, size in enumerate(SIZES):
        numbered = replace(rows(size, chunk), sample=torch.arange(first, first + size))
        for start in range(0, size, 100):
            parts.append(Rows(**{name: value[start : start + 100] for name, value in vars(numbered).items()}))
            chunks.append(chunk)
        first += size
    written(folder, parts, chunks, row_limit=400)
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, source=manifest.source | {"seed": 5}))
    return Store(folder)


def source(store: Store, seed: int = 5, wiring: Wiring | None = None) -> StoreSource:
    return StoreSource(store, wiring or Wiring.full(L), seed)


def test_it_is_a_source_of_chunks(store):
    assert isinstance(source(store), ChunkSource)


def test_the_first_round_is_the_captured_stream(store):
    stream = source(store)
    for index, size in enumerate(SIZES):
        found = stream.chunk(index)
        wanted = rows(size, index)
        assert same(Rows.of(found), replace(wanted, sample=found.sample))
        assert found.sample.tolist() == list(range(sum(SIZES[:index]), sum(SIZES[: index + 1])))


@pytest.mark.parametrize(("seed", "epoch"), [(5, 1), (5, 2), (6, 0)])
def test_every_other_round_mixes_all_shards_and_loses_nothing(store, seed, epoch):
    stream = source(store, seed)
    chunks = [stream.chunk(3 * epoch + i) for i in range(3)]
    assert sorted(torch.cat([chunk.sample for chunk in chunks]).tolist()) == list(range(sum(SIZES)))
    for chunk in chunks:
        assert len((chunk.sample // 400).unique()) > 1
        assert len(chunk) <= 4 * BLOCK
    whole = store.read(0, len(store))
    for name in ("x", "y", "position", "token"):
        assert torch.equal(getattr(chunks[1], name), getattr(whole, name)[chunks[1].sample])


def test_rounds_and_seeds_differ_and_repeat(store):
    def order(seed: int, index: int) -> list[int]:
        return source(store, seed).chunk(index).sample.tolist()

    assert order(5, 3) == order(5, 3) != order(5, 6)
    assert order(6, 0) != order(7, 0)


def test_wide_rows_are_mixed_in_smaller_blocks(store, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_BYTES", 10 * store.manifest.working_bytes)
    chunk = source(store, 6).chunk(0)
    jumps = int((chunk.sample.diff() != 1).sum())
    assert len(chunk) / 10 * 0.5 < jumps < len(chunk) / 10


def test_chunks_may_be_asked_for_in_any_order(store):
    stream = source(store)
    found = [stream.chunk(index).sample.tolist() for index in (4, 0, 0, 1, 3, 4)]
    assert found[0] == found[5]
    assert found[1] == found[2]
    assert found[3] == list(range(700, 1600))


def test_images_and_first_positions_are_what_they_were(store):
    chunk = source(store).chunk(0)
    assert isinstance(chunk, Activations)
    assert torch.equal(chunk.image, torch.arange(700) % 3 == 0)
    assert usable(chunk).n_first == 88


def partial(tmp_path, x_layers, y_layers) -> Store:
    whole = rows(20)
    part = replace(whole, x=whole.x[:, x_layers], y=whole.y[:, y_layers])
    return written(tmp_path, [part], [0], x_layers=x_layers, y_layers=y_layers)


def test_a_layer_that_no_source_reads_may_be_missing(tmp_path):
    store = partial(tmp_path, [0, 1], [0, 1, 2])
    chunk = source(store, wiring=Wiring.full(L, first_target=1)).chunk(0)
    assert torch.equal(chunk.x[:, :2], rows(20).x[:, :2])
    assert chunk.x[:, 2].isfinite().all()
    with pytest.raises(
        UserError, match=r"lacks what layer 2's MLP reads, which a wiring of span 3, first_target 0 needs; "
    ):
        source(store)


def test_a_layer_whose_writes_are_missing_is_named(tmp_path):
    store = partial(tmp_path, [0, 1, 2], [1, 2])
    with pytest.raises(UserError, match="lacks what layer 0's MLP writes; it holds .* writes of 1 to 2"):
        source(store, wiring=Wiring.full(L, first_target=1))


def test_other_layers_and_unfinished_captures_are_refused(store, tmp_path):
    with pytest.raises(UserError, match="is of 3 layers, the wiring is for 4"):
        source(store, wiring=Wiring.full(4))
    write_manifest(tmp_path, replace(store.manifest, finished=False))
    with pytest.raises(
        UserError, match="is not finished; go on with `crosslayer capture --resume`, or import it again"
    ):
        source(Store(tmp_path))
