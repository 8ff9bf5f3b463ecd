"""The main job from end to end: from a model and data to a trained transcoder on disk."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from crosslayer.activations.capture import ModelSource
from crosslayer.coders.checkpoint import CONFIG, INDEX
from crosslayer.coders.transcoder import CrossLayerTranscoder, Provenance
from crosslayer.data.examples import Example, Examples
from crosslayer.data.skipped import SKIPPED
from crosslayer.files import check_folder, claim_folder
from crosslayer.models.load import LoadedModel
from crosslayer.replacement.end_to_end import EndToEnd
from crosslayer.replacement.model import ReplacementModel
from crosslayer.training.config import TrainConfig
from crosslayer.training.fit import fit
from crosslayer.training.losses import KL, CrossEntropy
from crosslayer.training.objective import Reconstruction
from crosslayer.training.scales import Scales, estimate_scales
from crosslayer.training.state import METRICS, STATE, load_state
from crosslayer.training.stream import Place, StreamBatch, prompt_batches, shuffled_batches, usable_tokens
from crosslayer.training.trainer import Trainer

RUN_FILES = (CONFIG, "model*.safetensors", INDEX, METRICS, STATE, SKIPPED)
"""What an overwritten run leaves."""
SCALE_CHUNK = 0
"""The chunk that scales are estimated on; training starts with it as well."""


def train(
    model: LoadedModel,
    data: Sequence[Example],
    config: TrainConfig,
    out: str | Path,
    *,
    start: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_seconds: float = 60.0,
) -> CrossLayerTranscoder:
    """Train a transcoder on a stream of the model's activations and save it as a run.

    Args:
        model: frozen, with its sites proved.
        data: what to run it on, visited in a new order each epoch.
        config: wiring, sparsity, width, length.
        out: folder of the run: `config.json`, `model.safetensors`, `metrics.jsonl`, and while it is unfinished
            `training_state.safetensors`; `skipped.jsonl` lists the data's bad rows, if any.
        start: run to finetune, instead of starting from random weights.
        resume: go on from the state in `out`; the result is that of an uninterrupted training.
        overwrite: replace the run that `out` holds.
        checkpoint_seconds: time between two states on disk.

    Raises:
        UserError: for settings that cannot work, and for a training that stops making sense.
        Interrupted: after Ctrl-C; the state is kept.
    """
    run = Path(out)
    if config.sparsity is not None:
        config.sparsity.check(len(config.wiring.source_layers), config.width(model.d_model))
    if not resume:
        check_folder(run, overwrite)
    source = ModelSource(model, data, seed=config.seed)
    context = {"model": model.id, "revision": model.revision, "read": model.sites.read, "n_examples": len(data)}
    context["start"] = None if start is None else str(start)
    if resume:
        kept = load_state(run, config, context, model.device)
        trainer = _trainer(model, config, kept.scales, start).restore(kept.tensors, kept.counters)
        place = kept.place
    else:
        trainer, place = _trainer(model, config, estimate_scales(source.chunk(SCALE_CHUNK)), start), Place()
        claim_folder(run, overwrite, RUN_FILES)
    if isinstance(data, Examples):
        data.skipped.list_in(run / SKIPPED, resume=resume)
    batches = _batches(model, source, config, place)
    place = fit(trainer, batches, place, run, context, checkpoint_seconds=checkpoint_seconds)
    coder = finish(model, trainer, source, place)
    coder.save(run)
    (run / STATE).unlink()
    return coder


def adopt(model: LoadedModel, data: Sequence[Example], coder: CrossLayerTranscoder) -> CrossLayerTranscoder:
    """Make, in place, an imported transcoder one of this model: with the mean write at a prompt's first position.

    Raises:
        UserError: when the model has another shape.
    """
    coder.provenance = replace(coder.provenance, model_id=model.id, revision=model.revision)
    ReplacementModel(model, coder)  # refuses one of another shape
    coder.first_write.copy_(estimate_scales(ModelSource(model, data).chunk(SCALE_CHUNK)).first_write)
    return coder


def _trainer(model: LoadedModel, config: TrainConfig, scales: Scales, start: str | Path | None) -> Trainer:
    objective = Reconstruction(scales.output_variance, config.auxk, config.dead_penalty)
    if isinstance(config.loss, KL | CrossEntropy):
        objective = EndToEnd(model, config.loss, objective)
    coder = None if start is None else CrossLayerTranscoder.load(start)
    if coder is not None:
        ReplacementModel(model, coder)  # refuses one that was trained on a model of another shape
    trainer = Trainer(config, scales, objective, coder)
    trainer.coder.provenance = Provenance(model.id, model.revision, model.sites.read)
    return trainer


def _batches(model: LoadedModel, source: ModelSource, config: TrainConfig, place: Place) -> Iterator[StreamBatch]:
    if not isinstance(config.loss, KL | CrossEntropy):
        return shuffled_batches(source, config.batch_tokens, config.seed, place)
    return prompt_batches(source, max(1, config.batch_tokens // source.tokens_a_prompt), place)


def finish(model: LoadedModel, trainer: Trainer, source: ModelSource, place: Place) -> CrossLayerTranscoder:
    """Calibrate on tokens that follow the training data, fold the scales, and note where it all came from."""
    config = trainer.config
    fresh = usable_tokens(source, place, config.batch_tokens, config.calibration_tokens, config.seed)
    coder = trainer.finish(fresh)
    training = {"config": config.record(), "counted": trainer.counters()}
    coder.provenance = Provenance(model.id, model.revision, model.sites.read, training)
    return coder


def with_metrics(coder: CrossLayerTranscoder, metrics: dict[str, Any]) -> CrossLayerTranscoder:
    """The same transcoder, with measured figures beside its provenance."""
    coder.provenance = replace(coder.provenance, metrics=metrics)
    return coder
