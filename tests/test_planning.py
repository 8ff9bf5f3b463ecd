"""What a training will cost: exact where it is counted, close where it is modelled."""

from dataclasses import replace

import pytest
import torch

from crosslayer import Adam8bit, BatchTopK, Full, JointTopK, LowRank, ReLU, SourceTied, TargetTied, TrainConfig, Wiring
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.models.load import LoadedModel, sketch_model
from crosslayer.models.sites import find_sites
from crosslayer.planning import Rates, estimate, forward_flops, measure_rates, plan, proposals
from families import family
from making import text_examples

RATES = Rates(product_flops=1e9, gathered=1e8, updated=1e7, looked_at=1e8)


def config(**settings) -> TrainConfig:
    return TrainConfig(wiring=Wiring.full(5), **{"d_transcoder": 48, "sparsity": JointTopK(8), **settings})


@pytest.mark.parametrize(
    "decoder", [Full(), Full(scale=True, offset=True), SourceTied(), TargetTied(), LowRank(rank=2)], ids=str
)
@pytest.mark.parametrize("skip", [None, Wiring.per_layer(5)], ids=str)
def test_parameters_are_those_of_the_transcoder(decoder, skip):
    settings = config(decoder=decoder, skip=skip)
    coder = CrossLayerTranscoder(settings.wiring, 16, 48, JointTopK(8), decoder, skip)
    cost = plan(settings, 16)
    assert cost.n_parameters == sum(p.numel() for p in coder.parameters())
    assert (cost.weights, cost.gradients, cost.moments) == tuple(n * cost.n_parameters for n in (4, 4, 8))


def test_a_full_clt_has_the_parameters_of_the_formula():
    L, F, D = 5, 48, 16  # F d L (L + 3) / 2, beside the biases
    assert plan(config(), D).n_parameters == F * D * L * (L + 3) // 2 + L * F + L * D


def test_8_bit_moments_and_micro_batches_take_less():
    cost = plan(config(), 16)
    assert plan(config(optimizer=Adam8bit()), 16).moments == cost.moments // 4
    assert plan(config(micro_batches=4), 16).activations == pytest.approx(cost.activations / 4, rel=0.01)


def test_time_grows_with_tokens_and_width_and_dense_codes():
    def seconds(**settings) -> float:
        found = plan(config(**settings), 16, RATES).seconds
        assert found is not None
        return found

    assert plan(config(), 16).seconds is None
    assert seconds(tokens=2_000_000) == pytest.approx(2 * seconds(tokens=1_000_000))
    assert seconds(d_transcoder=96) > seconds()
    assert seconds(sparsity=ReLU()) > seconds(sparsity=BatchTopK(8))


def test_what_is_proposed_fits_and_the_next_larger_does_not():
    settings = config(batch_tokens=1)
    room = plan(settings, 16).memory * 2 // 3
    window, rank, width = proposals(settings, 16, room)
    span = int(window.removeprefix("--span "))
    assert plan(replace(settings, wiring=Wiring(5, span)), 16).memory <= room
    assert plan(replace(settings, wiring=Wiring(5, span + 1)), 16).memory > room
    assert plan(replace(settings, decoder=LowRank(rank=int(rank.split()[-1]))), 16).memory <= room
    assert plan(replace(settings, d_transcoder=int(width.split()[-1])), 16).memory <= room


def test_micro_batches_are_proposed_first():
    settings = config(batch_tokens=100_000)
    assert proposals(settings, 16, plan(settings, 16).memory * 2 // 3) == ["--micro-batches 2"]


def test_nothing_is_proposed_where_nothing_fits():
    assert proposals(config(), 16, room=10) == []


@pytest.fixture
def sketch(llama, tmp_path):
    llama.model.config.save_pretrained(tmp_path)
    return sketch_model(tmp_path)


def test_a_forward_pass_is_two_operations_a_weight(llama, sketch):
    weights = sum(p.numel() for n, p in llama.body.named_parameters() if "embed" not in n)
    assert forward_flops(sketch) == forward_flops(llama) == 2 * weights


def test_of_experts_those_that_are_used_count():
    model = family("mixtral")
    loaded = LoadedModel("mixtral", "", model, None, find_sites(model), None)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    weights = sum(p.numel() for n, p in model.model.named_parameters() if "embed" not in n)
    assert forward_flops(loaded) == 2 * (weights - experts / 2)  # 2 of 4


def test_a_sketch_is_priced_as_the_model_is(llama, sketch, tmp_path):
    settings = replace(config(), wiring=Wiring.full(3))
    priced, measured = (estimate(m, text_examples(4), settings, tmp_path) for m in (sketch, llama))
    assert priced.model == measured.model
    assert priced.plan.n_parameters == measured.plan.n_parameters
    assert priced.plan.disk == measured.plan.disk
    assert priced.capture_seconds > 0


def test_rates_of_this_machine_are_positive():
    rates = measure_rates(torch.device("cpu"))
    assert min(vars(rates).values()) > 0
