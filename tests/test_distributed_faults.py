"""Two ranks, one of which is killed: under torchrun the job ends as one that never was; without, the other says so.

Under the real torchrun, whose elastic restarts begin every life, at a random moment in each of ten. Its ranks are
forked from a server that has imported torch, which would otherwise take most of the time (`torchrun_training.py`).
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from unittest.mock import patch

import pytest

from crosslayer import cli, train
from crosslayer.distributed import checkpoint
from crosslayer.distributed.crew import Crew
from crosslayer.training.trainer import Trainer
from crosslayer.verbs import training
from making import text_examples
from ranks import of_two, two
from test_distributed_training import assert_same_run

LIVES, PATIENCE = 10, 200.0
"""Lives in which a rank is killed; seconds that a job may take."""
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[Path, Path]]:
    """The socket of a server of ranks, and what they print."""
    folder = tmp_path_factory.mktemp("server")
    path, log = folder / "socket", folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, HERE / "torchrun_training.py", path], stdout=file, stderr=file)
        while not path.exists() and process.poll() is None:
            time.sleep(0.05)
        yield path, log
        process.kill()
        process.wait()


def job(server: Path, run: Path, n_feature: int, lives: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(lives)]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--monitor-interval", "0.02"]
    script = [HERE / "torchrun_rank.py", server, run, str(lives)]
    environment = {**os.environ, "FEATURE_RANKS": str(n_feature)}
    subprocess.run(
        [*launcher, *rendezvous, *script], env=environment, check=True, timeout=PATIENCE, capture_output=True
    )


def test_a_job_whose_ranks_are_killed_ends_as_one_that_never_was(server, tmp_path):
    path, log = server
    job(path, tmp_path / "whole", 2, 0)
    job(path, tmp_path / "killed", 2, LIVES)
    printed = log.read_text()
    assert printed.count("killed at step") == LIVES
    assert "resumed at step" in printed
    assert "Traceback" not in printed
    for file in ("model.safetensors", "config.json", "metrics.jsonl"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert {file.name for file in (tmp_path / "killed").iterdir()} == {f.name for f in (tmp_path / "whole").iterdir()}


class Places:
    """Where a rank of a command line may die, by name: what is called there."""

    step = (Trainer, "_sum_gradients")
    save = (checkpoint._Writer, "write_data")
    piece = (Crew, "_publish")


def live(where: str, n: int, victim: int, said: Path, args: list[str]) -> None:
    """Be a rank of a command line, and die at the n-th call of a place if this is the victim; stderr goes to a file."""
    owner, name = getattr(Places, where)
    call, calls, rank = getattr(owner, name), count(1), int(os.environ["RANK"])

    def mortal(*given):
        if rank == victim and next(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*given)

    setattr(owner, name, mortal)
    training.run_training = partial(train, checkpoint_seconds=0.0)
    sys.argv, sys.stderr = ["crosslayer", *args], said.with_name(f"said-{rank}").open("w", buffering=1)
    cli.main()


@pytest.fixture(scope="module")
def asked(llama_folder, tmp_path_factory) -> list[str]:
    """A training, without its output folder."""
    data = tmp_path_factory.mktemp("data") / "texts.txt"
    data.write_text("\n".join(example.prompt for example in text_examples(40)))
    size = ["--d-transcoder", "16", "--k", "6", "--tokens", "600", "--batch-tokens", "60"]
    return ["train", str(llama_folder), str(data), *size, "--timeout", "30", "--out"]


@pytest.fixture(scope="module")
def whole(asked, tmp_path_factory) -> Path:
    """The run of one process that nobody killed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    alone(*asked, str(run))
    return run


def assert_one_line(said: Path, survivor: int) -> None:
    """What a rank says beside its progress."""
    *bars, line = [part for part in said.read_text().replace("\r", "\n").splitlines() if part.strip()]
    assert line.startswith(f"crosslayer: rank {survivor}: another rank ended or did not answer in time (")
    assert all(bar.startswith("train: ") for bar in bars)


def alone(*args: str) -> None:
    with patch.object(sys, "argv", ["crosslayer", *args]):
        cli.main()


@pytest.mark.parametrize(("where", "n", "victim"), [("step", 5, 1), ("save", 3, 0)])
def test_the_survivor_says_in_a_line_that_the_other_is_gone_and_its_state_goes_on(
    asked, whole, tmp_path, where, n, victim
):
    run, survivor = tmp_path / "run", 1 - victim
    codes = two(live, where, n, victim, tmp_path / "said", [*asked, str(run)])
    assert (codes[victim], codes[survivor]) == (-signal.SIGKILL, 1)
    assert_one_line(tmp_path / f"said-{survivor}", survivor)
    alone(*asked, str(run), "--resume")
    assert_same_run(run, whole)


def test_who_loses_the_keeper_of_the_store_of_a_shared_verb_says_so_in_a_line(asked, tmp_path):
    command = ["capture", *asked[1:3], "--out", str(tmp_path / "store")]
    assert two(live, "piece", 2, 0, tmp_path / "said", command) == [-signal.SIGKILL, 1]
    assert_one_line(tmp_path / "said-1", 1)


def test_a_rank_that_nobody_meets_says_so_in_a_line(asked, tmp_path):
    command = [sys.executable, "-m", "crosslayer", *asked, str(tmp_path / "run"), "--timeout", "1"]
    found = subprocess.run(
        command, env={**os.environ, "RANK": "1", **of_two()}, timeout=PATIENCE, capture_output=True, text=True
    )
    assert found.returncode == 1
    (line,) = found.stderr.splitlines()
    assert line.startswith("crosslayer: rank 1: another rank ended or did not answer in time (")
