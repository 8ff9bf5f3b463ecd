"""Keeping freed memory: a training step frees and asks for the same large tensors over and over."""

import ctypes
import sys

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
