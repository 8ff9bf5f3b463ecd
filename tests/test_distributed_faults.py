"""A job of two ranks, one of which is killed at a random moment in each of ten lives, ends as one that never was.

Under the real torchrun, whose elastic restarts begin every life. Its ranks are forked from a server that has imported
torch, which would otherwise take most of the time (`torchrun_training.py`).
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

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
