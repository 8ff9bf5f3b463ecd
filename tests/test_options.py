"""Options of `crosslayer train`: what they stand for, and what does not go together."""

from dataclasses import asdict
from pathlib import Path

import pytest

from crosslayer import (
    FVU,
    KL,
    BatchTopK,
    Full,
    JointTopK,
    JumpReLU,
    LowRank,
    Muon,
    ReLU,
    TargetTied,
    TopK,
    TrainConfig,
    UserError,
    Wiring,
)
from crosslayer.options import TrainOptions
from making import finished_coder


def config(start=None, seed=0, **options) -> TrainConfig:
    return TrainOptions(model="m", data="d", out=Path("run"), **options).config(4, start, seed)


def test_without_options_it_is_the_default_training():
    assert asdict(config()) == asdict(TrainConfig(wiring=Wiring.full(4)))


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({"span": 2}, "wiring", Wiring(4, 2)),
        ({"first_target": 1}, "wiring", Wiring.full(4, 1)),
        ({"k": 5}, "sparsity", BatchTopK(5)),
        ({"sparsity": "topk"}, "sparsity", TopK(8)),
        ({"sparsity": "joint-topk"}, "sparsity", JointTopK(64)),
        ({"sparsity": "batch-topk", "anneal_share": 0.0}, "sparsity", BatchTopK(64, anneal_share=0.0)),
        ({"sparsity": "relu", "penalty": 0.5}, "sparsity", ReLU(0.5)),
        ({"sparsity": "jumprelu", "target_l0": 9.0}, "sparsity", JumpReLU(target_l0=9.0, quadratic_coefficient=1.0)),
        ({"rank": 2}, "decoder", LowRank(rank=2)),
        ({"topk_coalesced": 3}, "decoder", TargetTied(topk_coalesced=3)),
        ({"pair_scale": True, "pair_offset": True}, "decoder", Full(scale=True, offset=True)),
        ({"skip": "own"}, "skip", Wiring.per_layer(4)),
        ({"skip": "pairs", "span": 2}, "skip", Wiring(4, 2)),
        ({}, "loss", FVU()),
        ({"loss": "kl", "fvu_weight": 1.0}, "loss", KL(fvu_weight=1.0)),
        ({"optimizer": "muon"}, "optimizer", Muon()),
    ],
)
def test_an_option_is_the_setting_it_stands_for(options, name, value):
    assert getattr(config(**options), name) == value


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank": 2, "decoder": "full"}, "decoder full has no setting rank"),
        ({"topk_coalesced": 2, "decoder": "source-tied"}, "decoder source-tied has no setting topk_coalesced"),
        ({"sparsity": "relu", "k": 3}, "sparsity relu has no setting k"),
        ({"penalty": 0.1}, "sparsity batch-topk has no setting coefficient"),
        ({"fvu_weight": 1.0}, "loss fvu has no setting fvu_weight"),
        ({"skip": "all"}, "skip is 'all'; choose own or pairs"),
        ({"loss": "mse"}, "loss is 'mse'; choose one of fvu, kl, ce"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'"),
        ({"precision": "fp16"}, "precision is 'fp16'"),
        ({"sparsity": "relu", "topk_coalesced": 4}, "topk_coalesced"),
        ({"sparsity": "joint-topk", "calibrate": False}, "calibrate is off with JointTopK"),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_name(options, named):
    with pytest.raises(UserError, match=named):
        config(**options)


def test_a_finetuning_takes_the_architecture_of_its_start():
    start = finished_coder(Wiring(4, 2), F=24)
    asked = config(start, learning_rate=0.1)
    assert (asked.wiring, asked.d_transcoder, asked.decoder, asked.skip) == (start.wiring, 24, Full(), None)
    assert asked.sparsity is None
    assert config(start, sparsity="topk", k=3).sparsity == TopK(3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"span": 2}, "--span is given, but --finetune"),
        ({"pair_offset": True}, "--pair-offset is given, but --finetune"),
        ({"k": 4}, "--k is given without --sparsity"),
    ],
)
def test_a_finetuning_refuses_another_architecture(options, named):
    with pytest.raises(UserError, match=named):
        config(finished_coder(Wiring(4, 2)), **options)
