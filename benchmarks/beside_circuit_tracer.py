"""Every edge of ours beside circuit-tracer's on the same weights, and what both cost.

Models and transcoders are random, in files that both libraries load; circuit-tracer runs in its own environment, each
run of both in a process of its own on one thread. `benchmarks/peers/README.md` says how to make that environment.

    python benchmarks/beside_circuit_tracer.py --peer-python ENV/bin/python --keep
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import graph as costs
import pair
import torch
from compared import Compared, Theirs, compare
from machine import keep, machine
from pair import PAIRS
from safetensors.torch import save_file

from crosslayer.attribution.graph import AttributionGraph
from crosslayer.coders.transcoder import CrossLayerTranscoder

HERE = Path(__file__).parent
TIMED = (("transformerlens", 64), ("transformerlens", 256), ("nnsight", 64))
"""Back ends and batches of the large case."""
COSTS = ("cpu_seconds", "before", "peak")
LEGEND = """Features active in both, and in one graph alone; their edges that are not 0, and those that are 0 in one
graph alone; largest differences of activations and of edges from each kind of node, over the largest of that kind; the
largest difference over the edge itself, where it is over a thousandth of the largest; our largest edge from an error at
the first position, where they have none, over the largest from an error; what their rows lack to their pre-activations
(median), what they lack with our biases and first position added (largest), and what ours lack (largest)."""


@dataclass(frozen=True)
class Row:
    """One run of circuit-tracer beside ours."""

    model: str
    way: str
    """Back end and batch."""
    compared: Compared
    theirs: dict[str, Any]
    ours: dict[str, Any]


def write_large(folder: Path, active: int) -> None:
    """A random Llama of SmolLM2-135M's shape with a CLT of which so many features a layer and position are active."""
    case = replace(costs.CASES["SmolLM2-135M's shape, 12 tokens"], active=active)
    with tempfile.TemporaryDirectory(prefix="graph-") as made:
        costs.make(case, Path(made))
        model, coder = costs.loaded(case, Path(made)), CrossLayerTranscoder.load(Path(made))
        pair.write(model.model, model.processor, coder, folder, costs.example(case).prompt, "cat dog bus")


def measure(folder: Path) -> dict[str, Any]:
    """Our graph of what a folder asks for, left in `ours.json` there; what it cost."""
    model, coder = pair.load(folder)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
    before, began = costs.memory("VmRSS"), time.process_time()
    found = pair.trace(folder, model, coder)
    seconds, peak = time.process_time() - began, costs.memory("VmHWM")
    found.save(folder / "ours.json")
    return {"cpu_seconds": seconds, "before": before, "peak": peak}


def run(python: str, script: Path, *arguments: str) -> dict[str, Any]:
    """The line of JSON that a script prints at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [python, str(script), *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def beside(python: str, model: str, folder: Path, ways: Iterable[tuple[str, int]]) -> list[Row]:
    """Our graph of a folder once, and theirs with each back end and batch; the last of theirs stays in the folder."""
    ours, rows = run(sys.executable, Path(__file__), "--child", str(folder)), []
    graph = AttributionGraph.load(folder / "ours.json")
    for backend, batch in ways:
        way = ["--backend", backend, "--batch", str(batch)]
        theirs = run(python, HERE / "peers" / "tracer.py", str(folder), *way)
        compared = compare(graph, Theirs.load(folder / "theirs.safetensors"))
        rows.append(Row(model, f"{backend}, {batch}", compared, theirs, ours))
    return rows


def small(python: str, fixture: Path | None) -> list[Row]:
    """The small models; the fixture keeps what circuit-tracer found."""
    rows, found = [], {}
    for name, case in PAIRS.items():
        with tempfile.TemporaryDirectory(prefix="pair-") as folder:
            model, coder = pair.make(case)
            pair.write(model, pair.tokenizer(), coder, Path(folder))
            rows += beside(python, name, Path(folder), [(backend, 64) for backend in case.backends])
            theirs = Theirs.load(Path(folder) / "theirs.safetensors")
            found |= {f"{name}: {part}": tensor for part, tensor in vars(theirs).items()}
    if fixture:
        save_file(found, fixture, {"circuit-tracer": rows[-1].theirs["version"]})
    return rows


def large(python: str, active: int) -> list[Row]:
    """The large model."""
    with tempfile.TemporaryDirectory(prefix="pair-") as folder:
        write_large(Path(folder), active)
        return beside(python, "SmolLM2-135M's shape, CLT", Path(folder), TIMED)


def report(rows: list[Row]) -> str:
    """Both tables."""
    names = [name.replace("_", " ") for name in Compared.__dataclass_fields__]
    compared = [(row.model, row.way, *asdict(row.compared).values()) for row in rows]
    cost = [(row.model, row.way, *(f"{of[key]:.2f}" for of in (row.theirs, row.ours) for key in COSTS)) for row in rows]
    heads = ["model", "back end, batch", *(f"{whose} {key}" for whose in ("their", "our") for key in COSTS)]
    return "\n".join(
        [
            f"# Edges beside circuit-tracer's, {datetime.now(UTC).date()}",
            "",
            f"{machine('cpu')} circuit-tracer {rows[0].theirs['version']}.",
            *LEGEND.splitlines(),
            "",
            *table(["model", "back end, batch", *names], compared),
            "",
            "CPU seconds of one graph; GB of memory before it (model and transcoder loaded) and at most.",
            "",
            *table(heads, cost),
        ]
    )


def table(names: list[str], rows: list[tuple[Any, ...]]) -> list[str]:
    """In Markdown."""
    cells = [[f"{cell:.1e}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *cells)]


def main() -> None:
    """Measure, print, and keep where asked to."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", default=sys.executable, help="of the environment that has circuit-tracer")
    parser.add_argument("--small", action="store_true", help="leave the large model out")
    parser.add_argument("--active", type=int, default=10, help="features of the large model's layers, a position")
    parser.add_argument("--fixture", type=Path, help="where to write what circuit-tracer found on the small models")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/DATE-circuit-tracer-cpu.md")
    parser.add_argument("--child", type=Path, help="trace this folder here, and print JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps(measure(args.child)))
        return
    rows = small(args.peer_python, args.fixture) + ([] if args.small else large(args.peer_python, args.active))
    print(report(rows))
    if args.keep:
        keep("circuit-tracer", "cpu", report(rows) + "\n")


if __name__ == "__main__":
    main()
