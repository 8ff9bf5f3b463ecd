"""How much memory is free, and keeping what was freed: training asks for the same large tensors over and over."""

import ctypes
import sys
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Numbers of glibc's mallopt(3)."""


def keep_freed_memory() -> None:
    """Let this process reuse freed memory instead of giving it back to the system, for as long as it lives.

    Large tensors are otherwise mapped anew each time, and every page of theirs faults: a third of a step of a wide
    coder on a CPU. Only glibc can be told; elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def memory_room(device: torch.device) -> int | None:
    """Bytes of memory that are free on this device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration):
        return None
