"""What a training costs on a mesh of many ranks: memory of a rank, bytes it sends and seconds a step.

A model, to choose a mesh before it is paid for. It adds computing, sending and waiting up as if nothing overlapped.

Axes: N tokens a step, L layers, D d_model, F features a layer, k active features a token; P ranks, of which P_f share
the features of a layer and P_d = P / P_f train on different prompts.
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from crosslayer.coders.sparsity import BatchTopK, JointTopK, Penalised, TopK
from crosslayer.distributed.sharding import check_shares
from crosslayer.errors import UserError
from crosslayer.planning import FLOAT, Plan, Rates, n_parameters, plan, step_seconds
from crosslayer.training.config import TrainConfig

BATCH_K = 64
"""Active features a token where nothing is known of them."""
HISTOGRAMS = 3 * 2**11 * 8
"""Bytes by which BatchTopK finds its cut."""
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
"""Numbers that are tried."""


@dataclass(frozen=True)
class Machine:
    """What one rank does, and how it is tied to the others."""

    rates: Rates
    forward_flops: float
    """Floating-point operations a second of the language model's forward pass."""
    memory: int | None
    """Bytes of one rank; None where it is not known."""
    ranks_per_node: int
    within: float
    """Bytes a second that a rank sends to others of its node."""
    between: float
    """Bytes a second that it sends to other nodes."""
    latency: float
    """Seconds that a collective takes beside what it sends."""


def h100(precision: str) -> Machine:
    """A rank of a node of eight H100 SXM, by the vendor's data sheet, at the shares of the peaks that are common.

    Products: 40 % of 989 TFLOP/s in bf16, 70 % of 67 in fp32. Memory: 3.35 TB/s, 60 % of it for gathered rows, 70 % for
    Adam's 28 bytes a parameter, half for scores that are looked at. NVLink 450 GB/s and a network card of 400 Gbit/s
    a GPU, 80 % of each.
    """
    dense, bandwidth = (0.4 * 989e12 if precision == "bf16" else 0.7 * 67e12), 3.35e12
    rates = Rates(
        product_flops=dense,
        gathered=0.6 * bandwidth / FLOAT,
        updated=0.7 * bandwidth / 28,
        looked_at=0.5 * bandwidth / FLOAT,
    )
    return Machine(rates, 0.4 * 989e12, 80 * 10**9, 8, 0.8 * 450e9, 0.8 * 50e9, 3e-5)


@dataclass(frozen=True)
class Layout:
    """How ranks share the work."""

    n_ranks: int
    n_feature: int = 1
    """Ranks that share the features of a layer."""
    shard_model: bool = False
    """Whether the language model's weights are spread over all ranks instead of copied to each."""

    def __post_init__(self):
        if self.n_ranks < 1 or self.n_feature < 1 or self.n_ranks % self.n_feature:
            raise UserError(
                f"{self.n_ranks} ranks cannot be split into groups of {self.n_feature}; choose a divisor of the ranks"
            )

    @property
    def n_data(self) -> int:
        """Ranks that train the same features on different prompts."""
        return self.n_ranks // self.n_feature


@dataclass(frozen=True)
class Model:
    """What the language model costs."""

    n_bytes: int
    forward_flops: float
    """Operations a token."""
    bytes_a_number: int
    """Of its activations."""


@dataclass(frozen=True)
class MeshPlan:
    """What a training costs on a mesh, for one rank and one step. Bytes and seconds."""

    layout: Layout
    local: Plan
    """Of one rank's share of the transcoder and of the tokens."""
    model: int
    """Memory of the language model."""
    computing: dict[str, float]
    """Seconds, by what they go to."""
    sent: dict[str, float]
    """Bytes, by what they carry."""
    sending: dict[str, float]
    """Seconds, by what is sent."""
    tokens: int
    """Tokens of a step, of all ranks."""
    micro_batches: int
    """Parts that a rank computes its share of a step in."""

    @property
    def memory(self) -> int:
        """Everything that is in a rank's memory at once."""
        return self.local.memory + self.model

    @property
    def seconds(self) -> float:
        """Of one step."""
        return sum(self.computing.values()) + sum(self.sending.values())

    @property
    def tokens_a_second(self) -> float:
        """Of all ranks together."""
        return self.tokens / self.seconds


def share_of_a_rank(config: TrainConfig, d_model: int, layout: Layout) -> TrainConfig:
    """The training that one rank does: its features, its tokens, its part of the active features.

    Raises:
        UserError: for what cannot be shared out.
    """
    F, n = config.width(d_model), layout.n_feature
    check_shares(config, d_model, n)
    sparsity: Any = config.sparsity
    if n > 1 and hasattr(sparsity, "k"):
        sparsity = replace(sparsity, k=ceil(sparsity.k / n))
    tokens, auxk = ceil(config.batch_tokens / layout.n_data), replace(config.auxk, k=ceil(config.auxk.k / n))
    return replace(config, d_transcoder=F // n, batch_tokens=tokens, sparsity=sparsity, auxk=auxk)


def plan_mesh(config: TrainConfig, d_model: int, layout: Layout, machine: Machine, model: Model) -> MeshPlan:
    """The cost of a training step on a mesh."""
    local = share_of_a_rank(config, d_model, layout)
    sent = _sent(config, local, d_model, layout, model)
    bandwidths = {name: _bandwidth(machine, layout, along) for name, along in AXES.items()}
    capture = config.batch_tokens / layout.n_ranks * model.forward_flops / machine.forward_flops
    return MeshPlan(
        layout=layout,
        local=_of_so_many(plan(local, d_model), _held(config, local, d_model, layout.n_feature)),
        model=model.n_bytes // (layout.n_ranks if layout.shard_model else 1),
        computing={"language model": capture, **step_seconds(local, d_model, machine.rates)},
        sent=sent,
        sending={name: _waits(name, config) * machine.latency + n / bandwidths[name] for name, n in sent.items() if n},
        tokens=config.batch_tokens,
        micro_batches=config.micro_batches,
    )


def _of_so_many(local: Plan, n: int) -> Plan:
    """The same plan for another number of parameters."""
    parts = ("weights", "gradients", "moments", "finished_run", "state")
    return replace(local, n_parameters=n, **{part: getattr(local, part) * n // local.n_parameters for part in parts})


AXES = {
    "activations": "feature",
    "reconstructions": "feature",
    "active features": "feature",
    "candidates": "feature",
    "gradients": "data",
    "language model": "all",
}
"""What a rank sends in a step, and along which axis of the mesh."""


def _sent(config: TrainConfig, local: TrainConfig, D: int, layout: Layout, model: Model) -> dict[str, float]:
    """Bytes that a rank sends in a step.

    A ring sends (P - 1) / P of what is reduced twice, and of what is gathered or reduced to its owners once. Selected
    features are told, with a place of 4 bytes, and get a gradient back; of dense ones reconstructions are summed.
    """
    N, L, S, F = local.batch_tokens, config.wiring.n_layers, len(config.wiring.source_layers), config.width(D)
    n_f, n_d, P = layout.n_feature, layout.n_data, layout.n_ranks
    others, dense = (n_f - 1) / n_f, isinstance(config.sparsity, Penalised)
    aux = config.auxk.token_share if config.auxk.coefficient else 0.0
    active = N * (_active(config) + aux * config.auxk.k)
    shared = 0 if dense or n_f == 1 else _in_whole(config, F)
    return {
        "activations": others * 2 * N * L * D * model.bytes_a_number,
        "reconstructions": 2 * others * (1 + aux) * N * L * D * FLOAT if dense else 0.0,
        "active features": 0.0 if dense else others * FLOAT * (3 * active + S * F + 2 * shared),
        "candidates": _candidates(config, N, n_f),
        "gradients": 2 * (n_d - 1) / n_d * _held(config, local, D, n_f) * FLOAT,
        "language model": model.n_bytes * (P - 1) / P if layout.shard_model else 0.0,
    }


def _active(config: TrainConfig) -> int:
    """Active features a token of a sparsity that selects; of fixed thresholds not known, so as many as by default."""
    S = len(config.wiring.source_layers)
    return BATCH_K if config.sparsity is None else config.sparsity.budget(S, config.width(1))


def _candidates(config: TrainConfig, n_tokens: int, n_feature: int) -> float:
    """Bytes by which ranks find out which features are the largest of all."""
    sparsity, S = config.sparsity, len(config.wiring.source_layers)
    if isinstance(sparsity, JointTopK | TopK):
        scores = sparsity.k * (S if isinstance(sparsity, TopK) else 1)
        return float((n_feature - 1) * n_tokens * scores * FLOAT)
    return 2 * (n_feature - 1) / n_feature * HISTOGRAMS if isinstance(sparsity, BatchTopK) else 0.0


def _in_whole(config: TrainConfig, F: int) -> int:
    """Numbers that every feature rank holds where decoders are shared by columns: they have none."""
    decoder: Any = config.decoder
    return config.wiring.n_pairs * F * (decoder.scale + decoder.offset + getattr(decoder, "rank", 0))


def _held(config: TrainConfig, local: TrainConfig, D: int, n_feature: int) -> int:
    """Parameters of a rank."""
    if n_feature == 1 or isinstance(config.sparsity, Penalised):
        return n_parameters(local, D)
    whole = _in_whole(config, config.width(D))
    return (n_parameters(config, D) - whole) // n_feature + whole


def _waits(name: str, config: TrainConfig) -> int:
    """Collectives of a kind in a step: what belongs to the reading of tokens happens in every micro-batch."""
    return config.micro_batches if name in ("reconstructions", "active features", "candidates") else 1


def _bandwidth(machine: Machine, layout: Layout, along: str) -> float:
    """Bytes a second of the slowest link that a ring along this axis crosses; neighbours share features."""
    reach = layout.n_feature if along == "feature" else layout.n_ranks
    return machine.within if reach <= machine.ranks_per_node else machine.between


def quickest(config: TrainConfig, d_model: int, n_ranks: int, machine: Machine, model: Model) -> MeshPlan | None:
    """The plan of so many ranks that trains the most tokens a second among those that fit; None where none does.

    A step is cut into micro-batches where it does not fit otherwise.
    """
    shared = [n for n in _divisors(n_ranks) if _can_be_shared(config, d_model, n)]
    layouts = [Layout(n_ranks, n, shard) for n in shared for shard in (False, True)]
    plans = [_fitting(config, d_model, layout, machine, model) for layout in layouts]
    return max((p for p in plans if p is not None), key=lambda found: found.tokens_a_second, default=None)


def fits(found: MeshPlan, machine: Machine) -> bool:
    """Whether it fits into the memory of every rank, as far as that is known."""
    return machine.memory is None or found.memory <= machine.memory


def _fitting(config: TrainConfig, d_model: int, layout: Layout, machine: Machine, model: Model) -> MeshPlan | None:
    """With as few micro-batches as will do."""
    for n in MICRO_BATCHES:
        found = plan_mesh(replace(config, micro_batches=n * config.micro_batches), d_model, layout, machine, model)
        if fits(found, machine):
            return found
    return None


def _can_be_shared(config: TrainConfig, d_model: int, n_feature: int) -> bool:
    try:
        check_shares(config, d_model, n_feature)
    except UserError:
        return False
    return True


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
