"""Whatever ends a training, it goes on from its state to the very weights of an uninterrupted one."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch

from crosslayer import (
    AuxK,
    CrossLayerTranscoder,
    JointTopK,
    JumpReLU,
    TrainConfig,
    UserError,
    Wiring,
    workflow,
)
from crosslayer import train as run_training
from crosslayer.activations.capture import ModelSource
from crosslayer.activations.record import Activations
from crosslayer.files import read_tensors
from crosslayer.training.fit import Interrupted, Training, fit
from crosslayer.training.scales import estimate_scales
from crosslayer.training.state import METRICS, STATE, StateFile
from crosslayer.training.stream import Place, shuffled_batches
from crosslayer.training.trainer import Trainer
from making import Watched, no_file_larger_than, random_activations, text_examples

WEIGHTS = "model.safetensors"
CPU = torch.device("cpu")
NEVER = 3600.0
"""Seconds between two states, where only the end of the loop is to leave one."""


def config(**settings) -> TrainConfig:
    defaults = {"sparsity": JointTopK(6), "d_transcoder": 24, "tokens": 3500, "batch_tokens": 100}
    return TrainConfig(wiring=Wiring.full(3), calibration_tokens=500, density_tokens=900, **{**defaults, **settings})


SETTINGS, CONTEXT = config(tokens=2500, batch_tokens=100), {"model": "m"}


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / METRICS).read_text().splitlines()]


class Struck(Trainer):
    """A trainer during whose n-th step something happens."""

    at, event = 0, staticmethod(lambda: None)

    def step(self, batch):
        if self.step_number + 1 == self.at:
            self.event()
        return super().step(batch)


class Chunks:
    """Five batches of 100 tokens a chunk, 10 first positions and an outlier; one token can be made no number."""

    def __init__(self, bad: bool = False):
        self.bad = bad

    def chunk(self, index: int) -> Activations:
        activations = random_activations(511, 3, 8, seed=index, first_every=51)
        activations.position[510] = 5
        activations.x[510] *= 1000
        if self.bad and index == 2:
            activations.y[77, 1, 0] = torch.nan
        return activations


def start(at: int = 0, event: Callable[[], None] | None = None) -> Struck:
    coach = Struck(SETTINGS, estimate_scales(Chunks().chunk(0)))
    coach.at, coach.event = at, event or coach.event
    return coach


def fitted(coach: Trainer, run: Path, place: Place | None = None, source=None, seconds: float = NEVER) -> Path:
    run.mkdir(exist_ok=True)
    place = place or Place()
    batches = shuffled_batches(source or Chunks(), SETTINGS.batch_tokens, SETTINGS.seed, place)
    fit(Training(coach, batches, place, run, StateFile(run, CONTEXT)), checkpoint_seconds=seconds)
    return run


def restored(run: Path) -> tuple[Trainer, Place]:
    kept = StateFile(run, CONTEXT).load(SETTINGS, CPU)
    return Trainer(SETTINGS, kept.scales).restore(kept.tensors, kept.counters), kept.place


def resumed(run: Path, source=None) -> Path:
    coach, place = restored(run)
    return fitted(coach, run, place, source)


def assert_same_state(found: Path, wanted: Path) -> None:
    ours, theirs = read_tensors(found / STATE), read_tensors(wanted / STATE)
    assert ours[1] == theirs[1]
    assert all(torch.equal(ours[0][name], tensor) for name, tensor in theirs[0].items())
    assert (found / METRICS).read_text() == (wanted / METRICS).read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return fitted(start(), tmp_path_factory.mktemp("fits") / "whole")


def test_the_log_has_every_tenth_step_and_the_last(whole):
    assert steps(whole) == [10, 20, 25]


def test_what_the_stream_leaves_out_is_counted(whole):
    counters = json.loads(read_tensors(whole / STATE)[1]["crosslayer"])["counters"]
    assert (counters["first_left_out"], counters["outliers_left_out"], counters["tokens"]) == (50, 5, 2500)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 5, 13, 20])
def test_a_signal_stops_between_two_steps_and_resuming_ends_alike(whole, tmp_path, at, number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=rf"stopped after {at * 100:,} tokens; the same command with --resume"):
        fitted(start(at, lambda: os.kill(os.getpid(), number)), tmp_path / "run")
    assert signal.getsignal(number) is before
    assert_same_state(resumed(tmp_path / "run"), whole)


def test_a_training_can_be_stopped_again_and_again(whole, tmp_path):
    def stop():
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        fitted(start(4, stop), tmp_path / "run")
    for at in (9, 17):
        coach, place = restored(tmp_path / "run")
        coach.__class__, coach.at, coach.event = Struck, at, stop
        with pytest.raises(Interrupted):
            fitted(coach, tmp_path / "run", place)
    assert_same_state(resumed(tmp_path / "run"), whole)


def test_a_second_signal_stops_at_once(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as raised:
        fitted(start(3, twice), tmp_path / "run", seconds=0.0)
    assert not isinstance(raised.value, Interrupted)
    assert restored(tmp_path / "run")[1] == Place(0, 2)


@pytest.mark.parametrize("at", [2, 11, 18])
def test_after_a_kill_the_last_state_goes_on_and_the_log_has_no_step_twice(whole, tmp_path, at):
    """The state is copied away in the middle, the log is ahead of it and its last line is torn."""
    kept = tmp_path / "kept"
    coach = start(at, lambda: (kept.mkdir(), shutil.copy(tmp_path / "run" / STATE, kept)))
    fitted(coach, tmp_path / "run", seconds=0.0)
    shutil.copy(tmp_path / "run" / METRICS, kept)
    with (kept / METRICS).open("a") as log:
        log.write('{"step": 26, "lo')
    assert_same_state(resumed(kept), whole)


@pytest.mark.parametrize("seconds", [0.0, NEVER])
def test_a_loss_that_is_no_number_leaves_the_last_good_state(whole, tmp_path, seconds):
    with pytest.raises(UserError, match="layer 1's target is not a finite number"):
        fitted(start(), tmp_path / "run", source=Chunks(bad=True), seconds=seconds)
    assert 0 < restored(tmp_path / "run")[0].step_number < 15
    assert_same_state(resumed(tmp_path / "run"), whole)


@pytest.mark.parametrize(("seconds", "kept"), [(0.0, 7), (NEVER, 0)])
def test_a_full_disk_stops_the_training_and_keeps_the_last_state(whole, tmp_path, seconds, kept, capsys):
    with ExitStack() as disk:
        coach = start(8, lambda: disk.enter_context(no_file_larger_than(50)))
        with pytest.raises(UserError, match=r"run/.*: cannot write .*; free some room"):
            fitted(coach, tmp_path / "run", seconds=seconds)
    assert restored(tmp_path / "run")[0].step_number == kept
    assert_same_state(resumed(tmp_path / "run"), whole)


@pytest.mark.parametrize(
    ("settings", "context", "named"),
    [
        ({"sparsity": JointTopK(7)}, {}, r"was started with sparsity = .*'k': 6.*, now .*'k': 7"),
        ({"sparsity": JumpReLU()}, {}, "was started with sparsity"),
        ({"learning_rate": 0.5}, {}, r"was started with learning_rate = None, now 0\.5 is asked for"),
        ({"tokens": 9999}, {}, "was started with tokens = 2500, now 9999"),
        ({"auxk": AuxK(k=3)}, {}, "was started with auxk"),
        ({"seed": 5}, {}, "was started with seed = 0, now 5"),
        ({}, {"model": "n"}, "was started with model = m, now n is asked for; resume with the same settings"),
        ({}, {"n_examples": 3}, "was started with n_examples = None, now 3"),
    ],
)
def test_another_configuration_is_not_resumed_and_named(whole, settings, context, named):
    asked = config(**{"tokens": 2500, "batch_tokens": 100, **settings})
    with pytest.raises(UserError, match=named):
        StateFile(whole, {**CONTEXT, **context}).load(asked, CPU)


def test_a_damaged_state_is_named(whole, tmp_path):
    (tmp_path / STATE).write_bytes((whole / STATE).read_bytes()[:-50])
    with pytest.raises(UserError, match=f"{STATE}: cannot be read"):
        StateFile(tmp_path, {}).load(config(), CPU)


# The same from a language model on, through `crosslayer.train`.

CHUNK = 120
"""Prompts a chunk."""


def train(model, out: Path, data=None, **options):
    return run_training(model, text_examples(60) if data is None else data, config(), out, **options)


def assert_same_run(found: Path, wanted: Path) -> None:
    assert (found / WEIGHTS).read_bytes() == (wanted / WEIGHTS).read_bytes()
    assert json.loads((found / "config.json").read_text()) == json.loads((wanted / "config.json").read_text())
    assert (found / METRICS).read_text() == (wanted / METRICS).read_text()
    assert sorted(p.name for p in found.iterdir()) == ["config.json", METRICS, WEIGHTS]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(workflow, "ModelSource", partial(ModelSource, chunk_prompts=CHUNK))


@pytest.fixture
def trained(llama, tmp_path) -> Path:
    train(llama, tmp_path / "whole")
    return tmp_path / "whole"


def test_a_run_interrupted_in_a_later_chunk_is_resumed_to_the_same_files(llama, trained, tmp_path):
    data = Watched(text_examples(60), 3 * CHUNK - 100, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        train(llama, tmp_path / "run", data)
    assert (tmp_path / "run" / STATE).exists()
    assert not (tmp_path / "run" / WEIGHTS).exists()
    train(llama, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", trained)


def test_a_run_killed_in_a_later_chunk_is_resumed_to_the_same_files(llama, trained, tmp_path):
    data = Watched(text_examples(60), 3 * CHUNK - 100, lambda: shutil.copytree(tmp_path / "run", tmp_path / "killed"))
    train(llama, tmp_path / "run", data, checkpoint_seconds=0.0)
    assert 0 < steps(tmp_path / "killed")[-1] < steps(trained)[-1]
    train(llama, tmp_path / "killed", resume=True)
    assert_same_run(tmp_path / "killed", trained)


def test_a_run_killed_before_its_state_was_removed_is_finished_again(llama, trained, tmp_path, monkeypatch):
    save = CrossLayerTranscoder.save

    def save_and_be_killed(coder: CrossLayerTranscoder, path: Path) -> None:
        save(coder, path)
        shutil.copytree(path, tmp_path / "killed")

    with monkeypatch.context() as patch:
        patch.setattr(CrossLayerTranscoder, "save", save_and_be_killed)
        train(llama, tmp_path / "run", checkpoint_seconds=0.0)
    assert (tmp_path / "killed" / STATE).exists()
    assert steps(tmp_path / "killed") == steps(trained)
    train(llama, tmp_path / "killed", resume=True)
    assert_same_run(tmp_path / "killed", trained)


def test_a_finished_run_is_not_resumed(llama, trained):
    with pytest.raises(UserError, match="is finished already; start without --resume"):
        train(llama, trained, resume=True)
    assert (trained / WEIGHTS).exists()


def test_no_chunk_is_captured_for_nothing(tmp_path):
    class Counting(Chunks):
        def __init__(self):
            super().__init__()
            self.asked = []

        def chunk(self, index: int) -> Activations:
            self.asked.append(index)
            return super().chunk(index)

    source = Counting()
    fitted(start(), tmp_path / "run", source=source)
    assert source.asked == list(range(SETTINGS.tokens // 500))
