"""Ranks on a mesh train what one process trains: the same weights, figures and finished transcoder, to rounding."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from itertools import islice, product
from typing import Any

import pytest
import torch

from crosslayer import (
    AuxK,
    BatchTopK,
    DeadPenalty,
    Full,
    GroupMax,
    JointTopK,
    JumpReLU,
    LowRank,
    Muon,
    ReLU,
    SourceAndTargetTied,
    SourceTied,
    TargetTied,
    TopK,
    TrainConfig,
    Wiring,
)
from crosslayer.activations.record import Activations
from crosslayer.coders import draw
from crosslayer.coders.sparsity import Sparsity
from crosslayer.coders.sparsity.topk import kth_of_group
from crosslayer.distributed.group import team_of
from crosslayer.distributed.mesh import join
from crosslayer.distributed.sharding import parallelise, whole
from crosslayer.team import ALONE, Team, share
from crosslayer.training.scales import Scales, estimate_scales
from crosslayer.training.stream import Place, shuffled_batches, usable_tokens
from crosslayer.training.trainer import Trainer
from making import random_activations, random_coder

L, D, F, STEPS = 3, 8, 16, 6
SPARSITIES = {"joint": JointTopK(4), "batch": BatchTopK(4), "jump": JumpReLU(0.05, initial_threshold=0.1)}
WIRINGS = {"plt": Wiring.per_layer(L), "window": Wiring(L, 2), "clt": Wiring.full(L)}
MESHES = {"2x1": (2, 1), "1x2": (2, 2), "2x2": (4, 2), "4x1": (4, 1), "1x4": (4, 4)}
"""Ranks in all, and feature ranks."""
PAIRS: dict[str, dict[str, Any]] = {
    f"{wiring}, {sparsity}": {"wiring": WIRINGS[wiring], "sparsity": SPARSITIES[sparsity]}
    for wiring in WIRINGS
    for sparsity in SPARSITIES
}
OTHERS: dict[str, dict[str, Any]] = {
    "topk": {"sparsity": TopK(2)},
    "groupmax": {"sparsity": GroupMax(4)},
    "relu": {"sparsity": ReLU(0.01)},
    "quadratic": {"sparsity": JumpReLU(0.01, quadratic_coefficient=0.1, target_l0=4.0)},
    "micro-batches": {"sparsity": BatchTopK(4), "micro_batches": 3},
    "dead penalty": {"dead_penalty": DeadPenalty(0.1)},
    "full with scales and offsets": {"decoder": Full(scale=True, offset=True)},
    "source-tied": {"decoder": SourceTied(scale=True)},
    "target-tied": {"decoder": TargetTied()},
    "coalesced": {"decoder": TargetTied(topk_coalesced=2, scale=True)},
    "both tied": {"decoder": SourceAndTargetTied()},
    "low rank": {"decoder": LowRank(rank=2)},
    "skip": {"skip": Wiring.full(L)},
    "dense, low rank, skip": {"sparsity": ReLU(0.01), "decoder": LowRank(rank=2, offset=True), "skip": Wiring.full(L)},
    "dense, tied": {"sparsity": ReLU(0.01), "decoder": SourceAndTargetTied(scale=True)},
}


class Chunks:
    """A stream of which each process has the tokens that fall to it."""

    def __init__(self, team: Team = ALONE):
        self.team = team

    def chunk(self, index: int) -> Activations:
        activations = random_activations(120, L, D, seed=index)
        rows = share(self.team.tokens, len(activations))
        return activations[rows.start : rows.stop]


@cache
def scales() -> Scales:
    found = estimate_scales(random_activations(1000, L, D, seed=99))
    return Scales(**{name: value.double() for name, value in vars(found).items()})


@contextmanager
def in_double() -> Iterator[None]:
    """So that nothing near a tie is decided by rounding."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def trained(settings: dict[str, Any], team: Team = ALONE) -> dict[str, Any]:
    """Everything that comes of a short training: on every rank the whole of it."""
    with in_double():
        # from the third step on features are dead, which brings their revival into play
        usual = {
            "wiring": Wiring.full(L),
            "sparsity": JointTopK(4),
            "d_transcoder": F,
            "tokens": 300,
            "batch_tokens": 50,
        }
        usual |= {"dead_density": 0.05, "density_tokens": 40, "auxk": AuxK(k=3), "calibration_tokens": 90}
        coach = Trainer(TrainConfig(**usual | settings), scales(), team=team)
        source = Chunks(team)
        metrics = []
        for batch in islice(shuffled_batches(source, 50, 0, Place(), team.tokens), STEPS):
            metrics.append(asdict(coach.step(batch.batch)))
        density = torch.cat(team.features.gather(coach.density.T.contiguous())).T
        finished = coach.finish(usable_tokens(source, Place(5, 0), 50, 90, 0, team.tokens))
        return {
            "metrics": metrics,
            "density": density,
            "weights": {**whole(coach.coder).state_dict()},
            "finished": {**whole(finished).state_dict()},
        }


def trained_on_mesh(n_feature: int, settings: dict[str, Any]) -> dict[str, Any]:
    team = team_of(join(n_feature))
    found = trained(settings, team)
    if team.everyone.rank:  # the replicas are checked here, and one of them there
        assert same_everywhere(found, team)
        return {}
    assert same_everywhere(found, team)
    return found


def same_everywhere(found: dict[str, Any], team: Team) -> bool:
    """Whether all ranks hold the same bits, so that they never drift apart."""
    flat = torch.cat([tensor.flatten().double() for tensor in found["weights"].values()])
    first, *others = team.everyone.gather(flat[None])
    return all(torch.equal(first, other) for other in others)


@cache
def alone(name: str) -> dict[str, Any]:
    return trained((PAIRS | OTHERS)[name])


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", PAIRS)
def test_a_mesh_trains_what_one_process_trains(ranks, name, mesh):
    n, n_feature = MESHES[mesh]
    assert_same(ranks.run(n, trained_on_mesh, n_feature, PAIRS[name])[0], alone(name))


@pytest.mark.parametrize("name", OTHERS)
def test_so_does_every_other_kind_of_bank_sparsity_and_revival(ranks, name):
    assert_same(ranks.run(4, trained_on_mesh, 2, OTHERS[name])[0], alone(name))


def test_muon_trains_the_same_on_other_tokens(ranks):
    settings = {"optimizer": Muon(), "skip": Wiring.per_layer(L)}
    assert_same(ranks.run(2, trained_on_mesh, 1, settings)[0], trained(settings))


def test_the_comparison_sees_revival_at_work():
    terms = [step["terms"] for name in ("clt, batch", "dead penalty") for step in alone(name)["metrics"]]
    assert any(term.get("auxk", 0) > 0 for term in terms)
    assert any(term.get("dead_penalty", 0) > 0 for term in terms)


STARTS: dict[str, tuple[Sparsity, Sparsity | None]] = {
    "as it is": (BatchTopK(4), None),
    "thresholds": (JumpReLU(), None),
    "dense from sparse": (TopK(2), JumpReLU(0.05)),
    "sparse from dense": (ReLU(), TopK(2)),
}
"""The sparsity of a start, and the one that it is trained on with."""


def finetuned_on_mesh(n_feature: int, kind: str) -> dict[str, Any]:
    team = team_of(join(n_feature))
    return finetuned(team, kind)


def finetuned(team: Team, kind: str) -> dict[str, Any]:
    before, after = STARTS[kind]
    with in_double():
        start = random_coder(Wiring.full(L), before, D=D, F=F)
        start.cut.fill_(0.5)
        if isinstance(before, JumpReLU):
            start.with_thresholds(torch.rand(L, F, generator=torch.Generator().manual_seed(1)))
        config = TrainConfig(wiring=Wiring.full(L), sparsity=after, d_transcoder=F, tokens=300, batch_tokens=50)
        coach = Trainer(config, scales(), start=parallelise(start, team, after), team=team)
        for batch in islice(shuffled_batches(Chunks(team), 50, 0, Place(), team.tokens), 3):
            coach.step(batch.batch)
        return whole(coach.coder).state_dict()


@pytest.mark.parametrize("kind", STARTS)
def test_a_finetuning_starts_from_ones_own_share(ranks, kind):
    for found in ranks.run(2, finetuned_on_mesh, 2, kind):
        assert_same(found, finetuned(ALONE, kind))


@pytest.mark.parametrize("n", [1, 3, 10, 4099])
def test_rows_are_drawn_alike_whoever_holds_them(monkeypatch, n):
    monkeypatch.setattr(draw, "BLOCK", 4)
    generator = torch.Generator().manual_seed(7)
    wanted = [torch.empty(n, 2, 3).uniform_(-b, b, generator=generator) for b in (1.0, 0.5)]
    for rows, columns in product((range(n), range(n // 3, n), range(n // 2)), (range(3), range(1, 3))):
        drawing = draw.Draw(torch.Generator().manual_seed(7), rows, n, columns, 3)
        for bound, tensor in zip((1.0, 0.5), wanted, strict=True):
            part = torch.zeros(len(rows), 2, len(columns))
            drawing(part, bound)
            assert torch.equal(part, tensor[rows.start : rows.stop, :, columns.start : columns.stop])


def own_share(n_feature: int, sparsity: Sparsity) -> tuple[bool, torch.Size]:
    team = team_of(join(n_feature))
    coder = random_coder(Wiring.full(L), JumpReLU(), D=D, F=F)
    coder.with_thresholds(torch.rand(L, F, generator=torch.Generator().manual_seed(1)))
    own = parallelise(coder, team, sparsity)
    again = whole(own).state_dict()
    return all(torch.equal(value, again[name]) for name, value in coder.state_dict().items()), own.W_dec[0].shape


@pytest.mark.parametrize(("sparsity", "shape"), [(TopK(2), (F, L, D // 4)), (ReLU(), (F // 4, L, D))])
def test_a_coder_taken_apart_and_put_together_is_the_same(ranks, sparsity, shape):
    assert ranks.run(4, own_share, 4, sparsity) == [(True, shape)] * 4


def statistics() -> dict[str, torch.Tensor]:
    team = team_of(join())
    found = estimate_scales(random_activations(300, L, D)[share_of(team, 300)], team.tokens)
    return vars(found)


def share_of(team: Team, n: int) -> slice:
    """Shares as uneven as can be: the first process has none, the second all but ten."""
    return (slice(0, 0), slice(0, n - 10), slice(n - 10, n))[team.tokens.rank]


def test_scales_are_of_the_whole_chunk(ranks):
    for found in ranks.run(3, statistics):
        torch.testing.assert_close(found, vars(estimate_scales(random_activations(300, L, D))))


def selected(values: list[list[float]], k: int, dtype: torch.dtype) -> float:
    team = team_of(join())
    return kth_of_group(torch.tensor(values[team.everyone.rank], dtype=dtype), k, team.everyone).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kth_largest_of_a_group_is_exact(ranks, dtype):
    values = [torch.rand(50).pow(8).tolist() + [0.25] * 3, [], [1e-30, 0.25, 3e7]]
    ordered = sorted(torch.tensor([v for part in values for v in part], dtype=dtype).tolist(), reverse=True)
    for k in (1, 7, 30, len(ordered)):
        assert ranks.run(3, selected, values, k, dtype) == [ordered[k - 1]] * 3
