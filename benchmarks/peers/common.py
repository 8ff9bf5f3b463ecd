"""What the scripts that time other trainers share: the sizes, the activations, the clock and the line of JSON."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LAYERS, WIDTH, WARMUP_STEPS = 6, 256, 5


@dataclass(frozen=True)
class Case:
    """The sizes of one comparison: features and active features a layer, tokens a step."""

    features: int
    k: int
    tokens: int


CASES = {"F2048": Case(features=2048, k=32, tokens=1024), "F8192": Case(features=8192, k=16, tokens=512)}


class TimesUp(Exception):
    """Raised when a trainer asks for a batch after the last timed step."""


class Clock:
    """Reads the process's CPU seconds whenever a step begins."""

    def __init__(self, steps: int) -> None:
        self.steps, self.ticks = steps, list[float]()

    def tick(self) -> None:
        """A step begins."""
        self.ticks.append(time.process_time())
        if len(self.ticks) > WARMUP_STEPS + self.steps:
            raise TimesUp

    def seconds(self) -> list[float]:
        """CPU seconds of each timed step."""
        return [end - begin for begin, end in pairwise(self.ticks[WARMUP_STEPS:])]


@dataclass(frozen=True)
class Job:
    """A peer's trainer, ready to run."""

    fit: Callable[[], Any]
    """Trains until the clock stops it."""
    model: nn.Module
    """What is trained."""
    settings: str
    """What was chosen of the peer's options."""
    extra: dict[str, float] = field(default_factory=dict)
    """What else to report."""


Prepare = Callable[[Case, Clock], Job]


def stream(case: Case, clock: Clock) -> Iterator[tuple[Tensor, Tensor]]:
    """What layers read and write, [tokens, LAYERS, WIDTH] each, from memory: a few causes, mixed, with noise."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(32, 2 * LAYERS * WIDTH, generator=generator)
    batches = [_batch(case, mixing, generator) for _ in range(4)]
    for step in count():
        clock.tick()
        yield batches[step % len(batches)]


def _batch(case: Case, mixing: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    both = torch.randn(case.tokens, 32, generator=generator) @ mixing
    both = both + 0.5 * torch.randn(both.shape, generator=generator)
    x, y = both.view(case.tokens, 2, LAYERS, WIDTH).unbind(1)
    return x.contiguous(), y.relu().contiguous()


def arguments(name: str) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    parser = argparse.ArgumentParser(description=f"Time {name} on one CPU thread; prints one JSON line.")
    parser.add_argument("--peer", type=Path, required=True, help=f"a git checkout of {name}")
    parser.add_argument("--case", choices=CASES, default="F2048")
    parser.add_argument("--steps", type=int, default=30, help="timed steps, after the warm-up")
    return parser


def time_peer(name: str, args: argparse.Namespace, prepare: Prepare, patches: dict[str, str]) -> None:
    """Run a peer's trainer and print what it took."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case, clock = CASES[args.case], Clock(args.steps)
    with redirect_stdout(sys.stderr):
        job = prepare(case, clock)
        with suppress(TimesUp):
            job.fit()
    seconds = clock.seconds()
    result = {
        "peer": name,
        "commit": commit(args.peer),
        "case": args.case,
        "settings": job.settings,
        "tokens_per_step": case.tokens,
        "steps": len(seconds),
        "tokens_per_cpu_second": round(case.tokens * len(seconds) / sum(seconds), 1),
        "median_step_cpu_seconds": round(statistics.median(seconds), 4),
        "fastest_step_cpu_seconds": round(min(seconds), 4),
        "peak_rss_mib": round(peak_mib()),
        "parameters": sum(p.numel() for p in job.model.parameters()),
        "dtype": str(next(job.model.parameters()).dtype),
        "torch": torch.__version__,
        **job.extra,
        "patches": patches,
    }
    print(json.dumps(result))


def peak_mib() -> float:
    """This process's peak resident memory, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def commit(checkout: Path) -> str:
    """The checkout's commit."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
