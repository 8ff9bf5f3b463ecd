"""Meeting the other processes of a job, and keeping still where rank 0 speaks for all."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, is_initialized, rendezvous  # pyright: ignore
from torch.distributed.distributed_c10d import _get_default_store

from crosslayer.distributed.crew import ALONE, PATIENCE, TIMES, Crew
from crosslayer.distributed.meeting import meet
from crosslayer.errors import UserError

TIMEOUT = 600.0
"""Seconds in which all must have come."""
_here = [ALONE]
"""The crew that this process is one of, last."""


def crew() -> Crew:
    """The crew that this process is one of: itself alone, but inside of `joined`."""
    return _here[-1]


@contextmanager
def joined(patience: float = PATIENCE, times: float = TIMES) -> Iterator[Crew]:
    """Be one of the processes that torchrun started, with a GPU of one's own; or alone, where it did not.

    Args:
        patience: see `Crew`.
        times: see `Crew`.

    Raises:
        UserError: when one of them does not come.
    """
    here = _join(patience, times)
    _here.append(here)
    try:
        yield here
    except SystemExit:
        here.leave()
        raise
    else:
        here.leave()
    finally:
        _here.pop()


@contextmanager
def quiet(crew: Crew) -> Iterator[None]:
    """Show nothing meanwhile, unless this is rank 0."""
    with ExitStack() as still:
        if not crew.leads:
            nowhere = still.enter_context(open(os.devnull, "w", encoding="utf-8"))
            still.enter_context(redirect_stdout(nowhere))
            still.enter_context(redirect_stderr(nowhere))
        yield


def _join(patience: float, times: float) -> Crew:
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return ALONE
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if is_initialized():
        store = _get_default_store()
    else:
        store = next(iter(rendezvous("env://", rank, size, timeout=timedelta(seconds=TIMEOUT))))[0]
    store = PrefixStore("crew", store)
    try:
        store = PrefixStore(meet(store, rank, size, TIMEOUT), store)
    except RuntimeError as error:
        raise UserError(f"rank {rank}: {error}; see what became of the others") from None
    return Crew(rank=rank, size=size, store=store, patience=patience, times=times)
