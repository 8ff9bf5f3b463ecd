"""Time the trainer of EleutherAI/clt-training on one CPU thread; prints one JSON line.

    python benchmarks/peers/eleuther.py --peer CHECKOUT --case F2048 --coalesce none --steps 30

Runs in the peer's own environment (torch, transformers, datasets, einops, natsort, schedulefree, simple-parsing),
which needs no triton. The peer's `Trainer.fit` does the work: it hooks the MLPs of a tiny random GPT-2, so that
model's forward is part of each step, and `base_model_share` says how much of it.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor

LAYERS, WIDTH, CONTEXT, VOCABULARY, BOS = 6, 256, 64, 256, 0
WARMUP_STEPS = 5

PATCHES = {
    "kernels": "`import sparsify` fails without triton, whose kernels need a GPU: the encoder's weight gradient is a "
    "torch sparse product instead, and the decoder falls back to the peer's own embedding_bag",
    "forward_output": "untied training raises TypeError at the second layer: partial outputs are built with two values "
    "more than the dataclass has",
    "stop": "the checkpoint at the end of `fit` raises for an untied coder on a CPU, where safetensors sees the first "
    "decoder under two names: the data set ends the run after the last timed step",
}


@dataclass(frozen=True)
class Case:
    """The sizes of one comparison."""

    latents: int
    k: int
    sequences: int

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.sequences * CONTEXT


CASES = {"F2048": Case(latents=2048, k=32, sequences=16), "F8192": Case(latents=8192, k=16, sequences=8)}


class TimesUp(Exception):
    """Raised by the data set when the timed steps are over."""


class TimedTokens:
    """Random tokens in memory that read the process's CPU clock whenever a step begins."""

    def __init__(self, sequences: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.steps = WARMUP_STEPS + steps
        self.tokens = torch.randint(BOS + 1, VOCABULARY, (self.steps + 1, sequences, CONTEXT), generator=generator)
        self.clock: list[float] = []

    def __len__(self) -> int:
        return self.tokens.shape[0] * self.tokens.shape[1]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step, sequence = divmod(index, self.tokens.shape[1])
        if sequence == 0:
            self.clock.append(time.process_time())
        if step == self.steps:
            raise TimesUp
        return {"input_ids": self.tokens[step, sequence]}

    def seconds(self) -> list[float]:
        """CPU seconds of each timed step."""
        timed = self.clock[WARMUP_STEPS:]
        return [end - begin for begin, end in pairwise(timed)]


def transposed_product(indices: Tensor, values: Tensor, dense: Tensor, N: int) -> Tensor:
    """Sparse (tokens, N) given by its entries of each row, transposed, times dense (tokens, width)."""
    rows = torch.arange(len(indices)).repeat_interleave(indices.shape[1])
    entries = torch.stack([indices.flatten(), rows])
    return torch.sparse_coo_tensor(entries, values.flatten(), (N, len(indices)), check_invariants=False) @ dense


def patch_kernels() -> None:
    """Put the sparse product where the peer looks for its triton kernels."""
    kernels = ModuleType("sparsify.kernels")
    kernels.triton_sparse_transpose_dense_matmul = transposed_product
    kernels.COODecoder = kernels.triton_coo_sparse_dense_matmul = None
    sys.modules["sparsify.kernels"] = kernels


def patch_forward_output(sparse_coder: ModuleType) -> None:
    """Drop the two surplus values of a partial output."""
    output: Callable[..., Any] = sparse_coder.ForwardOutput
    sparse_coder.ForwardOutput = lambda *values: output(*values[:4], values[-1])


def load_peer(checkout: Path) -> ModuleType:
    """The peer's package from its checkout, patched."""
    sys.path.insert(0, str(checkout))
    patch_kernels()
    peer = importlib.import_module("sparsify")
    patch_forward_output(peer.sparse_coder)
    return peer


def base_model() -> transformers.GPT2Model:
    """A random GPT-2, as small as six layers of the wanted width can be."""
    shape = {"n_layer": LAYERS, "n_embd": WIDTH, "n_inner": 64, "n_head": 4, "n_positions": CONTEXT}
    config = transformers.GPT2Config(vocab_size=VOCABULARY, bos_token_id=BOS, eos_token_id=BOS, **shape)
    return transformers.GPT2Model(config)


def trainer(peer: ModuleType, case: Case, coalesce: str, data: TimedTokens, model: transformers.GPT2Model) -> Any:
    """The peer's trainer of a cross-layer transcoder of every MLP."""
    coder = peer.TranscoderConfig(num_latents=case.latents, k=case.k, coalesce_topk=coalesce, dtype="float32")
    config = peer.TrainConfig(
        sae=coder,
        batch_size=case.sequences,
        cross_layer=LAYERS,
        hookpoints=["h.*.mlp"],
        optimizer="adam",
        filter_bos=True,  # nothing to filter, but the default raises: `bool_mask &= 0`
        log_to_wandb=False,
    )
    return peer.Trainer(config, data, model)


def forward_seconds(model: transformers.GPT2Model, tokens: Tensor, repeats: int = 20) -> float:
    """CPU seconds of one forward of the base model alone."""
    model(tokens)
    began = time.process_time()
    for _ in range(repeats):
        model(tokens)
    return (time.process_time() - began) / repeats


def peak_mib() -> float:
    """This process's peak resident memory, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def commit(checkout: Path) -> str:
    """The checkout's commit."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def measure(checkout: Path, case: Case, coalesce: str, steps: int) -> dict[str, Any]:
    """Run the peer's trainer; what it took."""
    model, data = base_model(), TimedTokens(case.sequences, steps)
    fitting = trainer(load_peer(checkout), case, coalesce, data, model)
    with suppress(TimesUp):
        fitting.fit()
    peak, seconds = peak_mib(), data.seconds()
    return {
        "tokens_per_step": case.tokens,
        "steps": steps,
        "tokens_per_cpu_second": round(case.tokens * steps / sum(seconds), 1),
        "median_step_cpu_seconds": round(statistics.median(seconds), 4),
        "fastest_step_cpu_seconds": round(min(seconds), 4),
        "base_model_share": round(forward_seconds(model, data.tokens[0]) / statistics.median(seconds), 3),
        "peak_rss_mib": round(peak),
        "parameters": sum(p.numel() for coder in fitting.saes.values() for p in coder.parameters()),
        "optimizer": type(fitting.optimizers[0]).__name__,
        "dtype": str(next(iter(fitting.saes.values())).dtype),
        "torch": torch.__version__,
    }


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="a git checkout of EleutherAI/clt-training")
    parser.add_argument("--case", choices=CASES, default="F2048")
    parser.add_argument("--coalesce", choices=["none", "concat"], default="none", help="untied, or tied by target")
    parser.add_argument("--steps", type=int, default=30, help="timed steps, after the warm-up")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    named = {"peer": "EleutherAI/clt-training", "commit": commit(args.peer), "case": args.case}
    with redirect_stdout(sys.stderr):
        result = measure(args.peer, CASES[args.case], args.coalesce, args.steps)
    print(json.dumps({**named, "coalesce": args.coalesce, **result, "patches": PATCHES}))


if __name__ == "__main__":
    main()
