"""Time the trainer of EleutherAI/clt-training on one CPU thread; prints one JSON line.

    python benchmarks/peers/eleuther.py --peer CHECKOUT --case F2048 --coalesce none --steps 30

Runs in the peer's own environment (torch, transformers, datasets, einops, natsort, schedulefree, simple-parsing),
which needs no triton. The peer's `Trainer.fit` does the work: it hooks the MLPs of a tiny random GPT-2, so that
model's forward is part of each step, and `base_model_cpu_seconds` says how much of it.
"""

import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from common import LAYERS, WARMUP_STEPS, WIDTH, Case, Clock, Job, arguments, time_peer
from torch import Tensor, nn

NAME, CONTEXT, VOCABULARY, BOS = "EleutherAI/clt-training", 64, 256, 0

PATCHES = {
    "kernels": "`import sparsify` fails without triton, whose kernels need a GPU: the encoder's weight gradient is a "
    "torch sparse product instead, and the decoder falls back to the peer's own embedding_bag",
    "forward_output": "untied training raises TypeError at the second layer: partial outputs are built with two values "
    "more than the dataclass has",
    "stop": "the checkpoint at the end of `fit` raises for an untied coder on a CPU, where safetensors sees the first "
    "decoder under two names: the data set ends the run after the last timed step",
}


class ClockedTokens:
    """Random tokens in memory that read the clock whenever a step begins."""

    def __init__(self, case: Case, clock: Clock) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (WARMUP_STEPS + clock.steps + 1, case.tokens // CONTEXT, CONTEXT)
        self.tokens, self.clock = torch.randint(BOS + 1, VOCABULARY, shape, generator=generator), clock

    def __len__(self) -> int:
        return self.tokens.shape[0] * self.tokens.shape[1]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step, sequence = divmod(index, self.tokens.shape[1])
        if sequence == 0:
            self.clock.tick()
        return {"input_ids": self.tokens[step, sequence]}


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


def prepare(checkout: Path, coalesce: str, case: Case, clock: Clock) -> Job:
    """The peer's trainer of a cross-layer transcoder of every MLP."""
    peer = load_peer(checkout)
    coder = peer.TranscoderConfig(num_latents=case.features, k=case.k, coalesce_topk=coalesce, dtype="float32")
    config = peer.TrainConfig(
        sae=coder,
        batch_size=case.tokens // CONTEXT,
        cross_layer=LAYERS,
        hookpoints=["h.*.mlp"],
        optimizer="adam",
        filter_bos=True,  # nothing to filter, but the default raises: `bool_mask &= 0`
        log_to_wandb=False,
    )
    model, data = base_model(), ClockedTokens(case, clock)
    trainer = peer.Trainer(config, data, model)
    kind = {"none": "untied", "concat": "tied by target"}[coalesce]
    about = f"topk a layer, {kind}, Adam; the forward of a tiny base model is part of the step"
    extra = {"base_model_cpu_seconds": round(forward_seconds(model, data.tokens[0]), 4)}
    return Job(trainer.fit, nn.ModuleList(trainer.saes.values()), about, extra)


def forward_seconds(model: transformers.GPT2Model, tokens: Tensor, repeats: int = 20) -> float:
    """CPU seconds of one forward of the base model alone."""
    model(tokens)
    began = time.process_time()
    for _ in range(repeats):
        model(tokens)
    return (time.process_time() - began) / repeats


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = arguments(NAME)
    parser.add_argument("--coalesce", choices=["none", "concat"], default="none", help="untied, or tied by target")
    args = parser.parse_args()
    time_peer(NAME, args, lambda case, clock: prepare(args.peer, args.coalesce, case, clock), PATCHES)


if __name__ == "__main__":
    main()
