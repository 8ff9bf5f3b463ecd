"""What a training costs on a mesh: shares that add up, bytes of a ring simulated link by link, the quickest layout."""

from dataclasses import replace

import pytest

from crosslayer import BatchTopK, Full, JointTopK, JumpReLU, LowRank, Muon, TrainConfig, UserError, Wiring
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.planning import Rates, plan
from crosslayer.scaling import Layout, Machine, Model, fits, h100, plan_mesh, quickest, share_of_a_rank
from crosslayer.team import ALONE, Alone, Team

D = 16
RATES = Rates(product_flops=1e9, gathered=1e8, updated=1e7, looked_at=1e8)
MACHINE = Machine(RATES, 1e9, None, ranks_per_node=4, within=1e6, between=1e5, latency=0.0)
MODEL = Model(n_bytes=8000, forward_flops=1e4, bytes_a_number=2)


def config(**settings) -> TrainConfig:
    return TrainConfig(wiring=Wiring.full(5), **{"d_transcoder": 48, "sparsity": JointTopK(8), **settings})


def ring_bytes(n_ranks: int, n_bytes: int, *, reduced: bool) -> float:
    """Bytes that a rank sends, by passing pieces round a ring until every rank has all of them (summed first)."""
    piece, sent = n_bytes / n_ranks, [0.0] * n_ranks
    for _ in range(2 if reduced else 1):
        has = [{rank} for rank in range(n_ranks)]
        while any(len(pieces) < n_ranks for pieces in has):
            before = [set(pieces) for pieces in has]
            for rank in range(n_ranks):
                news = before[rank] - before[(rank + 1) % n_ranks]
                if news:
                    has[(rank + 1) % n_ranks].add(min(news, key=lambda number: (rank - number) % n_ranks))
                    sent[rank] += piece
    assert len(set(sent)) == 1
    return sent[0]


@pytest.mark.parametrize("sparsity", [JointTopK(8), JumpReLU()], ids=["columns", "rows"])
@pytest.mark.parametrize("decoder", [Full(), Full(scale=True), LowRank(rank=2)], ids=str)
@pytest.mark.parametrize("n", [2, 4])
def test_a_rank_has_the_parameters_that_it_is_given(sparsity, decoder, n):
    settings = config(sparsity=sparsity, decoder=decoder)
    own = CrossLayerTranscoder(settings.wiring, D, 48, sparsity, decoder, team=Team(ALONE.tokens, *[_Ranks(n)] * 2))
    found = plan_mesh(settings, D, Layout(n, n), MACHINE, MODEL).local
    assert found.n_parameters == sum(p.numel() for p in own.initialise(0).parameters())
    assert (found.weights, found.gradients, found.moments) == tuple(b * found.n_parameters for b in (4, 4, 8))


class _Ranks(Alone):
    """A group that is there for its number of processes alone."""

    def __init__(self, size: int):
        self.size = size


@pytest.mark.parametrize("sparsity", [JointTopK(8), BatchTopK(8), JumpReLU()], ids=["joint", "batch", "jump"])
@pytest.mark.parametrize(("n_ranks", "n_feature"), [(1, 1), (4, 1), (4, 2), (4, 4), (8, 4)])
def test_bytes_are_those_of_rings(n_ranks, n_feature, sparsity):
    settings, layout, dense = (
        config(batch_tokens=64, sparsity=sparsity),
        Layout(n_ranks, n_feature),
        sparsity == JumpReLU(),
    )
    found, n_data = plan_mesh(settings, D, layout, MACHINE, MODEL), n_ranks // n_feature
    tokens, share = 64 // n_data, settings.auxk.token_share
    reconstructions = int(tokens * 5 * D * 4 * (1 + share)) if dense else 0
    assert found.sent["reconstructions"] == pytest.approx(ring_bytes(n_feature, reconstructions, reduced=True))
    told = 0 if dense else 12 * int(tokens * (8 + share * settings.auxk.k)) + 4 * 5 * 48
    assert found.sent["active features"] == pytest.approx(ring_bytes(n_feature, told, reduced=False))
    scores = n_feature * tokens * 8 * 4 if sparsity == JointTopK(8) else 0
    counts = 3 * 2048 * 8 if sparsity == BatchTopK(8) else 0
    selection = ring_bytes(n_feature, scores, reduced=False) + ring_bytes(n_feature, counts, reduced=True)
    assert found.sent["candidates"] == pytest.approx(selection)
    assert found.sent["gradients"] == pytest.approx(ring_bytes(n_data, found.local.gradients, reduced=True))
    reads_and_writes = tokens * 5 * D * 2 * MODEL.bytes_a_number
    assert found.sent["activations"] == pytest.approx(ring_bytes(n_feature, reads_and_writes, reduced=False))
    assert found.sent["language model"] == 0


def test_computing_is_shared_out():
    settings = config(batch_tokens=64, sparsity=JointTopK(8))
    alone, shared = (plan_mesh(settings, D, layout, MACHINE, MODEL) for layout in (Layout(1), Layout(4, 2)))
    for name in ("language model", "encoder products", "sums of active rows", "selection"):
        assert shared.computing[name] == pytest.approx(alone.computing[name] / 4)
    n = shared.local.n_parameters / alone.local.n_parameters
    assert shared.computing["parameters"] == pytest.approx(alone.computing["parameters"] * n, rel=0.01)


def test_one_rank_costs_what_one_process_costs():
    settings = config()
    found = plan_mesh(settings, D, Layout(1), MACHINE, MODEL)
    assert found.local == plan(settings, D)
    assert sum(found.sent.values()) == 0
    capture = settings.batch_tokens * MODEL.forward_flops / MACHINE.forward_flops
    alone = plan(settings, D, RATES).seconds
    assert alone is not None
    assert found.seconds == pytest.approx(capture + alone * settings.batch_tokens / settings.tokens)


def test_a_ring_that_leaves_its_node_goes_at_the_speed_of_the_slowest_link():
    inside, outside = (plan_mesh(config(sparsity=JumpReLU()), D, Layout(n, n), MACHINE, MODEL) for n in (4, 8))
    for found, speed in ((inside, MACHINE.within), (outside, MACHINE.between)):
        assert found.sending["reconstructions"] == pytest.approx(found.sent["reconstructions"] / speed)


def test_a_sharded_model_takes_its_share_and_is_gathered():
    found = plan_mesh(config(), D, Layout(4, shard_model=True), MACHINE, MODEL)
    assert found.model == MODEL.n_bytes // 4
    assert found.sent["language model"] == ring_bytes(4, MODEL.n_bytes, reduced=False)


def test_the_quickest_is_the_best_of_all_that_fit():
    settings = config(batch_tokens=512)
    everything = [
        plan_mesh(replace(settings, micro_batches=m), D, Layout(4, n, shard), MACHINE, MODEL)
        for n in (1, 2, 4)
        for shard in (False, True)
        for m in (1, 2, 4, 8, 16, 32)
    ]
    room = sorted(found.memory for found in everything)[len(everything) // 3]
    machine = replace(MACHINE, memory=room)
    best = max((found for found in everything if fits(found, machine)), key=lambda found: found.tokens_a_second)
    found = quickest(settings, D, 4, machine, MODEL)
    assert found is not None
    assert found.tokens_a_second == best.tokens_a_second
    assert fits(found, machine)
    assert quickest(settings, D, 4, replace(MACHINE, memory=10), MODEL) is None


def test_layouts_that_cannot_be_are_refused_with_what_can():
    with pytest.raises(UserError, match="8 ranks cannot be split into groups of 3"):
        Layout(8, 3)
    with pytest.raises(UserError, match="d_transcoder is 48, which 5 feature ranks cannot share evenly"):
        share_of_a_rank(config(), D, Layout(5, 5))
    with pytest.raises(UserError, match="muon works on whole matrices"):
        share_of_a_rank(config(optimizer=Muon()), D, Layout(2, 2))


def test_the_quickest_is_one_that_can_be_trained():
    found = quickest(config(optimizer=Muon()), D, 4, MACHINE, MODEL)
    assert found is not None
    assert found.layout.n_feature == 1


def test_products_in_half_precision_are_quicker_on_an_h100():
    assert h100("bf16").rates.product_flops > h100("fp32").rates.product_flops
