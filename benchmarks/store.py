"""Training from a store beside training from memory: the same chunks, shuffled and stepped on in the same way.

Rounds of the two alternate; everything of a training is on, and the store is in the page cache, as one that fits
into memory is after its first round.

    python benchmarks/store.py --keep
"""

import shutil
import statistics
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import torch
from machine import keep, machine
from step import CASES, Case, activations, build

from crosslayer import Store, Wiring
from crosslayer.activations.manifest import Manifest
from crosslayer.activations.reading import StoreSource
from crosslayer.activations.record import Activations
from crosslayer.activations.rows import Rows
from crosslayer.activations.writer import SHARD_BYTES, StoreWriter
from crosslayer.memory import keep_freed_memory
from crosslayer.training.stream import ChunkSource, Place, shuffled_batches

CHUNKS, STEPS_A_CHUNK = 3, 8


@dataclass(frozen=True)
class Memory:
    """Chunks that lie in memory."""

    chunks: list[Activations]

    def chunk(self, index: int) -> Activations:
        """One of them."""
        return self.chunks[index % len(self.chunks)]


def stored(case: Case, chunks: list[Activations], dtype: str, folder: Path) -> StoreSource:
    """The same chunks on disk."""
    layers = list(range(case.L))
    settings = {"seed": 0, "shard_bytes": SHARD_BYTES}
    manifest = Manifest(
        model="", n_layers=case.L, d_model=case.D, x_layers=layers, y_layers=layers, dtype=dtype, source=settings
    )
    folder.mkdir()
    with StoreWriter(folder, manifest) as writer:
        for number, chunk in enumerate(chunks):
            writer.add(Rows.of(chunk), number, 0)
        writer.finish(CHUNKS, 0)
    return StoreSource(Store(folder), Wiring.full(case.L))


def seconds(clock: Callable[[], float], case: Case, source: ChunkSource, trainer) -> float:
    """What a step takes, its batch included."""
    start, n = clock(), CHUNKS * STEPS_A_CHUNK
    for batch in islice(shuffled_batches(source, case.N, 0, Place()), n):
        trainer.step(batch.batch)
    return (clock() - start) / n


def measure(name: str, rounds: int, folder: Path) -> str:
    """The case's times as a line of a table."""
    case = CASES[name]
    parts = [activations(case, case.N * STEPS_A_CHUNK, "cpu", seed) for seed in range(CHUNKS)]
    chunks = [replace(part, position=part.position + torch.arange(len(part))) for part in parts]
    sources = {"memory": Memory(chunks)}
    sources |= {dtype: stored(case, chunks, dtype, folder / f"{name}-{dtype}") for dtype in ("fp32", "bf16", "int8")}
    trainer = build(case, "joint-topk", "fp32", "cpu")
    found = {clock: {source: [] for source in sources} for clock in (time.perf_counter, time.process_time)}
    for _ in range(rounds):
        for source in sources:
            for clock, times in found.items():
                times[source].append(seconds(clock, case, sources[source], trainer))
    cells = []
    for times in found.values():
        medians = {source: statistics.median(values) for source, values in times.items()}
        cells += [f"{medians['memory'] * 1e3:.0f} ms"]
        cells += [f"{medians[dtype] / medians['memory']:.2f}" for dtype in ("fp32", "bf16", "int8")]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Measure the benchmark sizes, print, and keep where asked to."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=["F2048", "F8192"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/DATE-store-cpu.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    folder = Path(tempfile.mkdtemp(prefix="store-"))
    lines = [
        f"# Training from a store, {datetime.now(UTC).date()}",
        "",
        machine("cpu"),
        "A step from memory, and a step from a store of each form over it.",
        "",
        "| case | wall, memory | fp32 | bf16 | int8 | CPU, memory | fp32 | bf16 | int8 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    try:
        lines += [measure(name, args.rounds, folder) for name in args.case]
    finally:
        shutil.rmtree(folder)
    print("\n".join(lines))
    if args.keep:
        keep("store", "cpu", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
