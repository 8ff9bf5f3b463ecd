"""The training loop of one run, or of several at once: steps, bars, logs, and states on disk that survive any end."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from crosslayer.errors import UserError
from crosslayer.files import append_line
from crosslayer.memory import keep_freed_memory
from crosslayer.team import Group, together
from crosslayer.training.state import METRICS, States
from crosslayer.training.stream import Place, StreamBatch
from crosslayer.training.trainer import StepMetrics, Trainer

LOG_EVERY = 10
"""Steps between two lines of metrics.jsonl."""
ECHO_SECONDS = 5.0
"""How long after a signal the same one may be an echo of it."""


class Interrupted(KeyboardInterrupt):
    """The training was asked to stop; its state is on disk."""


@dataclass
class Training:
    """One training under way."""

    trainer: Trainer
    batches: Iterator[StreamBatch]
    """They begin at `place`."""
    place: Place
    """In the stream, after the last step."""
    run: Path
    states: States


def fit(*trainings: Training, checkpoint_seconds: float = 60.0, again: str = "the same command with --resume") -> None:
    """Train to the end; of several, the one that has seen the fewest tokens takes the next step.

    So trainings of one seed on one source, which keeps its last chunk, have every chunk made once.

    The states are kept every `checkpoint_seconds`, and whenever the loop is left. The first process of a team shows the
    bars and writes the logs. `again` says what goes on after an interruption.

    Raises:
        Interrupted: after Ctrl-C or a termination signal, between two steps; on all processes, whoever got it.
        UserError: when a loss is not a number; the states kept are the last good ones.
    """
    keep_freed_memory()
    everyone = trainings[0].trainer.team.everyone
    with _stop_flag(everyone) as stop, ExitStack() as stack:
        loops = [stack.enter_context(_Loop(t, checkpoint_seconds, len(trainings) > 1)) for t in trainings]
        while left := [loop for loop in loops if not loop.training.trainer.finished]:
            stopping, due = everyone.sum(torch.tensor([len(stop), left[0].due and everyone.rank == 0])).tolist()
            if stopping:
                break
            if due:
                for loop in left:
                    loop.save()
            min(left, key=lambda loop: loop.training.trainer.tokens).step()
    if left:
        done = " and ".join(f"{training.trainer.tokens:,}" for training in trainings)
        raise Interrupted(f"stopped after {done} tokens; {again} goes on from there")


class _Loop:
    """The steps of a training, its bar, its log and, at its start, every so often and at its end, its state on disk."""

    def __init__(self, training: Training, seconds: float, named: bool):
        self.training, self.seconds, self.saved = training, seconds, time.monotonic()
        self.name = training.run.name if named else "train"

    def step(self) -> None:
        """Take one."""
        training, trainer = self.training, self.training.trainer
        batch = next(training.batches)
        metrics = trainer.step(batch.batch)
        trainer.leave_out(batch.n_first, batch.n_outliers)
        training.place = batch.following
        self.bar.update(min(metrics.tokens, trainer.config.tokens) - self.bar.n)
        self.bar.set_postfix_str(_summary(metrics), refresh=False)
        if metrics.step % LOG_EVERY == 0 or trainer.finished:
            everyone = trainer.team.everyone
            with together(everyone):
                if everyone.rank == 0:
                    append_line(training.run / METRICS, json.dumps(asdict(metrics)))

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self.saved > self.seconds

    def save(self) -> None:
        """Save now."""
        self.training.states.save(self.training.trainer, self.training.place)
        self.saved = time.monotonic()

    def __enter__(self) -> "_Loop":
        self.save()
        self.bar = _bar(self.training.trainer, self.name)
        return self

    def __exit__(self, kind, error, traceback):
        self.bar.close()
        if kind is None or issubclass(kind, UserError):  # anything else may have hit in the middle of a step
            self.save()
            self.training.states.close()


@contextmanager
def _stop_flag(everyone: Group) -> Iterator[list[float]]:
    """A list that gets an item at the first Ctrl-C or termination signal; a second one interrupts at once.

    In a team, whose launcher passes on what the terminal has sent already, only after some seconds.
    """
    asked: list[float] = []

    def ask(number, frame):
        if asked and (everyone.size == 1 or time.monotonic() - asked[0] > ECHO_SECONDS):
            raise KeyboardInterrupt
        if not asked and everyone.rank == 0:
            tqdm.write("stopping after this step; once more stops at once", file=sys.stderr)
        asked.append(time.monotonic())

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # signals can be caught in the main thread only
        before = {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bar(trainer: Trainer, name: str) -> tqdm:
    total, done = trainer.config.tokens, trainer.tokens
    quiet = trainer.team.everyone.rank > 0
    return tqdm(total=total, initial=done, unit="tok", unit_scale=True, desc=name, dynamic_ncols=True, disable=quiet)


def _summary(metrics: StepMetrics) -> str:
    return f"loss {metrics.loss:.3f} fvu {metrics.fvu:.3f} l0 {metrics.l0:.0f} dead {metrics.dead_fraction:.0%}"
