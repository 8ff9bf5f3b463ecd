"""A training that is killed (SIGKILL) at every file operation, and at random moments, ends as one that never was.

Each life is a process of its own, forked from a server that has imported everything, so that it begins in milliseconds.
"""

import json
import os
import random
import resource
import signal
import sys
import threading
from functools import partial
from itertools import count
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from crosslayer import (
    AuxK,
    CrossLayerTranscoder,
    JointTopK,
    TrainConfig,
    UserError,
    Wiring,
    load_model,
    train,
    workflow,
)
from crosslayer.activations.capture import ModelSource
from crosslayer.files import check_folder, read_tensors
from crosslayer.training.state import METRICS, STATE, StateFile
from making import text_examples

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.chmod", "tempfile.mkstemp")
PRELOADED = ["crosslayer", "pytest", "hypothesis.strategies", "transformers.models.llama.modeling_llama"]
STEPS, SHORT, KILLS = 200, 3, 20
LIFETIME, PATIENCE = 1.2, 120.0
"""Seconds that a life lasts at most where it is killed at random; seconds that none lasts."""


def config(steps: int) -> TrainConfig:
    """Several chunks, dead features, K and the learning rate on the move; a step is 30 tokens."""
    settings = {"sparsity": JointTopK(6), "d_transcoder": 16, "tokens": 30 * steps, "batch_tokens": 30}
    return TrainConfig(wiring=Wiring.full(3), calibration_tokens=200, density_tokens=100, auxk=AuxK(k=4), **settings)


def live(model: str, run: str, steps: int, dies_at: int, largest: int) -> None:
    """One life: go on from the state, where there is one.

    Die at a file operation in the run, by its number, or in the middle of a file of more bytes, or never where it is 0.
    """
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # one shared between processes would outlive a killed one
    workflow.ModelSource = partial(ModelSource, chunk_prompts=16)
    if dies_at:
        sys.addaudithook(reaper(run, dies_at))
    if largest:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    resume = (Path(run) / STATE).exists()
    loaded = load_model(model)
    train(loaded, text_examples(30), config(steps), run, resume=resume, overwrite=not resume, checkpoint_seconds=0.0)


def reaper(run: str, dies_at: int):
    """An audit hook that kills this process before its n-th file operation in `run`."""
    operations = count(1)

    def watch(event: str, arguments: tuple) -> None:
        if event in FILE_OPERATIONS and str(arguments[0]).startswith(run) and next(operations) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    return watch


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@pytest.fixture(scope="module")
def born(server, llama_folder):
    """Start a life of a run."""

    def start(run: Path, steps: int, dies_at: int = 0, largest: int = 0) -> BaseProcess:
        life = server.Process(target=live, args=(str(llama_folder), str(run), steps, dies_at, largest), daemon=True)
        life.start()
        return life

    return start


@pytest.fixture(scope="module")
def lived(born):
    """Live to the end; whether that was a violent one."""

    def wait(run: Path, steps: int, dies_at: int = 0, largest: int = 0) -> bool:
        life = born(run, steps, dies_at, largest)
        life.join(PATIENCE)
        assert life.exitcode in (0, -signal.SIGXFSZ if largest else -signal.SIGKILL)
        return life.exitcode != 0

    return wait


def finished(run: Path) -> bool:
    return (run / CONFIG).exists() and not (run / STATE).exists()


def shown(run: Path) -> set[str]:
    return {path.name for path in run.iterdir() if not path.name.startswith(".")} if run.exists() else set()


def hidden(run: Path) -> list[str]:
    return [path.name for path in run.iterdir() if path.name.startswith(".")]


def refuses(run: Path) -> bool:
    """Whether a training that is not to overwrite anything does not start in this folder."""
    try:
        check_folder(run, overwrite=False)
    except UserError:
        return True
    return False


def assert_sound(run: Path, steps: int) -> None:
    """What a kill leaves is a run, a state to resume from, or a folder to start anew in; never half a file."""
    assert shown(run) <= {CONFIG, WEIGHTS, METRICS, STATE}
    if CONFIG in shown(run):
        CrossLayerTranscoder.load(run)
    if STATE in shown(run):
        header = json.loads(read_tensors(run / STATE)[1]["crosslayer"])
        lines = (run / METRICS).read_text().splitlines(keepends=True) if METRICS in shown(run) else []
        logged = [json.loads(line)["step"] for line in lines if line.endswith("\n")]
        assert logged == sorted(set(logged))
        assert max(logged, default=0) <= header["counters"]["step_number"] + 1  # it is ahead by a step at most
    elif CONFIG not in shown(run):
        assert not shown(run)
        with pytest.raises(UserError, match=f"{run}: holds no {STATE} to resume from; start without --resume"):
            StateFile(run, {}).load(config(steps), torch.device("cpu"))


def assert_same_run(found: Path, wanted: Path) -> None:
    assert shown(found) == {CONFIG, WEIGHTS, METRICS}
    for name in (WEIGHTS, METRICS):
        assert (found / name).read_bytes() == (wanted / name).read_bytes()
    assert json.loads((found / CONFIG).read_text()) == json.loads((wanted / CONFIG).read_text())


@pytest.fixture(scope="module")
def whole(lived, tmp_path_factory) -> Path:
    """A long run that nobody killed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert not lived(run, STEPS)
    return run


class Stubborn:
    """A short run that dies at its 1st file operation, then at the 2nd of its next life, and so on, until it ends."""

    def __init__(self, run: Path, lived):
        self.run, self.refused = run, []
        for self.lives in count(1):
            if not lived(run, SHORT, dies_at=self.lives):
                break
            assert_sound(run, SHORT)
            if not shown(run) and refuses(run):
                self.refused.append(self.lives)


@pytest.fixture(scope="module")
def stubborn(lived, tmp_path_factory) -> Stubborn:
    return Stubborn(tmp_path_factory.mktemp("stubborn") / "run", lived)


@pytest.fixture(scope="module")
def short(lived, tmp_path_factory) -> Path:
    """A short run that nobody killed."""
    run = tmp_path_factory.mktemp("short") / "run"
    assert not lived(run, SHORT)
    return run


@pytest.fixture(scope="module")
def torn(lived, tmp_path_factory) -> Path:
    """A short run that died in the middle of its first state, and of a later one."""
    run = tmp_path_factory.mktemp("torn") / "run"
    for dies_at in (0, 20, 0):
        assert lived(run, SHORT, dies_at=dies_at, largest=0 if dies_at else 5000)
        assert_sound(run, SHORT)
    assert (run / STATE).exists()
    assert not lived(run, SHORT)
    return run


def test_a_training_killed_at_one_file_operation_after_the_other_ends_alike(stubborn, short):
    assert stubborn.lives > KILLS
    assert_same_run(stubborn.run, short)


def test_a_training_killed_in_the_middle_of_a_file_ends_alike(torn, short):
    assert_same_run(torn, short)


def test_no_leavings_of_the_killed_lie_about_in_the_end(stubborn):
    assert hidden(stubborn.run) == []


def test_no_leavings_of_those_killed_in_the_middle_of_a_file_lie_about_in_the_end(torn):
    assert hidden(torn) == []


def test_a_folder_that_looks_empty_is_started_in_anew(stubborn):
    assert stubborn.refused == []


def test_a_training_killed_at_random_moments_ends_alike(whole, born, tmp_path):
    moments, kills = random.Random(0), 0
    for number in count():
        run = tmp_path / f"run-{number}"
        while not finished(run):
            life = born(run, STEPS)
            life.join(moments.uniform(0, LIFETIME) if kills < KILLS else PATIENCE)
            kills += life.exitcode is None
            life.kill()
            life.join()
            assert life.exitcode in (0, -signal.SIGKILL)
            assert_sound(run, STEPS)
        assert_same_run(run, whole)
        if kills >= KILLS:
            break
