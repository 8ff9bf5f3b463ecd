"""What a training step costs, part by part, beside the least that it could cost and beside other trainers.

Synthetic activations lie in memory; AuxK, dead-feature counts, gradient checks and metrics are on, as in a training.
The floor is the encoder's forward product and one pass of Adam over all parameters, measured in the same rounds. CPU
seconds are summed over threads; on a GPU wall seconds are taken. `--peer` adds EleutherAI's own trainer from a
checkout of theirs, run by an interpreter that has what it needs (`benchmarks/peers/eleuther.py` says how).

    python benchmarks/step.py --case F2048 F8192 --precision fp32 bf16 --keep
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
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

import crosslayer as xl
from crosslayer.activations.record import Activations
from crosslayer.coders import codes
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
    watch.watch(codes, "_sum_by_feature", "gradient of weights")
    watch.watch(xl.AuxK, "_explained", "AuxK, forward")
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
                torch.addmm(coder.b_enc[i], x[source], coder.W_enc[i].T, out=out[i])
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


def peer(name: str, args: Namespace) -> dict[str, Any] | None:
    """EleutherAI's trainer on the same sizes, in a process of its own."""
    if args.peer is None or name not in ("F2048", "F8192"):
        return None
    command = [args.peer_python, HERE / "peers" / "eleuther.py", "--peer", args.peer, "--case", name]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(name: str, case: Case, precision: str, sparsity: str, found: dict[str, Any], other: Any) -> str:
    """One case as Markdown."""
    lines = [
        f"### {name}: L {case.L}, D {case.D}, F {case.F:,}, k {case.k}, {case.N:,} tokens; {sparsity}, {precision}",
        "",
        f"**{found['tokens_per_second']:,.0f} tokens/s**, {found['step'] * 1e3:.0f} ms a step, "
        f"{found['step'] / found['floor']:.1f} x the floor ({found['floor'] * 1e3:.0f} ms), "
        f"peak {found['peak_mib']:,.0f} MiB"
        + (f"; EleutherAI in the same run: {other['tokens_per_cpu_second']:,.0f} tokens/s" if other else ""),
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
    parser.add_argument("--peer", help="checkout of EleutherAI/clt-training")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has its requirements")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/DATE-step.md")
    args = parser.parse_args()
    machine = torch.cuda.get_device_name() if args.device != "cpu" else f"{cpu_name()}, {args.threads} thread(s)"
    when = datetime.now(UTC).date()
    parts = [f"# Training step, {when}\n\n{machine}; torch {torch.__version__}; load {os.getloadavg()[0]:.1f}.\n"]
    for name in args.case:
        for precision in args.precision:
            other = peer(name, args)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                found = fresh.submit(measure, CASES[name], args, precision).result()
            parts.append(report(name, CASES[name], precision, args.sparsity, found, other))
            print(parts[-1], flush=True)
    if args.keep:
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / f"{when}-step-{args.device}.md").write_text("\n".join(parts))


def cpu_name() -> str:
    """The processor, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
