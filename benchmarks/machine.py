"""What a benchmark says of the machine that it ran on."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch


def machine(device: str) -> str:
    """Processor or GPU, threads, version of torch, and how busy the machine is."""
    where = torch.cuda.get_device_name() if device != "cpu" else f"{cpu_name()}, {torch.get_num_threads()} thread(s)"
    return f"{where}; torch {torch.__version__}; load {os.getloadavg()[0]:.1f}."


def cpu_name() -> str:
    """The processor, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def keep(what: str, device: str, text: str) -> None:
    """Write a result beside the others, under today's date."""
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{datetime.now(UTC).date()}-{what}-{device}.md").write_text(text)
