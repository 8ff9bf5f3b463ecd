"""Processes that this one starts to share its work."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partialmethod
from multiprocessing import active_children, get_context, parent_process
from threading import RLock, Thread
from typing import Any, Protocol

import torch
from tqdm import tqdm

from crosslayer.errors import UserError


class Work(Protocol):
    """Work in pieces, each of which ends in a file."""

    def do(self, name: str) -> object:
        """Do the piece of this name, unless its file is there."""
        ...


def do_at_once(n: int, load: Callable[[], Work], rounds: Iterable[Sequence[str]], desc: str) -> None:
    """Let several processes do all pieces of some work, which whoever asks for it finds in files afterwards.

    Args:
        n: how many processes.
        load: what each of them has the work from.
        rounds: names of the pieces; those of a round do not wait for each other.
        desc: what the bar is called.

    Raises:
        UserError: as the pieces do, and when a process dies.
    """
    rounds = list(rounds)
    with (
        working(n, _take_up, load) as pool,
        tqdm(total=sum(map(len, rounds)), unit="piece", desc=desc, disable=None, leave=False) as bar,
    ):
        for names in rounds:
            for _ in pool.map(_do, names):
                bar.update()


_here: list[Work] = []
"""Of a process that takes part: the work."""


def _take_up(load: Callable[[], Work]) -> None:
    _here.append(load())


def _do(name: str) -> None:
    _here[0].do(name)


@contextmanager
def working(n: int, begin: Callable[..., None], *args: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool of n new processes with one thread each, which end at once when this one is interrupted, or ends.

    Args:
        n: how many.
        begin: what each starts with; a function at the top of a module.
        *args: for it.

    Raises:
        UserError: when one of them dies.
    """
    pool = ProcessPoolExecutor(n, get_context("spawn"), initializer=_begin, initargs=(begin, args))
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError(
            f"one of {n} workers ended without a word, most likely for want of memory; choose fewer --workers; what "
            "was finished is kept"
        ) from None
    except KeyboardInterrupt:
        for child in active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(begin: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Make this process a worker: no bars of its own, and the one that started it minds Ctrl-C."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(RLock())  # its own would be a semaphore of the system, which a process that is ended leaves behind
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # pyright: ignore
    Thread(target=_end_with_parent, daemon=True).start()
    begin(*args)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
