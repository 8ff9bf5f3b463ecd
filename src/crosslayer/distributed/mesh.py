"""Where a process stands among the others: a mesh of data x feature ranks, started by torchrun."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from crosslayer.distributed.meeting import meet
from crosslayer.errors import UserError
from crosslayer.team import LostError

DATA, FEATURE = "data", "feature"
"""Axes of the mesh: prompts are spread over the first, the features of every layer over the second."""
TIMEOUT = 600.0
"""Seconds that a rank waits for another one before it gives up."""
ERRORS = (RuntimeError, ValueError, CheckpointException)
"""What torch.distributed raises when it fails."""


@dataclass(frozen=True)
class Mesh:
    """All ranks, and the place of this one.

    Rank r stands at row r // feature of the data axis and column r % feature of the feature axis, so that ranks that
    share the features of one coder are neighbours, on one machine where possible.
    """

    devices: DeviceMesh
    """Axes `data` and `feature`."""
    timeout: float = TIMEOUT
    """Seconds that a rank waits for another one."""

    @property
    def rank(self) -> int:
        """Number of this process among all."""
        return dist.get_rank()

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.devices.size()

    @property
    def n_data(self) -> int:
        """Processes that train the same features on different prompts."""
        return self.devices[DATA].size()

    @property
    def n_feature(self) -> int:
        """Processes that share the features of every layer."""
        return self.devices[FEATURE].size()

    @property
    def data(self) -> Any:
        """The group of this process along the data axis."""
        return self.devices.get_group(DATA)

    @property
    def feature(self) -> Any:
        """The group of this process along the feature axis."""
        return self.devices.get_group(FEATURE)

    @property
    def data_rank(self) -> int:
        """Place along the data axis."""
        return self.devices.get_local_rank(DATA)

    @property
    def feature_rank(self) -> int:
        """Place along the feature axis."""
        return self.devices.get_local_rank(FEATURE)


def under_torchrun() -> bool:
    """Whether this process was started as one of several, or of one, by torchrun."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def restarts() -> int:
    """How often torchrun has started this job anew, after the end of a process."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def join(n_feature: int = 1, timeout: float = TIMEOUT) -> Mesh:
    """Meet the other processes that torchrun started.

    Args:
        n_feature: processes that share the features of a layer; must divide their number.
        timeout: seconds to wait for another process at any time.

    Raises:
        UserError: when the processes cannot be laid out like that.
        LostError: when one of them does not come.
    """
    size = int(os.environ["WORLD_SIZE"])
    if n_feature < 1 or size % n_feature:
        raise UserError(f"{size} processes cannot be split into groups of {n_feature}; choose a divisor of {size}")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    with hearing():
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
            _start(backend, size, timeout)
        return Mesh(init_device_mesh(kind, (size // n_feature, n_feature), mesh_dim_names=(DATA, FEATURE)), timeout)


def _start(backend: str, size: int, timeout: float) -> None:
    rank, limit = int(os.environ["RANK"]), timedelta(seconds=timeout)
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, size, is_master=rank == 0 and not agents, timeout=limit)
    life = PrefixStore(meet(store, rank, size, timeout), store)
    dist.init_process_group(backend, store=life, rank=rank, world_size=size, timeout=limit)


@contextmanager
def hearing(errors: tuple[type[BaseException], ...] = ERRORS) -> Iterator[None]:
    """Say in our words what torch.distributed raises when another process is gone.

    Raises:
        LostError: for that.
    """
    try:
        yield
    except (UserError, LostError, torch.OutOfMemoryError):
        raise
    except errors as error:
        reason = re.sub(r"^\[\S+\] ", "", str(error)).splitlines()[0].partition(". ")[0]  # without torch's advice
        raise LostError(
            f"rank {os.environ['RANK']}: another rank ended or did not answer in time ({reason}); look for its own "
            "message, then start the same command with --resume, or let torchrun do so with --max-restarts"
        ) from error


def leave() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
