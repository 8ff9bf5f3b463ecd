"""A training state on many ranks: saved = loaded, on any number of ranks, and after an end at any moment."""

import json
import pickle
import random
import signal
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from crosslayer import UserError
from crosslayer.distributed import checkpoint
from crosslayer.distributed.checkpoint import Checkpointer, has_checkpoint, load, read_header, remove
from crosslayer.files import write_json
from making import no_file_larger_than

HEADER = {"config": {"lr": 1e-3}, "counters": {"step_number": 7}, "text": "é", "none": None}
REPLICATED = ("plain", "scalar", "count", "empty", "flags")
MESHES = ((1, 1), (1, 2), (2, 2), (1, 4))
KILLS = 12
PATIENCE = 60


def whole(value: float = 1.0) -> dict[str, Tensor]:
    """A state of every kind of tensor; features are the rows of those that are not replicated."""
    torch.manual_seed(0)
    return {
        "W_enc.0": value * torch.randn(10, 6),
        "W_dec.0": value * torch.randn(10, 3, 6),
        "few": value * torch.randn(5, 2),  # the last of 4 ranks has none
        "b_enc": (value * torch.randn(10)).to(torch.bfloat16),
        "steps": torch.arange(10) + 2**40,
        "unset": torch.full((10, 2), torch.nan),
        "one": value * torch.randn(1, 4),
        "rowless": torch.zeros(0, 4),
        "plain": value * torch.randn(3, 6),
        "scalar": torch.tensor(value),
        "count": torch.tensor(2**53 + 1),
        "empty": torch.zeros(0, 5),
        "flags": torch.tensor([True, False]),
    }


def mesh_of(shape: tuple[int, int]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "feature"))


def spread(mesh: DeviceMesh, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The features of all but the replicated tensors, over the feature axis; one replicated one as a DTensor."""
    placed = {name: t for name, t in tensors.items() if name in REPLICATED}
    placed["dscalar"] = distribute_tensor(tensors["scalar"], mesh, [Replicate(), Replicate()])
    sharded = [name for name in tensors if name not in REPLICATED]
    return placed | {name: distribute_tensor(tensors[name], mesh, [Replicate(), Shard(0)]) for name in sharded}


def write(folder: Path, shape: tuple[int, int]) -> None:
    """Save a state, and train on at once: what was to be saved is gone from memory before it is written."""
    state = spread(mesh_of(shape), whole())
    keeper = Checkpointer(folder)
    keeper.save(state, HEADER)
    for tensor in state.values():
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
    keeper.close()


def differing(folder: Path, shape: tuple[int, int] | None) -> list[str]:
    """Names of the tensors that do not come back bit for bit, on a mesh or, for None, in one process."""
    wanted = whole()
    wanted["dscalar"] = wanted["scalar"]
    mesh = shape and mesh_of(shape)

    def empty(name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        like = torch.empty(size, dtype=dtype)
        if mesh is None or name in REPLICATED:
            return like
        return distribute_tensor(like, mesh, [Replicate(), Replicate() if name == "dscalar" else Shard(0)])

    saved = load(folder, empty if shape else None)
    found = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in saved.tensors.items()}
    assert saved.header == HEADER
    assert found.keys() == wanted.keys()
    return [name for name, tensor in wanted.items() if not same(found[name], tensor)]


def same(found: Tensor, wanted: Tensor) -> bool:
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return False
    return found.reshape(-1).view(torch.uint8).equal(wanted.reshape(-1).view(torch.uint8))


def n_ranks(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """The folder of a state that was saved on a mesh."""
    folders = {}

    def folder(shape: tuple[int, int]) -> Path:
        if shape not in folders:
            folders[shape] = tmp_path_factory.mktemp("saved") / "checkpoint"
            ranks.run(n_ranks(shape), write, folders[shape], shape)
        return folders[shape]

    return folder


@pytest.mark.parametrize("onto", [*MESHES, (2, 1), (4, 1)])
@pytest.mark.parametrize("of", MESHES)
def test_saved_is_loaded_bit_for_bit_on_any_mesh(ranks, saved, of, onto):
    assert ranks.run(n_ranks(onto), differing, saved(of), onto) == [[]] * n_ranks(onto)


@pytest.mark.parametrize("of", MESHES)
def test_saved_is_loaded_bit_for_bit_in_one_process_and_nothing_is_unpickled(saved, of, monkeypatch):
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.delattr(module, name)
    assert differing(saved(of), None) == []


def test_each_rank_writes_its_own_rows_and_a_replicated_tensor_is_written_once(saved):
    files = json.loads((saved((2, 2)) / "latest.json").read_text())["files"]
    total = sum(tensor.nbytes for tensor in whole().values()) + 4
    assert len(files) > 2
    headers = 4096 * len(files)
    assert total < sum(files.values()) < total + headers


def write_in_many_files(folder: Path) -> None:
    checkpoint.FILE_BYTES, before = 300, checkpoint.FILE_BYTES
    try:
        write(folder, (1, 2))
    finally:
        checkpoint.FILE_BYTES = before


def test_a_large_state_goes_to_many_files(ranks, tmp_path):
    ranks.run(2, write_in_many_files, tmp_path)
    assert len(json.loads((tmp_path / "latest.json").read_text())["files"]) > 4
    assert differing(tmp_path, None) == []


def value_of(folder: Path) -> float:
    """The one number that a state of `numbers` is made of."""
    saved = load(folder)
    (value,) = {v for tensor in saved.tensors.values() for v in tensor.unique().tolist()}
    assert value == saved.header["step"]
    return value


def numbers(value: float, n: int = 2000) -> dict[str, Tensor]:
    mesh = mesh_of((1, dist.get_world_size()))
    rows = torch.full((n, 10), value)
    sharded = DTensor.from_local(rows, mesh, [Replicate(), Shard(0)], run_check=False)
    return {"rows": sharded, "moments": sharded * 1, "scalar": torch.tensor(value)}


def save_while_training(folder: Path) -> None:
    """Saves that cannot begin to write before `save` has returned, and collectives of the training meanwhile."""
    returned = Event()
    write_data = checkpoint._Writer.write_data

    def late(*args: Any) -> Any:
        assert returned.wait(PATIENCE)
        return write_data(*args)

    checkpoint._Writer.write_data = late
    try:
        keeper = Checkpointer(folder)
        for step in range(1, 5):
            returned.clear()
            keeper.save(numbers(step), {"step": step})
            assert not has_checkpoint(folder) or value_of_header(folder) < step
            returned.set()
            for i in range(50):
                sums = torch.full((5,), float(i))
                dist.all_reduce(sums)
                assert sums.tolist() == [i * dist.get_world_size()] * 5
        keeper.close()
    finally:
        checkpoint._Writer.write_data = write_data


def value_of_header(folder: Path) -> int:
    return read_header(folder)["step"]


def test_training_goes_on_while_a_state_is_written(ranks, tmp_path):
    ranks.run(2, save_while_training, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "save-000004"]
    assert (value_of(tmp_path), value_of_header(tmp_path)) == (4, 4)


def save_one_after_the_other(folder: Path) -> list[int]:
    """The step that counts after the next save has begun."""
    keeper, steps = Checkpointer(folder), []
    for step in range(1, 4):
        keeper.save(numbers(step), {"step": step})
        keeper.wait()
        steps.append(value_of_header(folder))
    keeper.close()
    return steps


def test_a_state_counts_when_the_wait_for_it_is_over(ranks, tmp_path):
    assert ranks.run(2, save_one_after_the_other, tmp_path) == [[1, 2, 3]] * 2


def save_on_a_full_disk(folder: Path) -> list[str]:
    """What was said of the second of three saves, in which the last rank cannot write."""
    keeper, said = Checkpointer(folder), []
    for step in range(1, 4):
        full = no_file_larger_than(60000) if step == 2 and dist.get_rank() else nullcontext()
        with full:
            keeper.save(numbers(step), {"step": step})
            try:
                keeper.wait()
            except UserError as error:
                said.append(f"{value_of_header(folder)}: {error}")
    keeper.close()
    return said


def test_a_save_that_fails_on_one_rank_is_reported_by_all_and_the_one_before_counts(ranks, tmp_path):
    (first,), (second,) = ranks.run(2, save_on_a_full_disk, tmp_path)
    assert first == second
    assert first.startswith(f"1: {tmp_path}: rank 1 could not write its part of the checkpoint (")
    assert "File too large" in first
    assert value_of(tmp_path) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "save-000003"]


def save_once(folder: Path, step: int) -> None:
    keeper = Checkpointer(folder)
    keeper.save(numbers(step), {"step": step})
    keeper.close()


def test_leavings_of_the_killed_are_swept_and_nothing_else(ranks, tmp_path):
    for leaving in ("save-000001/shard.safetensors", "save-000009/shard.safetensors", "notes/mine"):
        (tmp_path / leaving).parent.mkdir()
        (tmp_path / leaving).touch()
    (tmp_path / ".latest.json.x.part").touch()
    ranks.run(2, save_once, tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "notes", "save-000001"]
    assert value_of(tmp_path) == 1


def test_a_checkpoint_is_removed_and_nothing_else(saved, ranks, tmp_path):
    for name, left in (("a", []), ("b", ["mine"])):
        ranks.run(2, save_once, tmp_path / name, 1)
        for file in left:
            (tmp_path / name / file).touch()
        remove(tmp_path / name)
        assert [path.name for path in (tmp_path / name).glob("*")] == left
    assert not (tmp_path / "a").exists()


@pytest.fixture
def small(ranks, tmp_path) -> Path:
    ranks.run(2, save_once, tmp_path / "checkpoint", 1)
    return tmp_path / "checkpoint"


def test_no_checkpoint_is_named(tmp_path):
    for read in (load, read_header):
        with pytest.raises(UserError, match=f"{tmp_path}: holds no checkpoint to resume from; start anew"):
            read(tmp_path)


def test_another_format_is_refused(small):
    write_json(small / "latest.json", {"format_version": 9})
    with pytest.raises(UserError, match=f"{small}: checkpoint format 9, this crosslayer reads 1; start anew"):
        load(small)


@pytest.mark.parametrize("n_bytes", [None, 10])
def test_a_file_that_is_missing_or_cut_is_named(small, n_bytes):
    file = max((small / "save-000001").iterdir())
    size = file.stat().st_size
    file.unlink() if n_bytes is None else file.write_bytes(bytes(n_bytes))
    with pytest.raises(UserError, match=f"{file}: has {n_bytes or 0} bytes of {size}; copy the checkpoint again"):
        load(small)


def test_a_damaged_file_is_named(small):
    file = min((small / "save-000001").iterdir())
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(UserError, match=f"{small / 'save-000001'}: rank 0 cannot read it .*; copy the checkpoint"):
        load(small)


def live(folder: Path, store: Path, rank: int, begun: Any) -> None:
    """Resume, and save one state after the other until killed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
    keeper = Checkpointer(folder)
    first = value_of_header(folder) + 1 if has_checkpoint(folder) else 1
    for step in count(first):
        keeper.save(numbers(step), {"step": step})
        begun.release()


def test_an_end_of_either_rank_at_random_moments_leaves_a_checkpoint_that_is_whole(ranks, tmp_path):
    moments, folder, steps = random.Random(0), tmp_path / "checkpoint", []
    for kill in range(KILLS):
        begun = ranks.context.Semaphore(0)
        args = (folder, tmp_path / f"store-{kill}")
        lives = [ranks.context.Process(target=live, args=(*args, rank, begun)) for rank in range(2)]
        for life in lives:
            life.start()
        for _ in range(4):  # the first saves take longer
            assert begun.acquire(timeout=PATIENCE)
        killed, survivor = moments.sample(lives, 2)
        killed.join(moments.uniform(0, 0.1))
        killed.kill()
        for life in (killed, survivor):
            life.join(PATIENCE)
        assert killed.exitcode == -signal.SIGKILL
        assert survivor.exitcode == 1
        steps.append(value_of(folder))
    assert steps == sorted(set(steps))
