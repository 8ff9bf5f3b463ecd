"""The main job from end to end: from a model and data to a trained transcoder on disk."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from crosslayer.activations.capture import ModelSource
from crosslayer.coders.checkpoint import CONFIG, INDEX
from crosslayer.coders.transcoder import CrossLayerTranscoder, Provenance
from crosslayer.data.examples import Example
from crosslayer.files import check_folder, claim_folder
from crosslayer.models.load import LoadedModel
from crosslayer.training.config import TrainConfig
from crosslayer.training.fit import fit
from crosslayer.training.scales import estimate_scales
from crosslayer.training.state import METRICS, STATE, load_state
from crosslayer.training.stream import Place, usable_tokens
from crosslayer.training.trainer import Trainer

RUN_FILES = (CONFIG, "model*.safetensors", INDEX, METRICS, STATE)
"""What an overwritten run leaves."""
SCALE_CHUNK = 0
"""The chunk that scales are estimated on; training starts with it as well."""


def train(
    model: LoadedModel,
    data: Sequence[Example],
    config: TrainConfig,
    out: str | Path,
    *,
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
            `training_state.safetensors`.
        resume: go on from the state in `out`; the result is that of an uninterrupted training.
        overwrite: replace the run that `out` holds.
        checkpoint_seconds: time between two states on disk.

    Raises:
        UserError: for settings that cannot work, and for a training that stops making sense.
        Interrupted: after Ctrl-C; the state is kept.
    """
    run = Path(out)
    config.sparsity.check(len(config.wiring.source_layers), config.width(model.d_model))
    if not resume:
        check_folder(run, overwrite)
    source = ModelSource(model, data, seed=config.seed)
    context = {"model": model.id, "revision": model.revision, "read": model.sites.read, "n_examples": len(data)}
    if resume:
        trainer, place = load_state(run, config, context, model.device)
    else:
        trainer, place = Trainer(config, estimate_scales(source.chunk(SCALE_CHUNK))), Place()
        claim_folder(run, overwrite, RUN_FILES)
    place = fit(trainer, source, place, run, context, checkpoint_seconds=checkpoint_seconds)
    coder = finish(model, trainer, source, place)
    coder.save(run)
    (run / STATE).unlink()
    return coder


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
