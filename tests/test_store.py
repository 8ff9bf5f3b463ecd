"""A store on disk: rows read back are the rows written, wherever shards end, and a flipped byte is found."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosslayer import Store, UserError
from crosslayer.activations.manifest import Manifest, check_same, read_manifest, write_manifest
from crosslayer.activations.rows import Rows
from crosslayer.activations.writer import StoreWriter
from making import random_activations

L, D = 3, 8


def manifest(row_limit: int = 10, dtype: str = "fp32", **settings) -> Manifest:
    layers = list(range(L))
    given = {"model": "m", "n_layers": L, "d_model": D, "x_layers": layers, "y_layers": layers} | settings
    found = Manifest(dtype=dtype, source={}, **given)
    return replace(found, source={"shard_bytes": row_limit * found.row_bytes})


def rows(n: int, seed: int = 0) -> Rows:
    return Rows.of(random_activations(n, L, D, seed=seed))


def written(folder: Path, parts: list[Rows], chunks: list[int], **settings) -> Store:
    folder.mkdir(exist_ok=True)
    with StoreWriter(folder, manifest(**settings)) as writer:
        for number, (part, chunk) in enumerate(zip(parts, chunks, strict=True)):
            writer.add(part, chunk, number)
        writer.finish(chunks[-1], len(parts))
    return Store(folder)


def same(a: Rows, b: Rows) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))


@given(
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 14),
    st.sampled_from(["fp32", "bf16"]),
    st.data(),
)
def test_rows_read_are_rows_written_across_shards(tmp_path_factory, sizes, row_limit, dtype, data):
    parts = [rows(n, seed) for seed, (n, _) in enumerate(sizes)]
    chunks = [sum(new for _, new in sizes[: i + 1]) for i in range(len(sizes))]
    store = written(tmp_path_factory.mktemp("store"), parts, chunks, row_limit=row_limit, dtype=dtype)
    whole = Rows.concatenate(parts)
    if dtype == "bf16":
        whole = replace(whole, x=whole.x.bfloat16(), y=whole.y.bfloat16())
    assert len(store) == len(whole)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    wanted = Rows(**{name: value[start:stop] for name, value in vars(whole).items()})
    assert same(store.read(start, stop), wanted)
    assert all(shard.rows <= max(row_limit, 9) for shard in store.manifest.shards)
    store.verify()


def test_a_shard_ends_with_its_chunk(tmp_path):
    store = written(tmp_path, [rows(4, i) for i in range(5)], [0, 0, 1, 1, 2], row_limit=100)
    assert [(s.rows, s.chunk) for s in store.manifest.shards] == [(8, 0), (8, 1), (4, 2)]
    assert store.n_chunks == 3
    assert same(store.gather(store.chunk(1)), Rows.concatenate([rows(4, 2), rows(4, 3)]))


def test_a_shard_that_would_pass_its_size_ends_before(tmp_path):
    store = written(tmp_path, [rows(n) for n in (6, 5, 4, 25, 1)], [0] * 5, row_limit=10)
    assert [s.rows for s in store.manifest.shards] == [6, 9, 25, 1]
    small = [s.file for s in store.manifest.shards if s.rows <= 10]
    assert all((tmp_path / f).stat().st_size <= 10 * store.manifest.row_bytes + 1000 for f in small)


def test_bytes_with_scales_come_back_as_numbers(tmp_path):
    whole = rows(30)
    store = written(tmp_path, [whole], [0], dtype="int8")
    found = store.read(0, 30)
    torch.testing.assert_close(found.x, whole.x, rtol=0, atol=float(whole.x.abs().max()) / 127)
    assert all(0 < share < 1e-3 for share in store.manifest.shards[0].x_error)
    assert torch.equal(store.column("position"), whole.position.int())


@pytest.mark.parametrize("at", [0, 9, 200, -1])
def test_one_flipped_bit_is_found_and_its_shard_named(tmp_path, at):
    store = written(tmp_path, [rows(9, i) for i in range(3)], [0] * 3)
    path = tmp_path / store.manifest.shards[1].file
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-000001.safetensors: has checksum .*, .* was written"):
        store.verify()


def test_a_shard_that_is_missing_or_of_another_shape_is_named(tmp_path):
    store = written(tmp_path, [rows(9, i) for i in range(2)], [0] * 2)
    write_manifest(tmp_path, replace(store.manifest, d_model=D + 1))
    with pytest.raises(UserError, match=r"shard-000000.safetensors: x is \[9, 3, 8\], \[9, 3, 9\] is wanted"):
        Store(tmp_path).read(0, 3)
    (tmp_path / "shard-000001.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard-000001.safetensors: is missing"):
        store.verify()
    with pytest.raises(UserError, match=r"shard-000001.safetensors: cannot be read"):
        store.read(0, 18)


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    written(tmp_path, [rows(9)], [0], dtype="int8")
    kept = read_manifest(tmp_path)
    write_manifest(tmp_path, kept)
    assert read_manifest(tmp_path) == kept
    assert kept.finished


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema_version": 2}, "schema version 2, this crosslayer reads 1"),
        ({"dtype": "fp8"}, "dtype is 'fp8'; choose one of"),
        ({"colour": "red"}, "is damaged at 'colour'"),
        ({"shards": [{"file": "a"}]}, "is damaged at 'chunk'"),
        ({"shards": "none"}, "is damaged at 'n'"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(tmp_path, change, named):
    write_manifest(tmp_path, manifest())
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=named):
        Store(tmp_path)


def test_a_folder_without_a_manifest_is_no_store(tmp_path):
    with pytest.raises(
        UserError, match="holds no manifest.json, so it is no store; make one with `crosslayer capture`"
    ):
        Store(tmp_path)
    with pytest.raises(UserError, match="nowhere: no such store; make one with `crosslayer capture`"):
        Store(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model": "n"}, "holds model m, n is asked for"),
        ({"revision": "b"}, "holds revision , b is asked for"),
        ({"read": "mlp_in"}, "holds read resid, mlp_in is asked for"),
        ({"dtype": "bf16"}, "holds dtype fp32, bf16 is asked for"),
        ({"x_layers": [0, 1]}, r"holds x_layers \[0, 1, 2\], \[0, 1\] is asked for"),
        ({"d_model": 9}, "holds d_model 8, 9 is asked for"),
    ],
)
def test_what_does_not_belong_into_a_store_is_named_with_both_values(settings, named):
    kept = manifest()
    with pytest.raises(UserError, match=named):
        check_same(Path("s"), kept, replace(kept, **settings))
    with pytest.raises(UserError, match="holds tokens 3, 4 is asked for"):
        check_same(Path("s"), replace(kept, source={"tokens": 3}), replace(kept, source={"tokens": 4}))


def test_a_store_that_was_never_filled_can_be_looked_at(tmp_path):
    write_manifest(tmp_path, manifest())
    store = Store(tmp_path)
    assert (len(store), store.n_chunks, len(store.column("token"))) == (0, 0, 0)
    store.verify()
