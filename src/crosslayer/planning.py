"""What a training will cost on this machine, and what would fit where it does not, before anything starts.

Axes: L layers, S source layers, D d_model, F features a layer, N tokens a step, T targets of a source.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch.nn.functional import embedding_bag

from crosslayer.activations.capture import CHUNK_BYTES, ModelSource
from crosslayer.coders.decoders import Full, LowRank
from crosslayer.coders.sparsity import JointTopK
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.data.examples import Example
from crosslayer.files import disk_room
from crosslayer.memory import memory_room
from crosslayer.models.load import LoadedModel
from crosslayer.training.config import TrainConfig
from crosslayer.training.optimizers import Adam8bit, Muon
from crosslayer.wiring import Wiring

FLOAT = 4
"""Bytes of a weight, gradient or activation in training."""
RANKS = (8, 4, 2, 1)
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Names that configurations have for the number of experts."""


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second."""

    product_flops: float
    """Floating-point operations of a dense product."""
    gathered: float
    """Numbers that a weighted sum of rows reads."""
    updated: float
    """Parameters that Adam updates."""
    looked_at: float
    """Scores that a selection looks at."""


@dataclass(frozen=True)
class Plan:
    """What a training costs. Bytes, seconds and counts."""

    n_parameters: int
    weights: int
    gradients: int
    moments: int
    activations: int
    """Of one step (of one of its micro-batches), and the chunk of captured tokens that it draws from."""
    finished_run: int
    """On disk."""
    state: int
    """On disk while it is unfinished: weights and moments."""
    seconds: float | None
    """Of all training steps, without capturing; None where it was not measured."""

    @property
    def memory(self) -> int:
        """Everything that is in memory at once, beside the language model."""
        return self.weights + self.gradients + self.moments + self.activations

    @property
    def disk(self) -> int:
        """Room for the state, twice as it is replaced atomically, or for the finished run beside it."""
        return 2 * self.state + self.finished_run


@dataclass(frozen=True)
class Estimate:
    """A plan beside what this machine has, and what to change where it does not fit. Bytes and seconds."""

    plan: Plan
    model: int
    """Memory of the language model's weights."""
    memory_room: int | None
    """Free beside the language model."""
    disk_room: int
    capture_seconds: float
    proposals: list[str]
    """Options that fit, where the plan does not."""


def estimate(model: LoadedModel, data: Sequence[Example], config: TrainConfig, out: Path) -> Estimate:
    """The plan of a training on this machine.

    Runs the model on one small batch; of a sketch without weights, the time of its forward pass is that of its
    products and a chunk of captured tokens is as large as one may be.
    """
    rates, size = measure_rates(model.device), sum(p.numel() * p.element_size() for p in model.model.parameters())
    room = memory_room(model.device)
    if model.proof is None:
        seconds_a_token, chunk = forward_flops(model) / product_flops(model.device, model.model.dtype), CHUNK_BYTES
        room = None if room is None else max(0, room - size)
    else:
        seconds_a_token, chunk = _measured_capture(model, data, config.seed)
    cost = plan(config, model.d_model, rates, chunk)
    fits = room is None or cost.memory <= room
    return Estimate(
        plan=cost,
        model=size,
        memory_room=room,
        disk_room=disk_room(out),
        capture_seconds=seconds_a_token * config.tokens,
        proposals=[] if fits or room is None else proposals(config, model.d_model, room, chunk),
    )


def _measured_capture(model: LoadedModel, data: Sequence[Example], seed: int) -> tuple[float, int]:
    """Seconds a captured token, and bytes of a chunk of them."""
    source = ModelSource(model, data, seed=seed, batch_prompts=16)
    start = time.perf_counter()
    captured = next(iter(source.captured(source.batches(0))))
    seconds = time.perf_counter() - start
    bytes_a_token = 2 * model.n_layers * model.d_model * captured.activations.x.element_size()
    return seconds / len(captured), source.chunk_prompts * source.tokens_a_prompt * bytes_a_token


def forward_flops(model: LoadedModel) -> float:
    """Floating-point operations of a forward pass a token, without the head: two for each weight but embeddings.

    Of experts, those that a token is sent to count. Weights of a vision tower count at every token, which is a little
    too much; the products of attention patterns do not, which for short prompts is a little too little.
    """
    embeddings = {id(m.weight) for m in model.body.modules() if isinstance(m, torch.nn.Embedding)}
    share = _active_experts(model)
    weights = (
        p.numel() * (share if ".experts." in name else 1.0)
        for name, p in model.body.named_parameters()
        if id(p) not in embeddings
    )
    return 2.0 * sum(weights)


def _active_experts(model: LoadedModel) -> float:
    """Share of a mixture's experts that a token is sent to."""
    config = model.model.config.get_text_config()
    of = next((getattr(config, name, None) for name in EXPERTS if getattr(config, name, None)), None)
    return 1.0 if of is None else (getattr(config, "num_experts_per_tok", None) or of) / of


def plan(config: TrainConfig, d_model: int, rates: Rates | None = None, chunk_bytes: int = 0) -> Plan:
    """The cost of a training, exactly for parameters, by formulas for the rest.

    Args:
        config: its settings.
        d_model: width of the language model.
        rates: what the machine does, for the time; see `measure_rates`.
        chunk_bytes: what is captured at a time.
    """
    F, n = config.width(d_model), n_parameters(config, d_model)
    moment_bytes = {Adam8bit: 2, Muon: 4}.get(type(config.optimizer), 2 * FLOAT)
    steps = config.tokens / config.batch_tokens
    return Plan(
        n_parameters=n,
        weights=n * FLOAT,
        gradients=n * FLOAT,
        moments=n * moment_bytes,
        activations=_step_bytes(config, d_model, F) + chunk_bytes,
        finished_run=n * FLOAT,
        state=n * (FLOAT + moment_bytes),
        seconds=None if rates is None else steps * sum(step_seconds(config, d_model, rates).values()),
    )


def proposals(config: TrainConfig, d_model: int, room: int, chunk_bytes: int = 0) -> list[str]:
    """The widest window, the highest rank and the largest width that fit into `room` bytes, as options to give."""

    def fits(**changes: object) -> bool:
        return plan(replace(config, **changes), d_model, chunk_bytes=chunk_bytes).memory <= room

    parts = [n for n in (2, 4, 8, 16) if fits(micro_batches=n * config.micro_batches)]
    if parts:
        return [f"--micro-batches {parts[0] * config.micro_batches}"]
    L, first, F = config.wiring.n_layers, config.wiring.first_target, config.width(d_model)
    found = []
    for span in range(config.wiring.span - 1, 0, -1):
        if fits(wiring=Wiring(L, span, first)):
            found.append(f"--span {span}")
            break
    if isinstance(config.decoder, Full):
        found += [f"--decoder low-rank --rank {r}" for r in RANKS if fits(decoder=LowRank(rank=r))][:1]
    widths = [width for width in (2**n for n in range(3, 20)) if width < F and fits(d_transcoder=width, sparsity=None)]
    return found + [f"--d-transcoder {width}" for width in widths[-1:]]


@cache
def measure_rates(device: torch.device) -> Rates:
    """What this machine does, measured on pieces of a step that no cache holds, in about a second."""
    N, D, F = 512, 256, 2**16
    W = torch.randn(F, D, device=device)
    index, weights = torch.randint(F, (N, 64), device=device), torch.rand(N, 64, device=device)
    parameter = torch.nn.Parameter(torch.zeros(2**23, device=device))
    parameter.grad = torch.ones_like(parameter)
    adam = torch.optim.Adam([parameter], fused=True)
    scores = torch.randn(N, F // 2, device=device)
    return Rates(
        product_flops=product_flops(device, torch.float32),
        gathered=N * 64 * D / _seconds(lambda: embedding_bag(index, W, per_sample_weights=weights, mode="sum"), device),
        updated=parameter.numel() / _seconds(adam.step, device),
        looked_at=scores.numel() / _seconds(lambda: (scores * scores).amax(1), device),
    )


@cache
def product_flops(device: torch.device, dtype: torch.dtype, N: int = 512, D: int = 256, F: int = 4096) -> float:
    """Operations a second of a dense product of [N, D] and [D, F] numbers."""
    x, W = torch.randn(N, D, device=device).to(dtype), torch.randn(F, D, device=device).to(dtype)
    return 2 * N * D * F / _seconds(lambda: x @ W.T, device)


def _seconds(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The quickest of a few calls."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def n_parameters(config: TrainConfig, d_model: int) -> int:
    """Numbers that a training learns."""
    with torch.device("meta"):
        sparsity = JointTopK(1) if config.sparsity is None else config.sparsity
        F = config.width(d_model)
        coder = CrossLayerTranscoder(config.wiring, d_model, F, sparsity, config.decoder, config.skip)
        coder.learn_thresholds()
    return sum(parameter.numel() for parameter in coder.parameters())


def _active(config: TrainConfig, S: int, F: int) -> int:
    """Active features a token over all layers; all where nothing is known of them."""
    return S * F if config.sparsity is None else config.sparsity.budget(S, F)


def _step_bytes(config: TrainConfig, D: int, F: int) -> int:
    """Pre-activations and scores, a mask, reads and writes with their gradients, codes and their gradients."""
    N, L, S = config.batch_tokens / config.micro_batches, config.wiring.n_layers, len(config.wiring.source_layers)
    dense = N * S * F * (2 * FLOAT + 1)
    streams = 8 * N * L * D * FLOAT
    return int(dense + streams + 60 * N * _active(config, S, F))


def step_seconds(config: TrainConfig, d_model: int, rates: Rates) -> dict[str, float]:
    """Seconds of one training step on one device, by what they go to.

    AuxK adds its share of the tokens to what is selected and summed. Beside Adam, of which parameters cost 28 bytes,
    lengths of write vectors are taken, dense gradients written, and looked at once more for numbers that are none.
    """
    N, D, S, F = config.batch_tokens, d_model, len(config.wiring.source_layers), config.width(d_model)
    active, targets = _active(config, S, F), config.wiring.n_pairs / S
    dense_passes = 3 if active == S * F else 1
    aux = config.auxk.token_share if config.auxk.coefficient and dense_passes == 1 else 0.0
    return {
        "encoder products": dense_passes * 2 * N * S * F * D / rates.product_flops,
        "sums of active rows": N * (active + aux * config.auxk.k) * D * 3 * (targets + 1) / rates.gathered,
        "selection": (3 + aux) * N * S * F / rates.looked_at,
        "parameters": (28 + 16) / 28 * n_parameters(config, D) / rates.updated,
    }
