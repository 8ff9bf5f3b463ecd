"""Every variant goes on from its state on disk to the weights, densities and figures of an unbroken training, bit for
bit; and micro-batches change neither the step nor its schedule."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from crosslayer import (
    KL,
    Adam,
    AdamW,
    AuxK,
    BatchTopK,
    CrossEntropy,
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
from crosslayer.replacement.end_to_end import EndToEnd
from crosslayer.training.objective import Reconstruction
from crosslayer.training.scales import estimate_scales
from crosslayer.training.state import StateFile
from crosslayer.training.stream import Place
from crosslayer.training.trainer import Trainer
from making import random_activations, text_examples

L, D, F, BATCH = 3, 8, 24, 64
STOP, STEPS = 3, 7
CPU, CONTEXT = torch.device("cpu"), {"model": "m"}
SCALES = estimate_scales(random_activations(1000, L, D, seed=99))

VARIANTS = {
    "JointTopK": {},
    "TopK": {"sparsity": TopK(3, anneal_share=0.8)},
    "BatchTopK": {"sparsity": BatchTopK(6, anneal_share=0.8)},
    "GroupMax": {"sparsity": GroupMax(4)},
    "ReLU": {"sparsity": ReLU(1e-2)},
    "JumpReLU": {"sparsity": JumpReLU(1e-2)},
    "JumpReLU, quadratic": {"sparsity": JumpReLU(quadratic_coefficient=0.1, target_l0=6.0)},
    "Full, scale, offset": {"decoder": Full(scale=True, offset=True)},
    "SourceTied, scale": {"decoder": SourceTied(scale=True)},
    "TargetTied": {"decoder": TargetTied()},
    "TargetTied, coalesced": {"decoder": TargetTied(topk_coalesced=4)},
    "SourceAndTargetTied": {"decoder": SourceAndTargetTied()},
    "LowRank": {"decoder": LowRank(rank=2)},
    "a target without sources": {"wiring": Wiring.full(L, first_target=1), "decoder": TargetTied()},
    "PLT": {"wiring": Wiring.per_layer(L)},
    "skip": {"skip": Wiring.per_layer(L)},
    "skip pairs": {"skip": Wiring.full(L, first_target=1)},
    "AdamW": {"optimizer": AdamW(weight_decay=0.1)},
    "Muon": {"optimizer": Muon()},
    "Muon on much": {"optimizer": Muon(), "decoder": LowRank(rank=2, offset=True), "skip": Wiring.full(L)},
    "bf16": {"precision": "bf16"},
    "bf16, GroupMax": {"precision": "bf16", "sparsity": GroupMax(4)},
    "bf16, JumpReLU": {"precision": "bf16", "sparsity": JumpReLU(1e-2)},
    "bf16, TopK": {"precision": "bf16", "sparsity": TopK(3)},
    "bf16, BatchTopK": {"precision": "bf16", "sparsity": BatchTopK(6)},
    "micro-batches": {"micro_batches": 3},
    "micro-batches, BatchTopK": {"micro_batches": 3, "sparsity": BatchTopK(6)},
    "everything": {
        "sparsity": BatchTopK(6, anneal_share=0.8),
        "decoder": TargetTied(4, scale=True, offset=True),
        "skip": Wiring(L, 2),
        "optimizer": Muon(),
        "precision": "bf16",
        "micro_batches": 2,
    },
}


def config(**settings) -> TrainConfig:
    """Warm-up and annealing last beyond step STOP, and dead features are lifted by both means."""
    defaults = {"wiring": Wiring.full(L), "sparsity": JointTopK(6, anneal_share=0.8), "tokens": STEPS * BATCH}
    shares = {"warmup_share": 0.6, "decay_share": 0.2, "dead_density": 0.02, "density_tokens": BATCH}
    revival = {"auxk": AuxK(k=4), "dead_penalty": DeadPenalty(1e-3)}
    return TrainConfig(d_transcoder=F, learning_rate=1e-2, **{**defaults, **shares, **revival, **settings})


def batch(number: int) -> Activations:
    activations = random_activations(BATCH + BATCH // 7 + 1, L, D, seed=number)
    return activations[activations.position > 0][:BATCH]


def trained(trainer: Trainer) -> Trainer:
    """The same trainer, with some features of layer 1 so far down that they are dead from the second step on."""
    trainer.coder.b_enc[1].data[:4] = -10.0
    return trainer


def assert_same_state(one: Trainer, other: Trainer) -> None:
    """Weights, cut, scales, moments, densities and counters."""
    (ours, counted), (theirs, wanted) = one.state(), other.state()
    assert counted == wanted
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert {"coder.cut", "density", "scales.output_variance"} <= ours.keys()


def assert_resumes(run: Path, build: Callable[..., Trainer], batches: list) -> None:
    """Stopped after STOP of the batches and restored from the file, a training ends as if it had never stopped."""
    whole, first = trained(build(SCALES)), trained(build(SCALES))
    wanted = [whole.step(b) for b in batches]
    assert [first.step(b) for b in batches[:STOP]] == wanted[:STOP]
    assert min(m.dead_fraction for m in wanted[1:]) > 0
    states = StateFile(run, CONTEXT)
    states.save(first, Place(1, 2))
    kept = states.load(first.config, CPU)
    second = build(kept.scales).restore(kept.tensors, kept.counters)
    assert_same_state(second, first)
    assert kept.place == Place(1, 2)
    assert [second.step(b) for b in batches[STOP:]] == wanted[STOP:]
    assert_same_state(second, whole)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_training_stopped_half_way_goes_on_from_the_file_bit_for_bit(settings, tmp_path):
    assert_resumes(tmp_path, lambda scales: Trainer(config(**settings), scales), [batch(i) for i in range(STEPS)])


@pytest.mark.parametrize("sparsity", [None, JointTopK(6), BatchTopK(6), JumpReLU()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("decoder", [Full(), SourceTied(scale=True), TargetTied()], ids=lambda d: type(d).__name__)
def test_a_finetuning_stopped_half_way_goes_on_from_the_file_bit_for_bit(sparsity, decoder, tmp_path):
    first = Trainer(config(decoder=decoder), SCALES)
    first.step(batch(50))
    start = first.finish(batch(51))

    def build(scales):
        return Trainer(config(sparsity=sparsity, decoder=decoder), scales, start=deepcopy(start))

    assert_resumes(tmp_path, build, [batch(i) for i in range(STEPS)])


@pytest.mark.parametrize("loss", [KL(fvu_weight=0.5), CrossEntropy()], ids=lambda loss: type(loss).__name__)
def test_an_end_to_end_training_stopped_half_way_goes_on_from_the_file_bit_for_bit(llama, loss, tmp_path):
    settings = config(sparsity=TopK(3, anneal_share=0.8), loss=loss, tokens=220, density_tokens=16)
    scales = estimate_scales(random_activations(500, L, llama.d_model))

    def build(_):
        inner = Reconstruction(scales.output_variance, settings.auxk, settings.dead_penalty)
        return Trainer(settings, scales, EndToEnd(llama, loss, inner))

    assert_resumes(tmp_path, build, [text_examples(20)[2 * i : 2 * i + 2] for i in range(STEPS)])


def test_the_trainings_above_are_stopped_while_k_and_the_learning_rate_still_move():
    at_stop, settings = STOP / STEPS, config()
    assert 0 < settings.schedule(at_stop) < settings.schedule(at_stop + 1 / STEPS)
    assert settings.sparsity.at(at_stop).k > settings.sparsity.at(at_stop + 1 / STEPS).k > 6
    assert type(settings.optimizer) is Adam


QUIET = {"auxk": AuxK(coefficient=0.0), "dead_penalty": DeadPenalty(0.0)}


@pytest.mark.parametrize("n", [3, 1000])
@pytest.mark.parametrize("settings", [{}, {"sparsity": TopK(3)}, {"sparsity": JumpReLU()}, {"skip": Wiring.full(L)}])
def test_micro_batches_make_the_same_step(settings, n):
    one, many = (Trainer(config(micro_batches=n, **QUIET, **settings), SCALES) for n in (1, n))
    for number in range(3):
        many.coder.load_state_dict(one.coder.state_dict())  # the next step, not what rounding made of the last
        tokens = batch(number)[:20]  # an uneven third, and fewer than there are parts
        whole, parts = one.step(tokens), many.step(tokens)
        assert parts.fvu == pytest.approx(whole.fvu, rel=1e-5)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
        assert parts.terms == pytest.approx(whole.terms, rel=1e-5)
        assert (parts.l0, parts.dead_fraction) == (whole.l0, whole.dead_fraction)
        for ours, theirs in zip(many.coder.parameters(), one.coder.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)
    assert torch.equal(one.density, many.density)


@pytest.mark.parametrize("sparsity", [JointTopK(6), BatchTopK(6), ReLU()], ids=lambda s: type(s).__name__)
def test_micro_batches_change_no_schedule(sparsity):
    one, many = (Trainer(config(micro_batches=n, sparsity=sparsity), SCALES) for n in (1, 3))
    whole, parts = ([coach.step(batch(i)) for i in range(STEPS)] for coach in (one, many))
    assert [(m.step, m.tokens, m.learning_rate) for m in parts] == [(m.step, m.tokens, m.learning_rate) for m in whole]
    assert len({m.learning_rate for m in parts}) > 4
    for coach in (one, many):
        steps = [t for name, t in coach.state()[0].items() if name.startswith("optimizer") and name.endswith(".step")]
        assert steps
        assert {int(t) for t in steps} == {STEPS}
