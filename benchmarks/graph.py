"""What an attribution graph costs: CPU seconds by stage, and memory, each case in a process of its own.

A case's model and transcoder are made and saved first; its process loads them, as a user's does, and does nothing else.

    python benchmarks/graph.py --keep
"""

import json
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from capture import smollm2_shaped
from machine import keep, machine
from tqdm import tqdm

import crosslayer as xl
from crosslayer.attribution import attribute as attributing
from crosslayer.attribution.attribute import Budget, attribute
from crosslayer.attribution.figure import write_figure
from crosslayer.coders.transcoder import Provenance
from crosslayer.memory import keep_freed_memory
from crosslayer.models.hooks import recording
from crosslayer.models.prompts import prepare
from crosslayer.zoo.emoji_llava.architecture import WORDS

STAGES = ("load", "trace", "split", "rows", "prune", "export")


@dataclass(frozen=True)
class Case:
    """A model with a random transcoder, and a prompt."""

    bundled: bool
    words: int
    d_transcoder: int
    active: int
    """Features of a layer at a position, on average."""
    max_features: int | None = None


CASES = {
    "SmolLM2-135M's shape, 12 tokens": Case(False, 11, 512, 10),
    "the same, 64 tokens, 256 rows": Case(False, 63, 512, 10, 256),
    "emoji-llava, 9 patches": Case(True, 4, 768, 6),
}


def example(case: Case) -> xl.Example:
    """The prompt, with a scene for a model that sees."""
    words = [word for word in WORDS if word.isalpha()]
    prompt = " ".join(words[3 * i % len(words)] for i in range(case.words))
    image = xl.load_data("emoji-scenes", n=1)[0].image if case.bundled else None
    return xl.Example("prompt", prompt, image=image, form="text")


def loaded(case: Case, folder: Path) -> xl.LoadedModel:
    """The bundled model, or a random one of SmolLM2-135M's shape that was saved."""
    return xl.load_model("emoji-llava" if case.bundled else folder / "model")


def make(case: Case, folder: Path) -> None:
    """Save what a case needs: the random model, the same each time, and a transcoder."""
    if not case.bundled:
        torch.manual_seed(0)
        random = smollm2_shaped()
        random.model.save_pretrained(folder / "model")
        random.processor.save_pretrained(folder / "model")
    make_coder(case, loaded(case, folder)).save(folder)


@torch.no_grad()
def make_coder(case: Case, model: xl.LoadedModel) -> xl.CrossLayerTranscoder:
    """A random transcoder that lets as many features through as the case says.

    Thresholds lie halfway between two pre-activations, so that rounding decides nothing.
    """
    coder = xl.CrossLayerTranscoder(xl.Wiring.full(model.n_layers), model.d_model, case.d_transcoder, xl.JointTopK(8))
    coder.initialise(0)
    batch, reads = prepare(model.model, model.processor, [example(case)]), dict[int, torch.Tensor]()
    with recording(model.sites, reads.__setitem__, lambda *_: None):
        model.model(**batch.inputs, use_cache=False)
    pre = [coder.layer_preactivations(i, reads[layer][0, 1:]) for i, layer in enumerate(coder.sources)]
    cuts = [values.flatten().topk(case.active * len(values) + 1).values[-2:].mean() for values in pre]
    coder.with_thresholds(torch.stack(cuts)[:, None].expand(-1, case.d_transcoder))
    coder.provenance = Provenance(model.id)
    return coder.requires_grad_(False)


class Clock:
    """CPU seconds by stage."""

    def __init__(self) -> None:
        self.seconds = defaultdict[str, float](float)

    def timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time noted."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            found = call(*args, **kwargs)
            self.seconds[stage] += time.process_time() - start
            return found

        return timed


def memory(kind: str) -> float:
    """GB that this process has in memory (VmRSS), had at most (VmHWM), or that lie in no file (RssAnon), says Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 2**20


@contextmanager
def own_memory() -> Iterator[list[float]]:
    """Inside, GB that lie in no file are noted every 20 ms: the system cannot drop them as it can a mapped run's."""
    noted, done = [memory("RssAnon")], Event()

    def note() -> None:
        while not done.wait(0.02):
            noted.append(memory("RssAnon"))

    thread = Thread(target=note)
    thread.start()
    try:
        yield noted
    finally:
        done.set()
        thread.join()


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One graph, from loading to export."""
    case, clock = CASES[name], Clock()
    model = clock.timed("load", loaded)(case, folder)
    coder = clock.timed("load", xl.CrossLayerTranscoder.load)(folder)
    before = memory("VmRSS")
    for stage in ("trace", "split"):
        setattr(attributing, stage, clock.timed(stage, getattr(attributing, stage)))
    asked, budget = example(case), Budget(features=case.max_features)
    keep_freed_memory()  # as the verb does
    with own_memory() as own:
        graph = clock.timed("rows", attribute)(model, coder, asked.prompt, asked.image, form="text", budget=budget)
    clock.seconds["rows"] -= clock.seconds["trace"] + clock.seconds["split"]
    peak = memory("VmHWM")
    pruned = clock.timed("prune", graph.prune)()
    clock.timed("export", graph.save)(folder / "graph.json")
    clock.timed("export", write_figure)(pruned, folder / "graph.html")
    sizes = {"active": sum(node.kind == "feature" for node in graph.nodes), "edges": len(graph.weight)}
    gigabytes = {"before": before, "peak": peak, "own": max(own)}
    return {**clock.seconds, **sizes, **gigabytes, "gap": graph.scores.worst_row_gap}


def row(name: str, rounds: int) -> str:
    """A case's line: the quickest of some runs, as a busy machine can only be slower."""
    found = []
    with tempfile.TemporaryDirectory(prefix="graph-") as folder:
        make(CASES[name], Path(folder))
        for _ in tqdm(range(rounds), name):
            command = [sys.executable, __file__, "--child", name, "--folder", folder]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1]))
    best = min(found, key=lambda one: one["trace"] + one["split"] + one["rows"])
    whole = best["trace"] + best["split"] + best["rows"]
    times = [f"{best[stage]:.2f}" for stage in STAGES]
    counts = f"{best['active']:,} | {best['edges']:,} | {best['gap']:.1e}"
    gigabytes = " | ".join(f"{best[which]:.2f}" for which in ("before", "peak", "own"))
    return f"| {name} | {counts} | **{whole:.2f}** | {' | '.join(times)} | {gigabytes} |"


def main() -> None:
    """Measure every case, print, and keep where asked to."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/DATE-graph-cpu.md")
    parser.add_argument("--child", choices=CASES, help="measure one case here, and print JSON")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps(measure(args.child, args.folder)))
        return
    lines = [
        f"# Attribution graphs, {datetime.now(UTC).date()}",
        "",
        machine("cpu"),
        f"CPU seconds, the quickest of {args.rounds}; load is of model and run, graph is trace, split and rows.",
        "GB (2^30 bytes) of a process that only loads and traces: before the graph, at most from its start until the",
        "graph is there (VmHWM), and at most of its own: without pages of files, from which model and run are mapped.",
        "A load above the number of cores means that other jobs ran beside.",
        "",
        f"| case | active features | edges | row gap | graph | {' | '.join(STAGES)} | GB before | peak GB | own |",
        "|" + "---|" * (len(STAGES) + 8),
        *(row(name, args.rounds) for name in CASES),
    ]
    print("\n".join(lines))
    if args.keep:
        keep("graph", "cpu", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
