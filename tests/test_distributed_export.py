"""A run written by many ranks: the files of one process, byte for byte."""

import resource
from collections.abc import Iterator
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
from crosslayer.files import read_tensors
from making import no_file_larger_than, random_coder

MESHES = {1: (1, 1), 2: (1, 2), 4: (2, 2)}
CONFIG = {"of": "é"}


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


def spread(tensors: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
    """The rows of the larger ones over the feature axis, one DTensor that is replicated, and one plain tensor."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "feature"))
    last = list(tensors)[-1]
    return {
        name: tensor
        if name == last
        else distribute_tensor(tensor, mesh, [Replicate(), Shard(0) if tensor.dim() > 1 else Replicate()])
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
        if make == "coder":
            export_run(path, coder()._config(), spread(coder()._tensors(), shape))
        else:
            export_run(path, CONFIG, spread(odd(), shape))


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("n", MESHES)
def test_the_run_of_many_ranks_is_that_of_one_process(ranks, tmp_path, n):
    ranks.run(n, written, tmp_path / "many", "coder", MESHES[n])
    coder().save(tmp_path / "one")
    assert files(tmp_path / "many") == files(tmp_path / "one")
    CrossLayerTranscoder.load(tmp_path / "many")


@pytest.mark.parametrize("n", MESHES)
def test_odd_tensors_are_written_alike(ranks, tmp_path, n):
    ranks.run(n, written, tmp_path / "many", "odd", MESHES[n])
    write_run(tmp_path / "one", CONFIG, odd())
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_a_large_run_is_split_into_the_same_files(ranks, tmp_path):
    ranks.run(4, written, tmp_path / "many", "coder", (1, 4), 400)
    with small(400):
        coder().save(tmp_path / "one")
    assert files(tmp_path / "many") == files(tmp_path / "one")
    assert len(files(tmp_path / "one")) > 4


def test_one_process_needs_no_group(tmp_path):
    export_run(tmp_path / "many", CONFIG, odd())
    write_run(tmp_path / "one", CONFIG, odd())
    assert files(tmp_path / "many") == files(tmp_path / "one")


def rows(n: int) -> dict[str, Tensor]:
    """A tensor of n rows of 1 KB, of which every rank has as many, filled with its number."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "feature"))
    own = torch.full((n // dist.get_world_size(), 256), float(dist.get_rank()))
    return {"W": DTensor.from_local(own, mesh, [Replicate(), Shard(0)], run_check=False)}


def refused(path: Path) -> str:
    """What is said when the disk of the last rank is full."""
    tensors = rows(400)
    limit = no_file_larger_than(200_000) if dist.get_rank() else nullcontext()
    with limit, pytest.raises(UserError) as error:
        export_run(path, CONFIG, tensors)
    return str(error.value)


def test_what_one_rank_is_refused_all_report_and_nothing_is_left(ranks, tmp_path):
    answers = ranks.run(2, refused, tmp_path)
    assert answers == [f"{tmp_path}: cannot write (File too large); free some room or choose another folder"] * 2
    assert files(tmp_path) == {}


def written_in_little_memory(path: Path, n: int, room: int) -> None:
    """Export n rows while the system gives this process no more than `room` bytes."""
    tensors = rows(n)
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
