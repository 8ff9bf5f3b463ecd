"""The main job from end to end: from a model and data to a trained transcoder on disk."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from crosslayer.activations.capture import ModelSource
from crosslayer.activations.elsewhere import Elsewhere, Load, elsewhere
from crosslayer.activations.reading import StoreSource
from crosslayer.activations.store import Store
from crosslayer.coders.checkpoint import CONFIG, INDEX, is_run
from crosslayer.coders.transcoder import CrossLayerTranscoder, Provenance
from crosslayer.data.examples import Example, Examples
from crosslayer.data.skipped import SKIPPED
from crosslayer.distributed.alike import digest_of_examples, digest_of_weights, versions
from crosslayer.distributed.checkpoint import has_checkpoint, remove
from crosslayer.distributed.group import team_of
from crosslayer.distributed.handover import hand_over
from crosslayer.distributed.mesh import Mesh
from crosslayer.distributed.model import spread
from crosslayer.distributed.sharding import check_shares, parallelise
from crosslayer.distributed.state import CHECKPOINT, ShardedState, export_shares
from crosslayer.errors import UserError
from crosslayer.files import check_folder, claim_folder, read_json
from crosslayer.models.load import LoadedModel
from crosslayer.replacement.end_to_end import EndToEnd
from crosslayer.replacement.model import ReplacementModel, check_match
from crosslayer.team import ALONE, Team, check_alike, tell, together
from crosslayer.training.config import TrainConfig
from crosslayer.training.fit import Training, fit
from crosslayer.training.losses import FVU, KL, CrossEntropy
from crosslayer.training.objective import Reconstruction
from crosslayer.training.scales import Scales, estimate_scales
from crosslayer.training.state import METRICS, STATE, StateFile
from crosslayer.training.stream import ChunkSource, Place, StreamBatch, prompt_batches, shuffled_batches, usable_tokens
from crosslayer.training.trainer import Trainer

Source = ModelSource | StoreSource | Elsewhere
"""Of activations."""
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
    mesh: Mesh | None = None,
    shard_model: bool = False,
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
        mesh: the ranks that train together, each of which calls this; what is returned is this rank's share.
        shard_model: spread the model's weights over the ranks, in place, instead of a copy in each.

    Raises:
        UserError: for settings that cannot work, and for a training that stops making sense.
        Interrupted: after Ctrl-C; the state is kept.
    """
    if shard_model and not isinstance(config.loss, FVU):
        raise UserError("an end-to-end loss runs the model backwards too, which --shard-model cannot; leave it out")
    team = ALONE if mesh is None else team_of(mesh)
    source = ModelSource(model, data, seed=config.seed, team=team, in_step=shard_model)
    job = _job(model, data, source, mesh, shard_model)
    return _run(job, config, Path(out), start, resume, overwrite, checkpoint_seconds)


def train_at_once(
    model: LoadedModel,
    data: Sequence[Example],
    configs: Mapping[Path, TrainConfig],
    *,
    checkpoint_seconds: float = 60.0,
    load: Load | None = None,
) -> None:
    """Train several transcoders on one stream, for which the model runs once; each is that of its own `train`.

    Args:
        model: frozen, with its sites proved.
        data: what to run it on.
        configs: by folder of the run, which is new or holds a state to go on from; all of one seed.
        checkpoint_seconds: time between two states on disk.
        load: what another process loads the same model and data with, to run the model for the next chunk meanwhile;
            without it that is done here, in between.

    Raises:
        UserError: as `train` does, and for several seeds.
        Interrupted: after Ctrl-C; the states are kept.
    """
    seeds = {config.seed for config in configs.values()}
    if len(seeds) != 1:
        raise UserError(f"seeds are {sorted(seeds)}; trainings on one stream have one")
    alone = ModelSource(model, data, seed=seeds.pop())
    with nullcontext(alone) if load is None else elsewhere(alone, load) as source:
        job = _job(model, data, source, None)
        begun = [_begun(job, config, run, resume=(run / STATE).exists()) for run, config in configs.items()]
        fit(*begun, checkpoint_seconds=checkpoint_seconds, again="the same once more")
        for training in begun:
            _ended(job, training)


def train_from_store(
    store: Store,
    config: TrainConfig,
    out: str | Path,
    *,
    model_id: str = "",
    start: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_seconds: float = 60.0,
    mesh: Mesh | None = None,
) -> CrossLayerTranscoder:
    """Train a transcoder on activations from disk; no language model is needed.

    A store of fp32 that was captured with this `config.seed` gives the weights that `train` would give, bit for bit.
    `model_id` names the model where the store, an import, does not; the other arguments are those of `train`.

    Raises:
        UserError: as `train` does; when the store lacks what the wiring needs; for a loss that needs the model.
    """
    if not isinstance(config.loss, FVU):
        name = type(config.loss).__name__
        raise UserError(f"the loss is {name}, which runs the model on prompts; train on data instead of a store")
    manifest = store.manifest
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = StoreSource(store, config.wiring, config.seed, device, ALONE if mesh is None else team_of(mesh))
    origin = Provenance(manifest.model or model_id, manifest.revision, manifest.read)
    context = {"store": manifest.shards[0].sha256, "n_rows": len(store)}
    job = _Job(source, origin, context, manifest.n_layers, manifest.d_model, mesh)
    return _run(job, config, Path(out), start, resume, overwrite, checkpoint_seconds)


@dataclass(frozen=True)
class _Job:
    """What a training takes its activations from."""

    source: Source
    origin: Provenance
    context: dict[str, Any]
    """What tells these data from others, for a resume."""
    n_layers: int
    d_model: int
    mesh: Mesh | None
    model: LoadedModel | None = None
    data: Sequence[Example] | None = None
    shard_model: bool = False

    @property
    def team(self) -> Team:
        """Who trains together."""
        return self.source.team


def _job(
    model: LoadedModel, data: Sequence[Example], source: Source, mesh: Mesh | None, shard_model: bool = False
) -> _Job:
    origin, context = Provenance(model.id, model.revision, model.sites.read), {"n_examples": len(data)}
    return _Job(source, origin, context, model.n_layers, model.d_model, mesh, model, data, shard_model)


def _run(
    job: _Job,
    config: TrainConfig,
    run: Path,
    start: str | Path | None,
    resume: bool,
    overwrite: bool,
    checkpoint_seconds: float,
) -> CrossLayerTranscoder:
    training = _begun(job, config, run, start, resume, overwrite)
    fit(training, checkpoint_seconds=checkpoint_seconds)
    return _ended(job, training)


def _begun(
    job: _Job,
    config: TrainConfig,
    run: Path,
    start: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Training:
    """A training before its first step, its folder made ready."""
    if config.sparsity is not None:
        config.sparsity.check(len(config.wiring.source_layers), config.width(job.d_model))
    team, is_first = job.team, job.team.everyone.rank == 0
    check_shares(config, job.d_model, team.features.size)
    with together(team.everyone):
        if is_first and not resume:
            check_folder(run, overwrite)
    source, origin = job.source, job.origin
    _check_alike(job, config)
    if job.shard_model and job.model is not None and job.mesh is not None:
        spread(job.model, job.mesh)
    context = {"model": origin.model_id, "revision": origin.revision, "read": origin.read, **job.context}
    context["start"] = None if start is None else str(start)
    states = StateFile(run, context) if job.mesh is None else ShardedState(run, context, job.mesh)
    if resume:
        hand_over(run, job.mesh)
        kept = states.load(config, source.device)
        trainer = _trainer(job, config, kept.scales, start).restore(kept.tensors, kept.counters)
        place = kept.place
    else:
        scales = estimate_scales(source.chunk(SCALE_CHUNK), team.tokens)
        trainer, place = _trainer(job, config, scales, start), Place()
    with together(team.everyone):
        if is_first and not resume:
            claim_folder(run, overwrite, RUN_FILES)
            remove(run / CHECKPOINT)
        if is_first and isinstance(job.data, Examples):
            job.data.skipped.list_in(run / SKIPPED, resume=resume)
    return Training(trainer, _batches(source, config, place), place, run, states)


def _ended(job: _Job, training: Training) -> CrossLayerTranscoder:
    """What came of a training, saved as a run."""
    coder = finish(job.origin, training.trainer, job.source, training.place)
    if job.mesh is None:
        coder.save(training.run)
    else:
        coder.save(training.run, partial(export_shares, job.mesh, coder.sharing))
    training.states.remove()
    return coder


def adopt(model: LoadedModel, data: Sequence[Example], coder: CrossLayerTranscoder) -> CrossLayerTranscoder:
    """Make, in place, an imported transcoder one of this model: with the mean write at a prompt's first position.

    Raises:
        UserError: when the model has another shape.
    """
    ReplacementModel(model, coder)  # refuses one of another shape
    coder.provenance = replace(coder.provenance, model_id=model.id, revision=model.revision)
    coder.first_write.copy_(estimate_scales(ModelSource(model, data).chunk(SCALE_CHUNK)).first_write)
    return coder


def is_result_of(run: Path, config: TrainConfig) -> bool:
    """Whether a folder holds the finished run of a training with these settings."""
    if not is_run(str(run)) or (run / STATE).exists() or has_checkpoint(run / CHECKPOINT):
        return False
    made = read_json(run / CONFIG)["provenance"]["training"].get("config")
    return made == json.loads(json.dumps(config.record()))


def _trainer(job: _Job, config: TrainConfig, scales: Scales, start: str | Path | None) -> Trainer:
    objective = Reconstruction(scales.output_variance, config.auxk, config.dead_penalty)
    if job.model is not None and isinstance(config.loss, KL | CrossEntropy):
        objective = EndToEnd(job.model, config.loss, objective, job.team.tokens)
    team = job.team
    coder = None if start is None else CrossLayerTranscoder.load(start)
    if coder is not None:
        check_match(coder, job.origin.model_id, job.n_layers, job.d_model, job.origin.read)  # before it is trained
        coder = parallelise(coder, team, config.sparsity)
    trainer = Trainer(config, scales, objective, coder, team)
    trainer.coder.provenance = job.origin
    return trainer


def _check_alike(job: _Job, config: TrainConfig) -> None:
    """Refuse to train with ranks that were given different things."""
    if job.mesh is None:
        return
    facts = {"the configuration": config.record(), **versions()}
    facts |= {f"{name} of the data": value for name, value in job.context.items()}
    if job.model is not None and job.data is not None:
        facts |= {"the first examples": digest_of_examples(job.data), "the model": digest_of_weights(job.model.model)}
    check_alike(tell(job.team.everyone, facts))


def _batches(source: Source, config: TrainConfig, place: Place) -> Iterator[StreamBatch]:
    if isinstance(source, StoreSource) or not isinstance(config.loss, KL | CrossEntropy):
        return shuffled_batches(source, config.batch_tokens, config.seed, place, source.team.tokens)
    return prompt_batches(source, max(1, config.batch_tokens // source.tokens_a_prompt), place)


def finish(origin: Provenance, trainer: Trainer, source: ChunkSource, place: Place) -> CrossLayerTranscoder:
    """Calibrate on tokens that follow the training data, fold the scales, and note where it all came from."""
    config = trainer.config
    fresh = usable_tokens(
        source, place, config.batch_tokens, config.calibration_tokens, config.seed, trainer.team.tokens
    )
    coder = trainer.finish(fresh)
    training = {"config": config.record(), "counted": trainer.counters()}
    coder.provenance = replace(origin, training=training)
    return coder


def with_metrics(coder: CrossLayerTranscoder, metrics: dict[str, Any]) -> CrossLayerTranscoder:
    """The same transcoder, with measured figures beside its provenance."""
    coder.provenance = replace(coder.provenance, metrics=metrics)
    return coder
