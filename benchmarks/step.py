"""What a training step costs, part by part, beside the least that it could cost and beside other trainers.

Synthetic activations lie in memory; AuxK, dead-feature counts, gradient checks and metrics are on, as in a training.
The floor is the encoder's forward product and one pass of Adam over all parameters, measured in the same rounds. CPU
seconds are summed over threads; on a GPU wall seconds are taken. `--peer` adds another trainer from a checkout of
its repository, run by an interpreter that has what it needs; the scripts in `benchmarks/peers` say what that is.

    python benchmarks/step.py --case F2048 F8192 --precision fp32 bf16 --keep
    python benchmarks/step.py --peer eleuther=CHECKOUT --peer openmoss=CHECKOUT --peer-python ENV/bin/python
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from machine import keep, machine

import crosslayer as xl
from crosslayer.activations.record import Activations
from crosslayer.coders import codes, kernels
from crosslayer.coders.products import affine
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.memory import keep_freed_memory
from crosslayer.training.scales import estimate_scales
from crosslayer.training.trainer import Trainer

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """L layers of width D, F features a layer, N tokens a step, k active features a token over all layers."""

    L: int
    D: int
    F: int
    N: int
    k: int


CASES = {
    "F2048": Case(6, 256, 2048, 1024, 192),
    "F8192": Case(6, 256, 8192, 512, 96),
    "emoji-llava": Case(10, 128, 1024, 1024, 64),
    "gpt2-small": Case(12, 768, 24_576, 4096, 192),
    "smollm2": Case(30, 576, 1024, 4096, 240),
}
PEER_CASES = ("F2048", "F8192")
"""Those that the scripts in `benchmarks/peers` know."""
PEER_MEMORY = {"own": {}, "kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}}
"""Environments for peers; the second has glibc do for them what `crosslayer.memory` has it do for ours."""
SPARSITIES: dict[str, Callable[[int], Any]] = {
    "joint-topk": lambda k: xl.JointTopK(k, anneal_share=0.0),
    "batch-topk": lambda k: xl.BatchTopK(k, anneal_share=0.0),
}


class Stopwatch:
    """Seconds spent in each part, what runs inside another part counted once, for the inner one."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.seconds, self.stack, self.since = clock, defaultdict[str, float](float), ["rest"], clock()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside, time counts for `name`."""
        self._switch()
        self.stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self.stack.pop()

    def watch(self, owner: Any, attribute: str, name: str, wrap: Callable = lambda f: f) -> None:
        """Count what a function takes for `name`, from now on."""
        function = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        setattr(owner, attribute, wrap(timed))

    def _switch(self) -> None:
        now = self.clock()
        self.seconds[self.stack[-1]] += now - self.since
        self.since = now


def watch_parts(watch: Stopwatch, trainer: Trainer) -> None:
    """Put the stopwatch on the parts of a step."""
    watch.watch(CrossLayerTranscoder, "preactivations", "encoder product")
    watch.watch(CrossLayerTranscoder, "decoder_norms", "decoder norms")
    watch.watch(type(trainer.coder.sparsity), "patterns", "selection")
    watch.watch(codes._Decode, "forward", "decode", staticmethod)
    watch.watch(codes._Decode, "backward", "gradient of codes", staticmethod)
    watch.watch(codes._EncodeActive, "backward", "gradient of encoders", staticmethod)
    watch.watch(kernels, "sum_by_feature", "gradient of weights")
    watch.watch(xl.AuxK, "codes", "AuxK, selection")
    watch.watch(Trainer, "_check_gradients", "gradient check")
    watch.watch(trainer.optimizers[0], "step", "Adam")


def activations(case: Case, n: int, device: str, seed: int) -> Activations:
    """Tokens with some structure: a few causes, mixed, with noise."""
    mixing = torch.randn(32, case.L * 2 * case.D, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, 32, generator=generator) @ mixing
    both = (mixed.view(n, case.L, 2, case.D) + 0.5 * torch.randn(n, case.L, 2, case.D, generator=generator)).to(device)
    ones = torch.ones(n, dtype=torch.long, device=device)
    return Activations(both[:, :, 0].contiguous(), both[:, :, 1].relu().contiguous(), ones > 1, ones, ones, ones)


def clock_of(device: str) -> Callable[[], float]:
    """CPU seconds of this process, or wall seconds once the GPU is done."""
    if device == "cpu":
        return time.process_time
    return lambda: (torch.cuda.synchronize(), time.perf_counter())[1]


def measure(case: Case, args: Namespace, precision: str) -> dict[str, Any]:
    """Median step, its parts, the floor and the peak memory of one case; to be run in a process of its own."""
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    trainer = build(case, args.sparsity, precision, args.device)
    batches = [activations(case, case.N, args.device, seed) for seed in range(4)]
    for i in range(3):
        trainer.step(batches[i])
    peak, clock, floor = peak_mib(args.device), clock_of(args.device), floor_of(trainer, batches[0])
    floors, steps = [], []
    for i in range(args.steps):
        floors.append(seconds(clock, floor))
        steps.append(seconds(clock, lambda i=i: trainer.step(batches[i % 4])))
    watch = Stopwatch(clock)
    watch_parts(watch, trainer)
    for i in range(args.steps):
        trainer.step(batches[i % 4])
    watch._switch()
    return {
        "step": statistics.median(steps),
        "floor": statistics.median(floors),
        "parts": {name: total / args.steps for name, total in watch.seconds.items()},
        "peak_mib": peak,
        "tokens_per_second": case.N / statistics.median(steps),
    }


def build(case: Case, sparsity: str, precision: str, device: str) -> Trainer:
    """A trainer in the middle of its run: k and the learning rate no longer change."""
    config = xl.TrainConfig(
        wiring=xl.Wiring.full(case.L),
        sparsity=SPARSITIES[sparsity](case.k),
        d_transcoder=case.F,
        tokens=10**9,
        batch_tokens=case.N,
        learning_rate=1e-3,
        warmup_share=0.0,
        precision=precision,
    )
    return Trainer(config, estimate_scales(activations(case, 2048, device, 99)))


def floor_of(trainer: Trainer, batch: Activations) -> Callable[[], None]:
    """The encoder's forward product in fp32 and an Adam pass over as many parameters, with nothing else around."""
    coder = trainer.coder
    parameters = [torch.nn.Parameter(torch.zeros_like(p)) for p in coder.parameters()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    adam = torch.optim.Adam(parameters, lr=0.0, fused=True)
    x = batch.x.transpose(0, 1).contiguous()
    out = x.new_empty(len(x), len(batch), coder.d_transcoder)

    def run() -> None:
        with torch.no_grad():
            for i, source in enumerate(coder.sources):
                out[i] = affine(x[source], coder.W_enc[i], coder.b_enc[i])
        adam.step()

    return run


def seconds(clock: Callable[[], float], call: Callable[[], Any]) -> float:
    """What a call takes."""
    start = clock()
    call()
    return clock() - start


def peak_mib(device: str) -> float:
    """Peak memory: of this process, or of the GPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peer(script: str, checkout: str, memory: str, name: str, args: Namespace) -> dict[str, Any]:
    """Another trainer on the same sizes, on one thread, in a process of its own."""
    command = [args.peer_python, HERE / "peers" / f"{script}.py", "--peer", checkout, "--case", name]
    command += ["--steps", args.steps]
    environment = {**os.environ, **PEER_MEMORY[memory], "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{script}: {done.stderr.strip().splitlines()[-1]}")
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "memory": memory}


def peer_checkout(text: str) -> tuple[str, str]:
    """A peer's script and where its checkout lies, from NAME=CHECKOUT."""
    script, _, checkout = text.partition("=")
    known = [path.stem for path in (HERE / "peers").glob("*.py") if path.stem != "common"]
    if script not in known or not Path(checkout).is_dir() or not checkout:
        raise ArgumentTypeError(f"{text!r} is no NAME=FOLDER with a NAME of {', '.join(sorted(known))}")
    return script, checkout


def comparison(ours: dict[str, dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """The trainers of one case in the same run as Markdown: by median step."""
    factors = [f"{precision} here" for precision in ours]
    lines = [
        f"| trainer | tokens / CPU s | {' | '.join(factors)} | peak MiB | |",
        f"|---|---|{'---|' * len(ours)}---|---|",
    ]
    rows = [
        (f"crosslayer, {name}", f["tokens_per_second"], f["peak_mib"], "AuxK, counts, checks")
        for name, f in ours.items()
    ]
    for other in others:
        rate = other["tokens_per_step"] / other["median_step_cpu_seconds"]
        kept = "" if other["memory"] == "own" else ", freed memory kept"
        rows.append((f"{other['peer']} at {other['commit'][:7]}{kept}", rate, other["peak_rss_mib"], other["settings"]))
    for name, rate, peak, about in rows:
        ratios = " | ".join(f"{found['tokens_per_second'] / rate:.2f} x" for found in ours.values())
        lines.append(f"| {name} | {rate:,.0f} | {ratios} | {peak:,.0f} | {about} |")
    return "\n".join(lines) + "\n"


def report(name: str, case: Case, precision: str, sparsity: str, found: dict[str, Any]) -> str:
    """One case as Markdown."""
    lines = [
        f"### {name}: L {case.L}, D {case.D}, F {case.F:,}, k {case.k}, {case.N:,} tokens; {sparsity}, {precision}",
        "",
        f"**{found['tokens_per_second']:,.0f} tokens/s**, {found['step'] * 1e3:.0f} ms a step, "
        f"{found['step'] / found['floor']:.1f} x the floor ({found['floor'] * 1e3:.0f} ms), "
        f"peak {found['peak_mib']:,.0f} MiB",
        "",
        "| part | ms a step | share |",
        "|---|---|---|",
    ]
    total = sum(found["parts"].values())
    for part, spent in sorted(found["parts"].items(), key=lambda item: -item[1]):
        lines.append(f"| {part} | {spent * 1e3:.1f} | {spent / total:.0%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the cases asked for, print them, and keep them where asked to."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=["F2048", "F8192"])
    parser.add_argument("--sparsity", choices=SPARSITIES, default="joint-topk")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--peer",
        type=peer_checkout,
        action="append",
        default=[],
        metavar="NAME=CHECKOUT",
        help="another trainer, by its script in benchmarks/peers; may be given several times",
    )
    parser.add_argument(
        "--peer-memory",
        nargs="+",
        choices=PEER_MEMORY,
        default=["own"],
        help="peers as they come (own), or keeping freed memory as ours does (kept), which is faster",
    )
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peers' requirements")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/DATE-step.md")
    args = parser.parse_args()
    if args.peer and (args.device != "cpu" or args.threads != 1):
        parser.error("peers run on one CPU thread; add --device cpu --threads 1")
    torch.set_num_threads(args.threads)
    parts = [f"# Training step, {datetime.now(UTC).date()}\n\n{machine(args.device)}\n"]
    for name in args.case:
        ours = {}
        for precision in args.precision:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                ours[precision] = fresh.submit(measure, CASES[name], args, precision).result()
            parts.append(report(name, CASES[name], precision, args.sparsity, ours[precision]))
            print(parts[-1], flush=True)
        if args.peer and name in PEER_CASES:
            others = [peer(*chosen, memory, name, args) for chosen in args.peer for memory in args.peer_memory]
            parts.append(comparison(ours, others))
            print(parts[-1], flush=True)
    if args.keep:
        keep("step", args.device, "\n".join(parts))


if __name__ == "__main__":
    main()
