"""Several processes for the tests of distributed code: started once, joined in a new group for each call."""

import importlib
import multiprocessing
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from socket import socket
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

PRELOADED = ["crosslayer", "crosslayer.cli", "transformers.models.llama.modeling_llama"]
"""Imported once, and not by every process."""
PATIENCE = 120.0
"""Seconds that no process of `two` lasts."""


class Ranks:
    """As many processes as were ever asked for, each of which runs the same function, as torchrun would start them."""

    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.workers: list[tuple[Any, Any]] = []

    def run(self, n: int, function: Callable, *args: Any) -> list[Any]:
        """What `function(*args)`, of a test module, returned on each of n ranks.

        RANK, WORLD_SIZE and LOCAL_RANK are set and the default process group is there (gloo).

        Raises:
            AssertionError: with the tracebacks of the ranks that failed.
        """
        while len(self.workers) < n:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=serve, args=(theirs, str(Path(__file__).parent)), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, pipe) in enumerate(self.workers[:n]):
                pipe.send((folder, rank, n, function.__module__, function.__name__, args))
            answers = [pipe.recv() for _, pipe in self.workers[:n]]
        failed = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def close(self) -> None:
        for process, pipe in self.workers:
            pipe.close()
            process.join(20)
            process.close()


def two(function: Callable, *args: Any) -> list[int | None]:
    """Exit codes of two processes that call `function(*args)` and meet by address, as nobody restarts them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    shared = (of_two(), function, args)
    processes = [context.Process(target=become, args=(str(rank), *shared), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        process.kill()
    return [process.exitcode for process in processes]


def of_two() -> dict[str, str]:
    """What one of two processes finds in its environment, but for its rank."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def become(rank: str, meeting: dict[str, str], function: Callable, args: tuple) -> None:
    """Be one of `two`."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # one shared between processes would outlive a killed one
    os.environ |= {"RANK": rank, **meeting}
    function(*args)


def serve(pipe: Any, tests: str) -> None:
    """Run what is asked for, one call after another, until the pipe ends."""
    torch.set_num_threads(1)
    sys.path.insert(0, tests)
    while True:
        try:
            folder, rank, n, module, name, args = pipe.recv()
        except EOFError:
            return
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
        try:
            store = dist.FileStore(f"{folder}/store", n)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=n)
            answer = ("", getattr(importlib.import_module(module), name)(*args))
        except BaseException:
            answer = (traceback.format_exc(), None)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send(answer)
