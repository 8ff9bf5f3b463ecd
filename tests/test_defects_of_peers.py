"""Defects that other transcoder libraries have had, each with the test that would have caught it.

Those that other files cover already: shapes and values where no feature is active, at once and layer by layer, a
checkpoint that keeps skip and bank (test_decoders), optimisers' moments after a resume (test_every_variant_resumes),
penalties, AuxK and the dead features' penalty that do not grow with the batch (test_sparsity, test_revival), a local
path that is no run or no model (test_checkpoint, test_load), one layer of a BatchTopK before its first step
(test_sparsity), tensors or settings too many in a run (test_checkpoint), and inputs and targets that are no number for
four of the sparsities (test_trainer).
"""

from copy import deepcopy
from dataclasses import fields, replace
from functools import cache, partial

import pytest
import torch

from crosslayer import (
    FVU,
    KL,
    Adam,
    Adam8bit,
    AdamW,
    AuxK,
    BatchTopK,
    CrossEntropy,
    CrossLayerTranscoder,
    DeadPenalty,
    Full,
    GroupMax,
    JointTopK,
    JumpReLU,
    LowRank,
    Muon,
    ReLU,
    ReplacementModel,
    SourceAndTargetTied,
    SourceTied,
    TargetTied,
    TopK,
    TrainConfig,
    UserError,
    Wiring,
    load_model,
    train,
    workflow,
)
from crosslayer.activations.capture import ModelSource
from crosslayer.activations.record import Activations
from crosslayer.coders import checkpoint
from crosslayer.coders.decoders import DECODERS
from crosslayer.coders.sparsity import KINDS
from crosslayer.coders.transcoder import Provenance
from crosslayer.replacement.end_to_end import EndToEnd
from crosslayer.team import Group
from crosslayer.training.losses import LOSSES
from crosslayer.training.objective import Reconstruction
from crosslayer.training.optimizers import OPTIMIZERS
from crosslayer.training.scales import estimate_scales
from crosslayer.training.trainer import StepMetrics, Trainer
from making import random_activations, text_examples

L, D, F, BATCH = 3, 8, 24, 64
SCALES = estimate_scales(random_activations(1000, L, D, seed=99))
SPARSITIES = [
    JointTopK(6),
    TopK(3),
    BatchTopK(6),
    GroupMax(4),
    ReLU(1e-2),
    JumpReLU(1e-2),
    JumpReLU(quadratic_coefficient=0.1, target_l0=6.0),
]
BANKS = [
    Full(),
    Full(scale=True, offset=True),
    SourceTied(scale=True),
    TargetTied(),
    TargetTied(topk_coalesced=4),
    SourceAndTargetTied(),
    LowRank(rank=2),
]

sparsities = pytest.mark.parametrize("sparsity", SPARSITIES, ids=lambda s: type(s).__name__)
banks = pytest.mark.parametrize("decoder", BANKS, ids=str)


def together(*sparsities):
    """Every sparsity with every bank that it goes with: coalesced TopK is for sparse codes."""
    pairs = [
        pytest.param(sparsity, decoder, id=f"{type(sparsity).__name__}, {decoder}")
        for sparsity in sparsities
        for decoder in BANKS
        if not (isinstance(sparsity, ReLU | JumpReLU) and getattr(decoder, "topk_coalesced", None))
    ]
    return pytest.mark.parametrize(("sparsity", "decoder"), pairs)


def config(**settings) -> TrainConfig:
    """Everything is switched on, and features die within a few steps."""
    defaults = {"wiring": Wiring.full(L), "sparsity": JointTopK(6), "tokens": 10 * BATCH}
    width = {"d_transcoder": F, "learning_rate": 1e-2}
    revival = {"auxk": AuxK(k=4), "dead_penalty": DeadPenalty(1e-2), "dead_density": 0.05, "density_tokens": BATCH}
    return TrainConfig(**{**defaults, **width, **revival, **settings})


def trainer(**settings) -> Trainer:
    return Trainer(config(**settings), SCALES)


def batch(number: int) -> Activations:
    activations = random_activations(BATCH + BATCH // 7 + 1, L, D, seed=number)
    return activations[activations.position > 0][:BATCH]


def trained(coach: Trainer, steps: int = 6) -> Trainer:
    for number in range(steps):
        coach.step(batch(number))
    return coach


def kept(coach: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in coach.state()[0].items()}


def assert_kept(coach: Trainer, before: dict[str, torch.Tensor]) -> None:
    assert [name for name, tensor in coach.state()[0].items() if not torch.equal(tensor, before[name])] == []


# NaN at the second step, from the norm of a write vector of length 0.


@together(ReLU(1.0), JumpReLU(1.0), TopK(3))
def test_write_vectors_of_length_0_are_trained_on(sparsity, decoder):
    coach = trainer(sparsity=sparsity, decoder=decoder, warmup_share=0.0)
    vectors = [p for name, p in coach.coder.decoder.named_parameters() if name.startswith("W_")]
    for parameter in vectors:
        parameter.data.zero_()
    for number in range(4):
        assert torch.tensor(coach.step(batch(number)).loss).isfinite()
        assert all(p.isfinite().all() for p in coach.coder.parameters())
    assert any(parameter.any() for parameter in vectors)


# Settings silently ignored.

SMALL = TrainConfig(
    wiring=Wiring.full(3), sparsity=TopK(3), expansion=1, tokens=700, batch_tokens=100, calibration_tokens=200,
    auxk=AuxK(k=4), dead_penalty=DeadPenalty(1e-2), dead_density=0.02, density_tokens=60,
)  # fmt: skip
OTHER = {
    "wiring": Wiring.per_layer(3),
    "sparsity": TopK(4),
    "decoder": SourceTied(),
    "skip": Wiring.per_layer(3),
    "loss": KL(),
    "d_transcoder": 24,
    "expansion": 2,
    "tokens": 800,
    "batch_tokens": 150,
    "micro_batches": 3,
    "precision": "bf16",
    "optimizer": AdamW(),
    "learning_rate": 0.01,
    "warmup_share": 0.5,
    "decay_share": 0.5,
    "auxk": AuxK(k=3),
    "dead_penalty": DeadPenalty(1.0),
    "dead_density": 0.2,
    "density_tokens": 500,
    "calibration_tokens": 100,
    "calibrate": False,
    "seed": 1,
}


@pytest.fixture(scope="module")
def outcome(llama, tmp_path_factory):
    """The weights that a training comes to."""

    def run(settings: TrainConfig) -> bytes:
        folder = tmp_path_factory.mktemp("runs") / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workflow, "ModelSource", partial(ModelSource, chunk_prompts=30))
            train(llama, text_examples(30), settings, folder)
        return (folder / "model.safetensors").read_bytes()

    return run


@pytest.fixture(scope="module")
def usual(outcome) -> bytes:
    assert outcome(SMALL) == outcome(SMALL)
    return outcome(SMALL)


def test_no_setting_is_forgotten_below():
    assert OTHER.keys() == TrainConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize("name", OTHER)
def test_every_setting_of_a_training_changes_it(outcome, usual, name):
    assert outcome(replace(SMALL, **{name: OTHER[name]})) != usual


PARTS = {
    AuxK: ("auxk", AuxK(k=4), {"k": 3, "coefficient": 1.0, "token_share": 0.5}),
    DeadPenalty: ("dead_penalty", DeadPenalty(0.1), {"coefficient": 0.2, "token_share": 1.0}),
    JointTopK: ("sparsity", JointTopK(6), {"k": 7, "anneal_from": 2.0, "anneal_share": 1.0}),
    TopK: ("sparsity", TopK(3), {"k": 4, "anneal_from": 2.0, "anneal_share": 1.0}),
    BatchTopK: ("sparsity", BatchTopK(6), {"k": 7, "anneal_from": 2.0, "anneal_share": 1.0, "cut_decay": 0.5}),
    GroupMax: ("sparsity", GroupMax(4), {"k": 6, "anneal_from": 2.0, "anneal_share": 1.0}),
    ReLU: ("sparsity", ReLU(), {"coefficient": 0.1}),
    JumpReLU: (
        "sparsity",
        JumpReLU(quadratic_coefficient=0.1),
        {
            "coefficient": 0.1,
            "steepness": 1.0,
            "bandwidth": 0.1,
            "initial_threshold": 0.3,
            "preactivation_coefficient": 0.1,
            "quadratic_coefficient": 0.2,
            "target_l0": 3.0,
        },
    ),
    Full: ("decoder", Full(), {"scale": True, "offset": True}),
    SourceTied: ("decoder", SourceTied(), {"scale": True, "offset": True}),
    TargetTied: ("decoder", TargetTied(), {"scale": True, "offset": True, "topk_coalesced": 2}),
    SourceAndTargetTied: ("decoder", SourceAndTargetTied(), {"scale": True, "offset": True}),
    LowRank: ("decoder", LowRank(), {"scale": True, "offset": True, "rank": 2}),
    Adam: ("optimizer", Adam(), {"beta1": 0.5, "beta2": 0.9}),
    AdamW: ("optimizer", AdamW(), {"beta1": 0.5, "beta2": 0.9, "weight_decay": 1.0}),
    Muon: ("optimizer", Muon(), {"momentum": 0.5}),
    KL: ("loss", KL(), {"weight": 2.0, "fvu_weight": 1.0}),
    CrossEntropy: ("loss", CrossEntropy(), {"weight": 2.0, "fvu_weight": 1.0}),
}
REFUSED = [(GroupMax, "anneal_from"), (GroupMax, "anneal_share"), (LowRank, "scale")]
SETTINGS = [(part, setting) for part, (_, _, others) in PARTS.items() for setting in others]


def test_no_setting_of_a_part_is_forgotten_above():
    known = {*KINDS.values(), *DECODERS.values(), *OPTIMIZERS.values(), *LOSSES.values(), AuxK, DeadPenalty}
    assert PARTS.keys() == known - {FVU, Adam8bit}
    for part, (_, _, others) in PARTS.items():
        assert others.keys() == {field.name for field in fields(part)}


@pytest.fixture(scope="module")
def end(llama):
    """What a training measures at its last step, and the weights that it comes to."""
    scales = estimate_scales(random_activations(300, L, llama.d_model))

    @cache
    def run(name: str, part) -> tuple[StepMetrics, dict[str, torch.Tensor]]:
        if name == "loss":
            settings = config(loss=part, sparsity=TopK(3))
            inner = Reconstruction(scales.output_variance, settings.auxk, settings.dead_penalty)
            coach, batches = Trainer(settings, scales, EndToEnd(llama, part, inner)), [text_examples(4)] * 2
        else:
            coach, batches = trainer(**{name: part}), [batch(number) for number in range(6)]
        return [coach.step(b) for b in batches][-1], coach.coder.state_dict()

    return run


@pytest.mark.parametrize(("part", "setting"), [each for each in SETTINGS if each not in REFUSED])
def test_every_setting_of_a_part_changes_the_training(end, part, setting):
    name, usual, others = PARTS[part]
    (metrics, weights), (others, theirs) = end(name, usual), end(name, replace(usual, **{setting: others[setting]}))
    changed = [key for key in weights.keys() & theirs.keys() if not torch.equal(weights[key], theirs[key])]
    assert changed or metrics != others


@pytest.mark.parametrize(("part", "setting"), REFUSED)
def test_settings_that_a_part_cannot_use_are_refused(part, setting):
    _, usual, others = PARTS[part]
    with pytest.raises(UserError, match=f"{setting} is "):
        replace(usual, **{setting: others[setting]})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"wiring": Wiring.per_layer(L)}, "the start has wiring"),
        ({"d_transcoder": 2 * F}, f"the start has d_transcoder {F}, the settings {2 * F}"),
        ({"d_transcoder": None, "expansion": 2}, f"the start has d_transcoder {F}, the settings 16"),
        ({"skip": Wiring.per_layer(L)}, "the start has skip None"),
        ({"decoder": SourceTied()}, "the start's decoder is Full"),
    ],
)
def test_a_finetuning_refuses_another_architecture_than_its_starts(settings, named):
    start = trained(trainer(), 1).finish(batch(50))
    with pytest.raises(UserError, match=named):
        Trainer(config(sparsity=None, **settings), SCALES, start=start)


@pytest.mark.parametrize("sparsity", [ReLU(), JumpReLU()], ids=lambda s: type(s).__name__)
def test_a_coalesced_bank_refuses_a_sparsity_that_it_could_not_choose_from(sparsity):
    with pytest.raises(UserError, match=f"topk_coalesced is set with {type(sparsity).__name__}, .* use it with a topk"):
        config(sparsity=sparsity, decoder=TargetTied(topk_coalesced=4))


# What a loaded transcoder does, by another sparsity than it was trained with.


@sparsities
def test_a_finished_transcoder_is_loaded_with_the_codes_that_it_was_saved_with(sparsity, tmp_path):
    coach, x = trained(trainer(sparsity=sparsity)), batch(60).x
    finished = coach.finish(batch(50))
    finished.save(tmp_path)
    loaded = CrossLayerTranscoder.load(tmp_path)
    for ours, theirs in zip(loaded.encode(x), finished.encode(x), strict=True):
        assert torch.equal(ours.dense(), theirs.dense())


@pytest.mark.parametrize(
    "sparsity",
    [JointTopK(6), TopK(3), BatchTopK(6), GroupMax(4), ReLU(), JumpReLU()],
    ids=lambda s: type(s).__name__,
)
def test_a_finished_transcoder_is_as_sparse_as_it_was_in_training(sparsity):
    coach, x = trained(trainer(sparsity=sparsity), 10), batch(50).x
    codes = [coder.encode(x) for coder in (coach.finish(batch(50)), coach.coder.eval())]
    finished, in_training = (sum(int(c.counts().sum()) for c in each) for each in codes)
    assert finished == pytest.approx(in_training, rel=0.03)


@pytest.mark.parametrize(
    "sparsity",
    [TopK(3), GroupMax(4), ReLU()],
    ids=lambda s: type(s).__name__,
)
def test_a_finished_transcoder_that_keeps_its_sparsity_encodes_as_it_did_in_training(sparsity):
    coach, x = trained(trainer(sparsity=sparsity, calibrate=False)), batch(60).x
    finished, in_training = coach.finish(batch(50)), coach.coder.eval()
    assert finished.sparsity == sparsity
    for layer in range(L):
        codes = [coder.encode_layer(layer, x[:, layer]).dense() for coder in (finished, in_training)]
        torch.testing.assert_close(*codes, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sparsity", [*SPARSITIES[:5], JumpReLU()], ids=lambda s: type(s).__name__)
def test_an_unfinished_transcoder_is_loaded_as_the_sparsity_that_it_has(sparsity, tmp_path):
    coder, x = trained(trainer(sparsity=sparsity)).coder.eval(), batch(60).x
    coder.input_scale = coder.output_scale = None
    if isinstance(sparsity, JumpReLU):
        coder.with_thresholds(torch.rand(L, F))
    coder.save(tmp_path)
    loaded = CrossLayerTranscoder.load(tmp_path).eval()
    assert type(loaded.sparsity) is type(sparsity)
    assert torch.equal(loaded(x), coder(x))
    assert torch.equal(loaded.cut, coder.cut)


# No active feature at the last position, or none at all.


def silenced(coach: Trainer, part: Activations, tokens: slice) -> Activations:
    """The batch with some tokens at which no feature is active: their x is 0 and no bias is positive."""
    for b in coach.coder.b_enc:
        b.data.fill_(-1e-3)
    part.x[tokens] = 0.0
    return part


@pytest.mark.parametrize("tokens", [slice(-1, None), slice(None)], ids=["last", "all"])
@together(*SPARSITIES[:4], JumpReLU())
def test_tokens_without_active_features_are_trained_on(sparsity, decoder, tokens):
    coach = trainer(sparsity=sparsity, decoder=decoder)
    part = silenced(coach, batch(0), tokens)
    coder = deepcopy(coach.coder)
    y = coder(part.x)
    assert y.shape == part.y.shape
    assert torch.equal(y[tokens], (coder.b_dec * coder.output_scale[:, None]).expand_as(y)[tokens])
    assert coach.step(part).l0 == 0 or tokens != slice(None)
    assert all(p.isfinite().all() for p in coach.coder.parameters())


def test_a_batch_without_active_features_leaves_a_batch_topk_its_threshold():
    coach = trained(trainer(sparsity=BatchTopK(6)))
    before = coach.coder.cut.clone()
    coach.step(silenced(coach, batch(0), slice(None)))
    assert 0 < coach.coder.cut <= before


@banks
def test_a_model_whose_features_are_all_silent_generates_from_the_biases(llama, decoder):
    """Whatever the bank, as its features write nothing."""
    coders = [CrossLayerTranscoder(Wiring.full(3), 32, F, TopK(3), bank).initialise(0) for bank in (decoder, Full())]
    for coder in coders:
        coder.with_thresholds(torch.full((3, F), torch.inf)).requires_grad_(False)
        coder.b_dec.copy_(torch.linspace(-1, 1, 96).view(3, 32))
        coder.provenance = Provenance("tiny")
    texts = [ReplacementModel(llama, coder).generate("a cat and a", max_new_tokens=4) for coder in coders]
    assert texts[0] == texts[1]


# Scales estimated from one batch.


def test_scales_are_those_of_a_whole_chunk(llama, tmp_path, monkeypatch):
    seen = []

    def remember(activations: Activations, tokens: Group):
        seen.append(activations)
        return estimate_scales(activations, tokens)

    source = partial(ModelSource, chunk_prompts=60)
    monkeypatch.setattr(workflow, "ModelSource", source)
    monkeypatch.setattr(workflow, "estimate_scales", remember)
    train(llama, text_examples(60), replace(SMALL, tokens=100, batch_tokens=50), tmp_path / "run")
    (found,), chunk = seen, source(llama, text_examples(60)).chunk(0)
    assert torch.equal(found.x, chunk.x)
    assert len(chunk) > 10 * 50


# A relative local path sent to the hub.


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """Whoever asks the hub fails; the working folder is empty."""

    def refuse(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(checkpoint, "snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", ["x", "./x", "../x", "./runs/x", "runs/deep/x", "~/x", "/no/x"])
def test_a_path_that_is_no_run_is_not_asked_of_the_hub(no_hub, path):
    with pytest.raises(UserError, match=f"^{path}: no such run; give the folder that `crosslayer train --out` wrote"):
        CrossLayerTranscoder.load(path)


def test_a_path_into_a_folder_that_exists_is_not_asked_of_the_hub(no_hub):
    (no_hub / "runs").mkdir()
    with pytest.raises(UserError, match=r"^runs/missing: no such run"):
        CrossLayerTranscoder.load("runs/missing")


def test_what_could_be_a_path_or_a_hub_id_is_named_as_both(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^runs/missing: no such run on disk, and the hub did not give it") as raised:
        CrossLayerTranscoder.load("runs/missing")
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"^models/missing: no such model, or it cannot be loaded"):
        load_model("models/missing")


# BatchTopK without a threshold at inference.


def test_a_finished_batch_topk_has_thresholds_and_needs_no_batch(tmp_path):
    coach = trained(trainer(sparsity=BatchTopK(6)))
    finished, x = coach.finish(batch(50)), batch(60).x
    assert 0 < finished.thresholds.min() <= finished.thresholds.max() < torch.inf
    alone = [finished.encode(token[None])[1].dense() for token in x]
    torch.testing.assert_close(torch.cat(alone), finished.encode(x)[1].dense())
    layer = finished.encode_layer(1, x[:, 1]).dense()
    torch.testing.assert_close(layer, finished.encode(x)[1].dense())


def test_a_batch_topk_that_was_never_trained_is_not_put_in_place(llama):
    coder = CrossLayerTranscoder(Wiring.full(3), 32, F, BatchTopK(6)).initialise(0)
    with pytest.raises(UserError, match="no threshold yet; train it for a step first"):
        ReplacementModel(llama, coder).generate("a cat", max_new_tokens=1)


def test_a_batch_topk_that_was_never_trained_is_not_finished():
    with pytest.raises(UserError, match="no threshold yet"):
        trainer(sparsity=BatchTopK(6)).finish(batch(0))


# What is not a number: named with layer or tensor, at the step where it appears, and nothing has moved.

NEW = {
    **{type(s).__name__: {"sparsity": s} for s in SPARSITIES[2:4]},
    "JumpReLU, quadratic": {"sparsity": SPARSITIES[-1]},
    **{str(bank): {"decoder": bank} for bank in BANKS[1:]},
    "skip": {"skip": Wiring.full(L)},
    "micro-batches": {"micro_batches": 3},
    "bf16": {"precision": "bf16"},
}
variants = pytest.mark.parametrize("settings", NEW.values(), ids=NEW.keys())


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize(("side", "named"), [("x", "input"), ("y", "target")])
@variants
def test_activations_that_are_no_number_are_named(settings, side, named, value):
    coach = trained(trainer(**settings), 2)
    before, bad = kept(coach), batch(2)
    getattr(bad, side)[50, 1, 3] = value
    with pytest.raises(UserError, match=f"step 3: layer 1's {named} is not a finite number"):
        coach.step(bad)
    assert_kept(coach, before)
    assert coach.step_number == 2


@variants
def test_gradients_that_are_no_number_are_named(settings):
    coach = trained(trainer(**settings), 2)
    before = kept(coach)
    for name, parameter in coach.coder.named_parameters():
        spoil = parameter.register_hook(lambda gradient: gradient * torch.nan)
        with pytest.raises(UserError, match=f"step 3: the gradient of {name} is not a finite number"):
            coach.step(batch(2))
        assert_kept(coach, before)
        spoil.remove()
    assert coach.step(batch(2)).step == 3


@variants
def test_weights_that_are_no_number_are_named_as_the_reconstruction(settings):
    coach = trained(trainer(**settings), 2)
    coach.coder.b_dec.data[2, 0] = torch.nan
    with pytest.raises(UserError, match="step 3: layer 2's reconstruction is not a finite number"):
        coach.step(batch(2))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"sparsity": ReLU(1e38)}, "penalty"),
        ({"auxk": AuxK(coefficient=1e39)}, "auxk"),
        ({"dead_penalty": DeadPenalty(1e39)}, "dead_penalty"),
    ],
)
def test_the_term_of_the_loss_that_is_no_number_is_named(settings, named):
    coach = trainer(**settings)
    coach.density.zero_()
    for W in coach.coder.W_dec:
        W.data.mul_(100)
    coach.tokens = 64
    with pytest.raises(UserError, match=f"step 1: the {named} is not a finite number; lower its coefficient"):
        coach.step(batch(0))
