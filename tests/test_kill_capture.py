"""A capture that is killed (SIGKILL) at random moments, or at any file operation, ends as one that never was."""

import random
import signal
import sys
import threading
from functools import partial
from itertools import count
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from crosslayer import Store, capture, load_model
from crosslayer.activations import to_store
from crosslayer.activations.capture import ModelSource
from crosslayer.activations.manifest import MANIFEST
from making import text_examples
from test_kill import PATIENCE, PRELOADED, reaper

TOKENS, SHORT, KILLS = 2000, 150, 20
LIFETIME = 0.3
"""Seconds that a life lasts at most, from its first shard on, where it is killed at random."""


def live(model: str, out: str, tokens: int, dies_at: int) -> None:
    """One life: go on with the store, where there is one; die at a file operation in it, by its number."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # one shared between processes would outlive a killed one
    to_store.ModelSource = partial(ModelSource, chunk_prompts=16, batch_prompts=4)
    if dies_at:
        sys.addaudithook(reaper(out, dies_at))
    resume = (Path(out) / MANIFEST).exists()
    capture(load_model(model), text_examples(30), out, tokens=tokens, shard_bytes=30_000, resume=resume)


@pytest.fixture(scope="module")
def born(llama_folder):
    """Start a life of a store."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def start(out: Path, tokens: int, dies_at: int = 0) -> BaseProcess:
        life = context.Process(target=live, args=(str(llama_folder), str(out), tokens, dies_at), daemon=True)
        life.start()
        return life

    return start


@pytest.fixture(scope="module")
def lived(born):
    """Live to the end; whether that was a violent one."""

    def wait(out: Path, tokens: int, dies_at: int = 0) -> bool:
        life = born(out, tokens, dies_at)
        life.join(PATIENCE)
        assert life.exitcode in (0, -signal.SIGKILL)
        return life.exitcode != 0

    return wait


def finished(out: Path) -> bool:
    return (out / MANIFEST).exists() and Store(out).manifest.finished


def n_shards(out: Path) -> int:
    return len(Store(out).manifest.shards) if (out / MANIFEST).exists() else 0


def wait_for_a_shard(life: BaseProcess, out: Path) -> None:
    before = n_shards(out)
    while life.exitcode is None and n_shards(out) == before:
        life.join(0.01)


def assert_sound(out: Path) -> None:
    """What a kill leaves is a store that verifies, or nothing that shows."""
    if (out / MANIFEST).exists():
        store = Store(out)
        store.verify()
        assert len(store.read(0, len(store))) == len(store)
    elif out.exists():
        assert not [path for path in out.iterdir() if not path.name.startswith(".")]


def assert_same_store(found: Path, wanted: Path) -> None:
    assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in wanted.iterdir())
    assert all((found / path.name).read_bytes() == path.read_bytes() for path in wanted.iterdir())


def test_a_capture_killed_at_random_moments_ends_alike(born, lived, tmp_path):
    moments, kills = random.Random(1), 0
    assert not lived(tmp_path / "whole", TOKENS)
    assert len(Store(tmp_path / "whole").manifest.shards) > KILLS
    for number in count():
        out = tmp_path / f"store-{number}"
        while not finished(out):
            life = born(out, TOKENS)
            wait_for_a_shard(life, out)
            life.join(moments.uniform(0, LIFETIME) if kills < KILLS else PATIENCE)
            kills += life.exitcode is None
            life.kill()
            life.join()
            assert life.exitcode in (0, -signal.SIGKILL)
            assert_sound(out)
        assert_same_store(out, tmp_path / "whole")
        if kills >= KILLS:
            break


def test_a_capture_killed_at_one_file_operation_after_the_other_ends_alike(lived, tmp_path):
    assert not lived(tmp_path / "whole", SHORT)
    for lives in count(1):
        if not lived(tmp_path / "store", SHORT, dies_at=lives):
            break
        assert_sound(tmp_path / "store")
    assert lives > 10
    assert_same_store(tmp_path / "store", tmp_path / "whole")
