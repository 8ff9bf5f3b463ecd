"""The training loop of one run: steps, a progress bar, a log, and a state on disk that survives any end."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crosslayer.errors import UserError
from crosslayer.files import append_line
from crosslayer.memory import keep_freed_memory
from crosslayer.training.state import METRICS, save_state
from crosslayer.training.stream import Place, StreamBatch
from crosslayer.training.trainer import StepMetrics, Trainer

LOG_EVERY = 10
"""Steps between two lines of metrics.jsonl."""


class Interrupted(KeyboardInterrupt):
    """The training was asked to stop; its state is on disk."""


def fit(
    trainer: Trainer,
    batches: Iterator[StreamBatch],
    place: Place,
    run: Path,
    context: dict[str, Any],
    *,
    checkpoint_seconds: float = 60.0,
) -> Place:
    """Train to the end on `batches`, which begin at `place`.

    A state is kept in `run` every `checkpoint_seconds`, and whenever the loop is left.

    Returns:
        The place in the stream after the last batch.

    Raises:
        Interrupted: after Ctrl-C or a termination signal, between two steps.
        UserError: when a loss is not a number; the state kept is the last good one.
    """
    keep_freed_memory()
    keep = _Keeper(trainer, run, context, place, checkpoint_seconds)
    with _stop_flag() as stop, _bar(trainer) as bar, keep:
        while not (trainer.finished or stop):
            batch = next(batches)
            metrics = trainer.step(batch.batch)
            trainer.leave_out(batch.n_first, batch.n_outliers)
            keep.place = batch.following
            bar.update(min(metrics.tokens, trainer.config.tokens) - bar.n)
            bar.set_postfix_str(_summary(metrics), refresh=False)
            if metrics.step % LOG_EVERY == 0 or trainer.finished:
                append_line(run / METRICS, json.dumps(asdict(metrics)))
            keep.now_and_then()
    if not trainer.finished:
        raise Interrupted(f"stopped after {trainer.tokens:,} tokens; the same command with --resume goes on from there")
    return keep.place


class _Keeper:
    """Keeps the state of a training on disk: at its start, every so often, and when its loop is left between steps."""

    def __init__(self, trainer: Trainer, run: Path, context: dict[str, Any], place: Place, seconds: float):
        self.trainer, self.run, self.context, self.place, self.seconds = trainer, run, context, place, seconds
        self.saved = time.monotonic()

    def now_and_then(self) -> None:
        """Save when it is time."""
        if time.monotonic() - self.saved > self.seconds:
            self.save()

    def save(self) -> None:
        """Save now."""
        save_state(self.run, self.trainer, self.place, self.context)
        self.saved = time.monotonic()

    def __enter__(self):
        self.save()

    def __exit__(self, kind, error, traceback):
        if kind is None or issubclass(kind, UserError):  # anything else may have hit in the middle of a step
            self.save()


@contextmanager
def _stop_flag() -> Iterator[list[int]]:
    """A list that gets an item at the first Ctrl-C or termination signal; a second one interrupts at once."""
    asked: list[int] = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        tqdm.write("stopping after this step; once more stops at once", file=sys.stderr)

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
    return tqdm(total=total, initial=done, unit="tok", unit_scale=True, desc="train", dynamic_ncols=True)


def _summary(metrics: StepMetrics) -> str:
    return f"loss {metrics.loss:.3f} fvu {metrics.fvu:.3f} l0 {metrics.l0:.0f} dead {metrics.dead_fraction:.0%}"
