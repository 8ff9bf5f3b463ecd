"""The whole story on the bundled model: three transcoders trained on the same tokens, put in place, compared."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from crosslayer.activations.capture import ModelSource
from crosslayer.activations.record import Activations
from crosslayer.activations.usable import usable
from crosslayer.coders.sparsity import JointTopK
from crosslayer.coders.transcoder import CrossLayerTranscoder, Provenance
from crosslayer.data.examples import Example
from crosslayer.data.load import EMOJI_SCENES, load_data
from crosslayer.evaluation import Evaluation, agreement, evaluate
from crosslayer.memory import keep_freed_memory
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import prepare
from crosslayer.replacement.model import ReplacementModel, generate
from crosslayer.training.config import TrainConfig
from crosslayer.training.part import Part
from crosslayer.training.scales import estimate_scales
from crosslayer.training.stream import Place, shuffled_batches, usable_tokens
from crosslayer.training.trainer import StepMetrics, Trainer
from crosslayer.wiring import Wiring
from crosslayer.workflow import with_metrics

MODEL = "emoji-llava"
DEFAULT_TOKENS = 200_000
D_TRANSCODER, K = 256, 8
"""Features a layer, and active features a token over all layers: sparse enough for graphs that can be read."""
PROBES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""Shares of the training at which top-1 agreement is looked at."""
PROBE_PROMPTS = 96
CALIBRATION_TOKENS = 2_048
"""Tokens for the thresholds of a probe; the finished arms take the full number."""


@dataclass(frozen=True)
class Probe:
    """Top-1 agreement in the middle of a training."""

    tokens: int
    seconds: float
    top1_agreement: float


@dataclass
class Arm:
    """One of the transcoders compared."""

    name: str
    title: str
    trainer: Trainer
    seconds: float = 0.0
    """Time spent in its own training steps."""
    log: list[StepMetrics] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)

    def step(self, batch: Part) -> StepMetrics:
        """One timed training step."""
        start = time.perf_counter()
        metrics = self.trainer.step(batch)
        self.seconds += time.perf_counter() - start
        self.log.append(metrics)
        return metrics

    def agreement_at(self, seconds: float) -> float:
        """Top-1 agreement after so many seconds of its own training, between the probes around."""
        before = Probe(0, 0.0, 0.0)
        for probe in self.probes:
            if probe.seconds >= seconds:
                share = (seconds - before.seconds) / (probe.seconds - before.seconds)
                return before.top1_agreement + share * (probe.top1_agreement - before.top1_agreement)
            before = probe
        return before.top1_agreement


@dataclass(frozen=True)
class Captions:
    """What the original and each replacement say of one picture."""

    picture: Image.Image
    prompt: str
    truth: str
    original: str
    by_arm: dict[str, str]


@dataclass(frozen=True)
class DemoResult:
    """All that the report shows."""

    model: LoadedModel
    n_train_scenes: int
    arms: list[Arm]
    evaluations: dict[str, Evaluation]
    captions: list[Captions]
    total_seconds: float

    @property
    def equal_time(self) -> float:
        """Training seconds of the quickest arm: the time at which all arms can be compared."""
        return min(arm.seconds for arm in self.arms)

    def to_dict(self) -> dict:
        """The JSON form."""
        return {
            "model": self.model.id,
            "total_seconds": self.total_seconds,
            "equal_time_seconds": self.equal_time,
            "arms": {
                arm.name: {
                    "title": arm.title,
                    "training": arm.trainer.config.record(),
                    "training_seconds": arm.seconds,
                    "tokens": arm.trainer.tokens,
                    "tokens_per_second": arm.trainer.tokens / arm.seconds,
                    "top1_agreement_at_equal_time": arm.agreement_at(self.equal_time),
                    "probes": [asdict(probe) for probe in arm.probes],
                    "curve": [asdict(metrics) for metrics in arm.log],
                    "evaluation": self.evaluations[arm.name].to_dict(),
                }
                for arm in self.arms
            },
            "captions": [
                {"prompt": c.prompt, "truth": c.truth, "original": c.original, **c.by_arm} for c in self.captions
            ],
        }


def run_demo(model: LoadedModel, out: Path, *, tokens: int, prompts: int, seed: int) -> DemoResult:
    """Train on `tokens` tokens, evaluate on `prompts` scenes, compare; finished runs are saved under `out`."""
    started = time.perf_counter()
    keep_freed_memory()
    data, held_out = load_data(EMOJI_SCENES, seed=seed), load_data(EMOJI_SCENES, n=prompts, split="test", seed=seed)
    source = ModelSource(model, data, seed=seed)
    first = source.chunk(0)
    scales = estimate_scales(first)
    arms = [Arm(name, title, Trainer(config, scales)) for name, title, config in _arms(model, tokens, seed)]
    probe = _Probe(model, first[usable(first).keep][:CALIBRATION_TOKENS])
    place = _train(arms, source, tokens, seed, probe)
    fresh = usable_tokens(source, place, 1024, arms[0].trainer.config.calibration_tokens, seed)
    coders = {arm.name: _finish(model, arm.trainer, fresh) for arm in arms}
    evaluations = {}
    for arm in arms:
        evaluations[arm.name] = evaluate(model, coders[arm.name], held_out)
        with_metrics(coders[arm.name], evaluations[arm.name].to_dict()).save(out / arm.name)
    captions = _captions(model, coders, held_out)
    return DemoResult(model, len(data), arms, evaluations, captions, time.perf_counter() - started)


def _arms(model: LoadedModel, tokens: int, seed: int) -> list[tuple[str, str, TrainConfig]]:
    L = model.n_layers
    wirings = [
        ("plt", "PLT: each layer writes to itself", Wiring.per_layer(L)),
        ("clt", "CLT: each layer writes to itself and all later ones", Wiring.full(L)),
        ("clt-next", "CLT, own layer left out", Wiring.full(L, first_target=1)),
    ]
    return [
        (
            name,
            title,
            TrainConfig(wiring=wiring, sparsity=JointTopK(K), d_transcoder=D_TRANSCODER, tokens=tokens, seed=seed),
        )
        for name, title, wiring in wirings
    ]


def _train(arms: list[Arm], source: ModelSource, tokens: int, seed: int, look: "_Probe") -> Place:
    """Every arm takes a step on every batch, so all see the same tokens and the model runs once."""
    place, due = Place(), list(PROBES)
    with tqdm(total=tokens, unit="tok", unit_scale=True, desc="train 3 arms", dynamic_ncols=True) as bar:
        for batch in shuffled_batches(source, arms[0].trainer.config.batch_tokens, seed, place):
            last = {arm.name: arm.step(batch.batch) for arm in arms}
            place = batch.following
            bar.update(min(arms[0].trainer.tokens, tokens) - bar.n)
            fvus = ", ".join(f"{name} {metrics.fvu:.3f}" for name, metrics in last.items())
            bar.set_postfix_str(f"fvu: {fvus}", refresh=False)
            if arms[0].trainer.progress >= due[0]:
                due.pop(0)
                for arm in arms:
                    arm.probes.append(look(arm))
            if arms[0].trainer.finished:
                return place
    raise AssertionError("streams are endless")


class _Probe:
    """A quick look at an arm in training: thresholds on a few tokens, agreement on a few validation scenes."""

    def __init__(self, model: LoadedModel, calibration: Activations):
        self.model, self.calibration = model, calibration
        scenes = list(load_data(EMOJI_SCENES, n=PROBE_PROMPTS, split="validation"))
        self.batches = [prepare(model.model, model.processor, scenes)]

    def __call__(self, arm: Arm) -> Probe:
        """Top-1 agreement of the arm as it is now."""
        coder = _finish(self.model, arm.trainer, self.calibration)
        return Probe(arm.trainer.tokens, arm.seconds, agreement(ReplacementModel(self.model, coder), self.batches))


def _finish(model: LoadedModel, trainer: Trainer, calibration: Activations) -> CrossLayerTranscoder:
    coder = trainer.finish(calibration)
    coder.provenance = Provenance(model.id, model.revision, model.sites.read, trainer.config.record())
    return coder


def _captions(
    model: LoadedModel, coders: dict[str, CrossLayerTranscoder], held_out: Sequence[Example]
) -> list[Captions]:
    """Captions of the three held-out scenes with the most to say."""
    described = [example for example in held_out if example.prompt.startswith("describe")]
    chosen = sorted(described, key=lambda example: len(example.response or ""), reverse=True)[:3]
    original = generate(model, chosen)
    replaced = {name: ReplacementModel(model, coder).generate_batch(chosen) for name, coder in coders.items()}
    return [
        Captions(
            _shown(e), e.prompt, e.response or "", original[i], {name: texts[i] for name, texts in replaced.items()}
        )
        for i, e in enumerate(chosen)
    ]


def _shown(example: Example) -> Image.Image:
    picture = example.picture()
    assert picture is not None, "the bundled scenes have pictures"
    return picture
