"""A run written by many ranks: the files of one process, byte for byte."""

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from crosslayer import CrossLayerTranscoder, JointTopK, UserError, Wiring
from crosslayer.coders import checkpoint
from crosslayer.coders.checkpoint import write_run
from crosslayer.distributed import export
from crosslayer.distributed.export import export_run
from crosslayer.distributed.group import RankGroup
from crosslayer.files import read_tensors
from making import no_file_larger_than, random_coder

MESHES = {1: (1, 1), 2: (1, 2), 4: (2, 2)}
CONFIG = {"of": "é"}
AXES = {"rows": 0, "columns": -1}


def coder() -> CrossLayerTranscoder:
    """Of 7 features a layer, so that ranks have different numbers of them."""
    return random_coder(Wiring(3, 2, 0), JointTopK(4), D=6, F=7)


def odd() -> dict[str, Tensor]:
    """Tensors of several types and shapes, under names that sort otherwise than they come."""
    torch.manual_seed(1)
    return {
        "z": torch.randn(9, 3).to(torch.bfloat16),
        "w.10": torch.randn(9, 2, 3),
        "w.9": torch.randn(0, 4),
        "é": torch.tensor(2.5),
        "a": torch.arange(5),
        "mask": torch.tensor([True, False, True]),
    }


def spread(tensors: dict[str, Tensor], shape: tuple[int, int], axis: int = 0) -> dict[str, Tensor]:
    """An axis of the larger ones over that of features, one DTensor that is replicated, and one plain tensor."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "feature"))
    last = list(tensors)[-1]
    return {
        name: tensor
        if name == last
        else distribute_tensor(
            tensor, mesh, [Replicate(), Shard(axis % tensor.dim()) if tensor.dim() > 1 else Replicate()]
        )
        for name, tensor in tensors.items()
    }


@contextmanager
def small(max_bytes: int) -> Iterator[None]:
    """Files of at most so many bytes, written 8 bytes at a time."""
    split = partial(split_torch_state_dict_into_shards, max_shard_size=max_bytes)
    with (
        patch.object(checkpoint, "split_torch_state_dict_into_shards", split),
        patch.object(export, "PIECE", 8),
    ):
        yield


def written(path: Path, make: str, shape: tuple[int, int], max_bytes: int = 10**9) -> None:
    with small(max_bytes):
        if make in AXES:
            export_run(path, coder()._config(), spread(coder()._tensors(), shape, AXES[make]))
        else:
            export_run(path, CONFIG, spread(odd(), shape))


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("held", AXES)
@pytest.mark.parametrize("n", MESHES)
def test_the_run_of_many_ranks_is_that_of_one_process(ranks, tmp_path, n, held):
    ranks.run(n, written, tmp_path / "many", held, MESHES[n])
    coder().save(tmp_path / "one")
    assert files(tmp_path / "many") == files(tmp_path / "one")
    CrossLayerTranscoder.load(tmp_path / "many")


@pytest.mark.parametrize("n", MESHES)
def test_odd_tensors_are_written_alike(ranks, tmp_path, n):
    ranks.run(n, written, tmp_path / "many", "odd", MESHES[n])
    write_run(tmp_path / "one", CONFIG, odd())
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_a_large_run_is_split_into_the_same_files(ranks, tmp_path):
    ranks.run(4, written, tmp_path / "many", "rows", (1, 4), 400)
    with small(400):
        coder().save(tmp_path / "one")
    assert files(tmp_path / "many") == files(tmp_path / "one")
    assert len(files(tmp_path / "one")) > 4


def test_one_process_needs_no_group(tmp_path):
    export_run(tmp_path / "many", CONFIG, odd())
    write_run(tmp_path / "one", CONFIG, odd())
    assert files(tmp_path / "many") == files(tmp_path / "one")


def held(axis: int, n: int) -> dict[str, Tensor]:
    """A tensor of n rows of 1 KB, of which every rank has as many rows or columns, filled with its number."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "feature"))
    sizes = [n, 256]
    sizes[axis] //= dist.get_world_size()
    own = torch.full(sizes, float(dist.get_rank()))
    return {"W": DTensor.from_local(own, mesh, [Replicate(), Shard(axis)], run_check=False)}


def refused(path: Path, axis: int) -> str:
    """What is said when the disk of the last rank is full."""
    tensors = held(axis, 400)
    limit = no_file_larger_than(200_000) if dist.get_rank() else nullcontext()
    with limit, patch.object(export, "PIECE", 1024), pytest.raises(UserError) as error:
        export_run(path, CONFIG, tensors)
    return str(error.value)


@pytest.mark.parametrize("axis", [0, 1])
def test_what_one_rank_is_refused_all_report_and_nothing_is_left(ranks, tmp_path, axis):
    answers = ranks.run(2, refused, tmp_path, axis)
    assert answers == [f"{tmp_path}: cannot write (File too large); free some room or choose another folder"] * 2
    assert files(tmp_path) == {}


def written_in_little_memory(path: Path, n: int, room: int) -> None:
    """Export n rows while the system gives this process no more than `room` bytes."""
    tensors = held(0, n)
    status = Path("/proc/self/status").read_text()
    used = 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + room, before[1]))
    try:
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            torch.ones(n // 2, 256)
        export_run(path, CONFIG, tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_no_rank_needs_memory_for_more_than_a_piece(ranks, tmp_path):
    n = 1 << 16
    ranks.run(2, written_in_little_memory, tmp_path, n, n * 256)  # its rows take twice as much
    W = read_tensors(tmp_path / "model.safetensors")[0]["W"]
    assert torch.equal(W, torch.arange(n).ge(n // 2).float()[:, None].expand(n, 256))


def swapped(path: Path, n: int, piece: int) -> list[int]:
    """Bytes that a rank gets in each swap while n rows are exported."""
    got, swap = [], RankGroup.swap

    def noting(group: RankGroup, parts: Sequence[Tensor]) -> Tensor:
        found = swap(group, parts)
        got.append(found.nbytes)
        return found

    with patch.object(RankGroup, "swap", noting), patch.object(export, "PIECE", piece):
        export_run(path, CONFIG, held(1, n))
    return got


def test_columns_are_swapped_for_rows_a_piece_at_a_time(ranks, tmp_path):
    assert ranks.run(2, swapped, tmp_path, 50, 10_000) == [[9 * 1024, 9 * 1024, 7 * 1024]] * 2
    W = read_tensors(tmp_path / "model.safetensors")[0]["W"]
    assert torch.equal(W, torch.arange(256).ge(128).float().expand(50, 256))
