"""Training through the replacement model, against KL and cross-entropy in numpy; and finetuning."""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from crosslayer import (
    KL,
    AuxK,
    BatchTopK,
    CrossEntropy,
    CrossLayerTranscoder,
    DeadPenalty,
    Example,
    JointTopK,
    JumpReLU,
    LoadedModel,
    ReLU,
    ReplacementModel,
    SourceTied,
    TopK,
    TrainConfig,
    UserError,
    Wiring,
    evaluate,
    load_model,
    workflow,
)
from crosslayer import train as run_training
from crosslayer.activations.capture import ModelSource, capture, capture_batch
from crosslayer.activations.usable import usable
from crosslayer.models.prompts import Batch
from crosslayer.replacement.end_to_end import EndToEnd
from crosslayer.training.fit import Interrupted
from crosslayer.training.objective import Outcome, Reconstruction, layer_fvu
from crosslayer.training.part import Part
from crosslayer.training.scales import estimate_scales
from crosslayer.training.state import METRICS, STATE
from crosslayer.training.stream import Place, shuffled_batches
from crosslayer.training.trainer import Trainer
from making import array, text_examples, traces

L, D, F = 3, 32, 24
TERMS = {KL: "kl", CrossEntropy: "ce"}
PROBED = ("W_enc.0", "b_enc.1", "decoder.W_dec.0", "decoder.scale.1", "decoder.offset.2", "b_dec", "W_skip.1")
VARIANCE = torch.tensor([3.0, 5.0, 7.0])
ALIVE = torch.zeros(L, F, dtype=torch.bool)


def exact_norm(self, x: torch.Tensor) -> torch.Tensor:
    return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


@pytest.fixture(params=["llama", "llava"])
def double(request, monkeypatch) -> LoadedModel:
    """A tiny model in float64 throughout; the library's own norm rounds to float32."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    model = load_model(request.getfixturevalue(f"{request.param}_folder"))
    model.model.double()
    return model


def examples(model: LoadedModel) -> list[Example]:
    """Prompts of different lengths; pictures and a response among them where the model sees."""
    shades = [Image.new("RGB", (96, 96), (shade, 60, 255 - shade)) for shade in (10, 240)]
    seen = [Example("red", "describe the picture .", "a cat", image=shades[0]), Example("blue", "a", image=shades[1])]
    return text_examples(3) + (seen if hasattr(model.processor, "image_processor") else [])


def objective(model: LoadedModel, loss: KL | CrossEntropy) -> EndToEnd:
    return EndToEnd(model, loss, Reconstruction(VARIANCE.to(model.model.dtype), AuxK(), DeadPenalty()))


def prepared(model: LoadedModel) -> Batch:
    """All examples as one part, pictures in the model's precision."""
    (part,) = objective(model, KL()).split(examples(model), 1)
    numbers = {name: t.to(model.model.dtype) for name, t in part.inputs.items() if t.is_floating_point()}
    return replace(part, inputs=part.inputs | numbers)


def made(dtype: torch.dtype = torch.double, **settings) -> CrossLayerTranscoder:
    """A random transcoder with scales of its own, in training; its thresholds are fixed where no sparsity is given."""
    torch.manual_seed(4)
    parts = {
        "sparsity": ReLU(),
        "decoder": SourceTied(scale=True, offset=True),
        "skip": Wiring.per_layer(L),
        **settings,
    }
    coder = CrossLayerTranscoder(Wiring.full(L), D, F, **parts).to(dtype).learn_thresholds()
    for parameter in coder.parameters():
        parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    coder.first_write.normal_()
    coder.input_scale, coder.output_scale = torch.rand(2, L, dtype=dtype) + 0.5
    return coder if "sparsity" in settings else coder.with_thresholds(torch.rand(L, F, dtype=dtype) / 2)


def by_hand(model: LoadedModel, coder: CrossLayerTranscoder, part: Batch, loss: KL | CrossEntropy) -> float:
    """The divergence in numpy, position by position: a real token before a real token that is no picture's."""
    with torch.no_grad():
        p = log_probabilities(array(model.model(**part.inputs).logits))
    q = log_probabilities(array(ReplacementModel(model, coder).logits(part)))
    found, (B, P) = [], part.tokens.shape
    for b in range(B):
        for n in range(P - 1):
            if part.attention[b, n] and part.attention[b, n + 1] and not part.image[b, n + 1]:
                kl = (np.exp(p[b, n]) * (p[b, n] - q[b, n])).sum()
                found.append(kl if isinstance(loss, KL) else -q[b, n, int(part.tokens[b, n + 1])])
    return float(np.mean(found))


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def outcome(model: LoadedModel, coder: CrossLayerTranscoder, loss: KL | CrossEntropy, progress: float = 1.0) -> Outcome:
    return objective(model, loss)(coder, prepared(model), progress, ALIVE)


def gradients(loss: torch.Tensor, coder: CrossLayerTranscoder) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(coder.parameters()), retain_graph=True, materialize_grads=True))


# The loss.


@pytest.mark.parametrize("loss", [KL(), CrossEntropy(), KL(weight=0.5)], ids=str)
def test_the_divergence_is_its_definition(double, loss):
    coder, before = made(), traces(double.model)
    found = outcome(double, coder, loss)
    wanted = loss.weight * by_hand(double, coder, prepared(double), loss)
    assert wanted > 0.1
    assert found.terms[TERMS[type(loss)]].item() == pytest.approx(wanted, rel=1e-5)
    assert found.n_tokens == (prepared(double).attention.sum(1) - 1).sum()
    found.loss.backward()
    assert traces(double.model) == before
    assert all(parameter.grad is None for parameter in double.model.parameters())
    assert not [name for name, parameter in coder.named_parameters() if not parameter.grad.any()]


@pytest.mark.parametrize(("loss", "sparsity"), [(KL(), {}), (CrossEntropy(), {"sparsity": ReLU()})], ids=["kl", "ce"])
def test_its_gradient_is_that_of_finite_differences(double, loss, sparsity):
    coder, part, step = made(**sparsity), prepared(double), 1e-6
    term = objective(double, loss)(coder, part, 1.0, ALIVE).terms[TERMS[type(loss)]]
    found = dict(zip(dict(coder.named_parameters()), gradients(term, coder), strict=True))
    for name in PROBED:
        parameter, gradient = coder.get_parameter(name), found[name]
        start, way, ends = parameter.data, torch.randn_like(parameter), []
        way = way / way.norm() + gradient / gradient.norm()
        for side in (step, -step):
            parameter.data = start + side * way
            ends.append(by_hand(double, coder, part, loss))
        parameter.data = start
        assert (gradient * way).sum().item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("fvu_weight", [0.0, 0.25])
@pytest.mark.parametrize("loss", [KL, CrossEntropy])
def test_the_parts_of_the_loss_are_weighted_and_sum_to_it(llama, loss, fvu_weight):
    coder, settings = made(torch.float, sparsity=ReLU(0.1)), loss(weight=0.5, fvu_weight=fvu_weight)
    found = outcome(llama, coder, settings)
    activations, _ = capture_batch(llama, prepared(llama))
    inner = objective(llama, settings).reconstruction(coder, Part.of(activations[usable(activations).keep]), 1.0, ALIVE)
    assert found.terms.keys() == {"fvu", "penalty", TERMS[loss]}
    torch.testing.assert_close(found.loss, sum(found.terms.values()))
    torch.testing.assert_close(found.terms["penalty"], inner.terms["penalty"])
    torch.testing.assert_close(found.terms["fvu"], fvu_weight * inner.fvu)
    torch.testing.assert_close((found.fvu, found.counts), (inner.fvu, inner.counts))
    term = found.terms[TERMS[loss]] + fvu_weight * inner.terms["fvu"] + inner.terms["penalty"]
    torch.testing.assert_close(gradients(found.loss, coder), gradients(term, coder), atol=1e-4, rtol=1e-4)


def test_the_replacement_uses_the_sparsity_in_force(llama):
    annealed, wide = TopK(2, anneal_from=3.0, anneal_share=0.5), TopK(6, anneal_from=1.0)
    found = [
        outcome(llama, made(torch.float, sparsity=sparsity), KL(), progress).loss
        for sparsity, progress in ((annealed, 0.0), (wide, 0.7), (annealed, 0.7))
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# The training.


def words_in_pairs() -> list[Example]:
    """Prompts of as many tokens each."""
    words = ("cat", "dog", "banana", "tiger", "lion", "bus", "star", "heart")
    return [Example(f"{a}-{b}", f"there is a {a} and a {b} . a {a} is") for a in words for b in words]


def coach(model: LoadedModel, data: list[Example], loss: KL | CrossEntropy, **settings) -> Trainer:
    defaults = {"wiring": Wiring.full(L), "sparsity": TopK(6, anneal_from=1.0), "d_transcoder": F, "tokens": 2500}
    config = TrainConfig(**{**defaults, "warmup_share": 0.0, "learning_rate": 1e-2, **settings})
    scales = estimate_scales(capture(model, data, range(len(data))))
    inner = Reconstruction(scales.output_variance, config.auxk, config.dead_penalty)
    return Trainer(config, scales, EndToEnd(model, loss, inner))


@pytest.mark.parametrize("sparsity", [TopK(6), BatchTopK(18), JumpReLU()], ids=lambda s: type(s).__name__)
def test_training_lowers_the_divergence(llama, sparsity):
    data, before = words_in_pairs(), traces(llama.model)
    trainer = coach(llama, data, KL(), sparsity=sparsity)
    metrics = [trainer.step(data[8 * (i % 8) : 8 * (i % 8) + 8]) for i in range(20)]
    assert np.mean([m.terms["kl"] for m in metrics[-8:]]) < 0.7 * np.mean([m.terms["kl"] for m in metrics[:8]])
    assert metrics[0].tokens == trainer.objective.n_tokens(trainer.objective.split(data[:8], 1)[0])
    assert traces(llama.model) == before
    assert all(parameter.grad is None for parameter in llama.model.parameters())


@pytest.mark.parametrize("data", [words_in_pairs()[:8], text_examples(8)], ids=["equal", "unequal lengths"])
@pytest.mark.parametrize("loss", [KL(), CrossEntropy(fvu_weight=0.5)], ids=str)
def test_parts_of_a_batch_make_the_same_step(llama, loss, data):
    whole, parts = (coach(llama, data, loss, micro_batches=n) for n in (1, 4))
    metrics = [trainer.step(data) for trainer in (whole, parts)]
    assert metrics[1].loss == pytest.approx(metrics[0].loss, rel=1e-5)
    assert (metrics[1].tokens, metrics[1].l0) == (metrics[0].tokens, metrics[0].l0)
    found = [[p.grad for p in trainer.coder.parameters()] for trainer in (whole, parts)]
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-3)


def test_a_joint_choice_is_refused_with_what_to_do():
    with pytest.raises(UserError, match=r"JointTopK cannot encode a layer alone; use BatchTopK"):
        config(loss=KL(), sparsity=JointTopK(12))


def test_prompts_of_one_token_are_passed_over_unless_there_is_nothing_else(llama):
    data, empty = text_examples(4), Example("empty", "")
    trainer, without = coach(llama, data, KL(), micro_batches=3), coach(llama, data, KL())
    assert trainer.step([empty, *data[:2]]).tokens == without.step(data[:2]).tokens
    with pytest.raises(UserError, match="prompts need more than one token each"):
        trainer.step([empty])


@pytest.mark.parametrize("loss", [KL(), CrossEntropy()], ids=str)
def test_pictures_without_words_have_nothing_to_predict(llava, loss):
    picture = Example("red", "", image=Image.new("RGB", (96, 96), "red"))
    coder, (part,) = made(torch.float, sparsity=ReLU()), objective(llava, loss).split([picture], 1)
    found = objective(llava, loss)(coder, part, 1.0, ALIVE)
    assert found.terms[TERMS[type(loss)]].item() == 0
    assert found.n_tokens > 0
    assert not [gradient for gradient in gradients(found.terms[TERMS[type(loss)]], coder) if gradient.any()]


def test_bfloat16_products_give_about_the_same_loss(llama):
    data = text_examples(4)
    losses = [coach(llama, data, KL(), precision=precision).step(data).loss for precision in ("fp32", "bf16")]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert losses[1] != losses[0]


# From a model and data to a run.


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(workflow, "ModelSource", partial(ModelSource, chunk_prompts=40))


class Watched(list):
    """Examples that call `event` when one is asked for the n-th time."""

    def __init__(self, data: list[Example], at: int, event: Callable[[], None]):
        super().__init__(data)
        self.left, self.event = at, event

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            self.event()
        return super().__getitem__(index)


OF_THE_START = {"decoder": SourceTied(offset=True), "skip": Wiring.per_layer(L)}


def config(**settings) -> TrainConfig:
    defaults = {"wiring": Wiring.full(L), "sparsity": TopK(4), "d_transcoder": F, "tokens": 1500, "batch_tokens": 150}
    return TrainConfig(calibration_tokens=300, **{**defaults, **settings})


def train(model: LoadedModel, out: Path, settings: TrainConfig, **options) -> CrossLayerTranscoder:
    return run_training(model, options.pop("data", text_examples(40)), settings, out, **options)


def logged(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


@pytest.fixture(scope="module")
def start(llama, tmp_path_factory) -> Path:
    """A finished run, trained on reconstruction, to finetune."""
    run = tmp_path_factory.mktemp("runs") / "start"
    settings = config(sparsity=JointTopK(12), decoder=SourceTied(offset=True), skip=Wiring.per_layer(L), tokens=3000)
    coder = train(llama, run, settings)
    coder.thresholds *= 1.001  # calibration puts them on activations of these very prompts, where rounding decides
    coder.save(run)
    return run


@pytest.mark.usefixtures("small_chunks")
def test_a_run_is_trained_end_to_end_saved_and_better_in_place(llama, tmp_path):
    before = train(llama, tmp_path / "before", config(loss=KL(), tokens=1, learning_rate=1e-9))
    trained = train(llama, tmp_path / "run", config(loss=KL(), tokens=2500))
    loaded, x = CrossLayerTranscoder.load(tmp_path / "run"), torch.randn(7, L, D)
    assert torch.equal(loaded(x), trained(x))
    assert loaded.provenance.training["config"]["loss"] == {"kind": "kl", "weight": 1.0, "fvu_weight": 0.0}
    assert logged(tmp_path / "run")[-1]["terms"].keys() >= {"kl", "fvu"}
    figures = [evaluate(llama, coder, text_examples(4), max_new_tokens=1) for coder in (loaded, before)]
    assert figures[0].kl.value < 0.8 * figures[1].kl.value


@pytest.mark.parametrize(("loss", "sparsity"), [(KL(fvu_weight=0.5), BatchTopK(12)), (CrossEntropy(), None)], ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_an_interrupted_run_is_resumed_to_the_same_weights(llama, start, tmp_path, loss, sparsity):
    settings = config(loss=loss, sparsity=sparsity, tokens=900, **OF_THE_START)
    options = {"start": start if sparsity is None else None}
    train(llama, tmp_path / "whole", settings, **options)
    data = Watched(text_examples(40), 75, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        train(llama, tmp_path / "run", settings, data=data, **options)
    assert (tmp_path / "run" / STATE).exists()
    train(llama, tmp_path / "run", settings, resume=True, **options)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert files[0] == files[1]
    assert logged(tmp_path / "whole") == logged(tmp_path / "run")


# Finetuning.

STILL = {"tokens": 1, "learning_rate": 1e-9}
"""A single step that goes nowhere, whose figures are those of the start."""


def finetuned(model: LoadedModel, out: Path, start: Path, **settings) -> CrossLayerTranscoder:
    return train(model, out, config(**{**OF_THE_START, "sparsity": None, **settings}), start=start)


@pytest.mark.usefixtures("small_chunks")
def test_finetuning_starts_at_the_runs_own_function(llama, start, tmp_path):
    old, source = CrossLayerTranscoder.load(start), workflow.ModelSource(llama, text_examples(40))
    scales = estimate_scales(source.chunk(0))
    batch = next(shuffled_batches(source, config().batch_tokens, 0, Place())).batch.tokens
    fvu = layer_fvu(batch.y, old(batch.x), scales.output_variance).mean().item()
    found = finetuned(llama, tmp_path, start, **STILL)
    assert logged(tmp_path)[0]["fvu"] == pytest.approx(fvu, rel=1e-5)
    torch.testing.assert_close(found(batch.x), old(batch.x), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("small_chunks")
def test_finetuning_end_to_end_starts_at_the_runs_own_predictions(llama, start, tmp_path):
    old, source = CrossLayerTranscoder.load(start), workflow.ModelSource(llama, text_examples(40))
    old.first_write.copy_(estimate_scales(source.chunk(0)).first_write)
    (part,) = objective(llama, KL()).split(source.prompts(0, config().batch_tokens // source.tokens_a_prompt), 1)
    finetuned(llama, tmp_path, start, loss=KL(), **STILL)
    assert logged(tmp_path)[0]["terms"]["kl"] == pytest.approx(by_hand(llama, old, part, KL()), rel=1e-4)


@pytest.mark.parametrize("loss", [{}, {"loss": KL()}], ids=["fvu", "kl"])
@pytest.mark.usefixtures("small_chunks")
def test_finetuning_without_a_sparsity_keeps_thresholds_exactly_and_learns(llama, start, tmp_path, loss):
    old, found = CrossLayerTranscoder.load(start), finetuned(llama, tmp_path, start, tokens=2200, **loss)
    assert torch.equal(found.thresholds, old.thresholds)
    assert not torch.equal(found.W_enc[0], old.W_enc[0])
    term, log = "kl" if loss else "fvu", logged(tmp_path)
    assert log[-1]["terms"][term] < log[0]["terms"][term]


@pytest.mark.usefixtures("small_chunks")
def test_finetuning_with_jumprelu_starts_at_the_old_thresholds(llama, start, tmp_path):
    old, found = CrossLayerTranscoder.load(start), finetuned(llama, tmp_path, start, sparsity=JumpReLU(), **STILL)
    assert old.thresholds.isfinite().all()
    torch.testing.assert_close(found.thresholds, old.thresholds)
    later = finetuned(llama, tmp_path / "later", start, sparsity=JumpReLU())
    assert not torch.allclose(later.thresholds, old.thresholds)


@pytest.mark.usefixtures("small_chunks")
def test_finetuning_with_another_sparsity_chooses_by_it_and_calibrates_anew(llama, start, tmp_path):
    sparse = finetuned(llama, tmp_path, start, sparsity=JointTopK(3, anneal_from=1.0), tokens=2000)
    old = CrossLayerTranscoder.load(start)
    tokens = workflow.ModelSource(llama, text_examples(40)).chunk(5)
    x = tokens.x[usable(tokens).keep]
    l0 = [sum(codes.counts().sum() for codes in coder.encode(x)).item() / len(x) for coder in (old, sparse)]
    assert l0 == [pytest.approx(12, abs=3), pytest.approx(3, abs=1)]
    assert isinstance(sparse.sparsity, JumpReLU)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"wiring": Wiring.per_layer(L)}, "the start has wiring .*span=3.*, the settings .*span=1"),
        ({"d_transcoder": F + 1}, "the start has d_transcoder 24, the settings 25; finetuning keeps the start's"),
        ({"skip": None}, "the start has skip .*, the settings None"),
        ({"sparsity": JointTopK(1000)}, "k is 1000"),
    ],
)
def test_a_start_of_another_shape_is_refused_by_name(llama, start, tmp_path, settings, named):
    with pytest.raises(UserError, match=named):
        finetuned(llama, tmp_path / "run", start, **settings)
    assert not (tmp_path / "run").exists()


def test_keeping_the_sparsity_of_no_start_is_refused(llama, tmp_path):
    with pytest.raises(UserError, match="sparsity is None, .* there is no start; name a sparsity"):
        train(llama, tmp_path / "run", config(sparsity=None))
