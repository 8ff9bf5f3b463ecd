"""The training loop of one run: steps, a progress bar, a log, and a state on disk that survives any end."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
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


def fit(
    trainer: Trainer,
    batches: Iterator[StreamBatch],
    place: Place,
    run: Path,
    states: States,
    *,
    checkpoint_seconds: float = 60.0,
) -> Place:
    """Train to the end on `batches`, which begin at `place`.

    The state is kept every `checkpoint_seconds`, and whenever the loop is left. The first process of a team shows the
    bar and writes the log.

    Returns:
        The place in the stream after the last batch.

    Raises:
        Interrupted: after Ctrl-C or a termination signal, between two steps; on all processes, whoever got it.
        UserError: when a loss is not a number; the state kept is the last good one.
    """
    keep_freed_memory()
    everyone = trainer.team.everyone
    keep = _Keeper(trainer, states, place, checkpoint_seconds)
    with _stop_flag(everyone) as stop, _bar(trainer) as bar, keep:
        while not trainer.finished:
            stopping, due = everyone.sum(torch.tensor([len(stop), keep.due and everyone.rank == 0])).tolist()
            if stopping:
                break
            if due:
                keep.save()
            batch = next(batches)
            metrics = trainer.step(batch.batch)
            trainer.leave_out(batch.n_first, batch.n_outliers)
            keep.place = batch.following
            bar.update(min(metrics.tokens, trainer.config.tokens) - bar.n)
            bar.set_postfix_str(_summary(metrics), refresh=False)
            if metrics.step % LOG_EVERY == 0 or trainer.finished:
                with together(everyone):
                    if everyone.rank == 0:
                        append_line(run / METRICS, json.dumps(asdict(metrics)))
    if not trainer.finished:
        raise Interrupted(f"stopped after {trainer.tokens:,} tokens; the same command with --resume goes on from there")
    return keep.place


class _Keeper:
    """Keeps the state of a training on disk: at its start, every so often, and when its loop is left between steps."""

    def __init__(self, trainer: Trainer, states: States, place: Place, seconds: float):
        self.trainer, self.states, self.place, self.seconds = trainer, states, place, seconds
        self.saved = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self.saved > self.seconds

    def save(self) -> None:
        """Save now."""
        self.states.save(self.trainer, self.place)
        self.saved = time.monotonic()

    def __enter__(self):
        self.save()

    def __exit__(self, kind, error, traceback):
        if kind is None or issubclass(kind, UserError):  # anything else may have hit in the middle of a step
            self.save()
            self.states.close()


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


def _bar(trainer: Trainer) -> tqdm:
    total, done = trainer.config.tokens, trainer.tokens
    quiet = trainer.team.everyone.rank > 0
    return tqdm(total=total, initial=done, unit="tok", unit_scale=True, desc="train", dynamic_ncols=True, disable=quiet)


def _summary(metrics: StepMetrics) -> str:
    return f"loss {metrics.loss:.3f} fvu {metrics.fvu:.3f} l0 {metrics.l0:.0f} dead {metrics.dead_fraction:.0%}"
