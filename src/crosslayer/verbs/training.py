"""Verbs that train: demo and train."""

from functools import partial
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from crosslayer.activations.store import Store
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.data.examples import Examples
from crosslayer.data.load import read_data
from crosslayer.demo import DEFAULT_TOKENS, MODEL, run_demo
from crosslayer.distributed.checkpoint import has_checkpoint
from crosslayer.distributed.mesh import Mesh, join, leave, restarts, under_torchrun
from crosslayer.distributed.state import CHECKPOINT
from crosslayer.errors import UserError
from crosslayer.files import claim_folder, write_json
from crosslayer.mesh_options import price
from crosslayer.mesh_table import mesh_table
from crosslayer.models.load import LoadedModel, load_model
from crosslayer.options import TrainOptions
from crosslayer.planning import estimate
from crosslayer.report import (
    comparison_table,
    cost_table,
    inspection,
    write_report,
)
from crosslayer.scaling import Layout
from crosslayer.training.config import TrainConfig
from crosslayer.verbs.arguments import Overwrite, Seed, check_positive, print_skipped
from crosslayer.wiring import Wiring
from crosslayer.workflow import is_result_of, train_from_store
from crosslayer.workflow import train as run_training


def demo(
    out: Annotated[Path, arg(help="Folder for report.html, report.json and the trained runs.")] = Path("demo"),
    tokens: Annotated[int, arg(help="Tokens that every arm is trained on.")] = DEFAULT_TOKENS,
    prompts: Annotated[int, arg(help="Held-out scenes that every arm is evaluated on.")] = 128,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train PLT and CLT on the bundled model, put them in its place, compare: the whole story in five minutes."""
    check_positive(tokens=tokens, prompts=prompts)
    claim_folder(out, overwrite, ("report.html", "report.json"))
    model = load_model(MODEL)
    print(inspection(model, Wiring.full(model.n_layers)), end="\n\n")
    result = run_demo(model, out, tokens=tokens, prompts=prompts, seed=seed)
    write_json(out / "report.json", result.to_dict())
    write_report(out / "report.html", result)
    print(comparison_table(result))
    print(f"\nreport: {out / 'report.html'}  ({result.total_seconds:.0f} s in all)")


def train(options: Annotated[TrainOptions, arg(name="")]) -> None:
    """Train a transcoder on activations, captured from DATA on the way or kept in a store; --resume goes on.

    EleutherAI's option names (--cross_layer, --coalesce_topk, ...) work too. Under torchrun, all processes train it
    together.
    """
    options.mesh.check(options.dry_run)
    if not under_torchrun():
        options.check_alone()
        _train(options, None)
        return
    mesh = join(options.feature_ranks, options.timeout)
    _train(options, mesh)
    leave()


def _train(options: TrainOptions, mesh: Mesh | None) -> None:
    is_first = mesh is None or mesh.rank == 0
    start = None if options.finetune is None else CrossLayerTranscoder.load(options.finetune)
    data = None
    if options.store is not None:
        store = Store(options.store)
        options.check_store(store.manifest)
        run_one = partial(train_from_store, store, model_id=options.model, mesh=mesh)
        n_layers = store.manifest.n_layers
    else:
        loaded, data = _model_and_data(options)
        run_one, n_layers = (
            partial(run_training, loaded, data, mesh=mesh, shard_model=options.shard_model),
            loaded.n_layers,
        )
        if options.dry_run:
            config = options.config(n_layers, start, options.seed[0])
            if is_first:
                print(_cost(loaded, data, config, options, mesh))
            return
    for config in [options.config(n_layers, start, seed) for seed in options.seed]:
        run = options.out if len(options.seed) == 1 else options.out / f"seed-{config.seed}"
        resume = options.resume
        if mesh is not None and restarts():
            if is_result_of(run, config):
                continue
            resume = resume or has_checkpoint(run / CHECKPOINT)
        coder = run_one(config, run, start=options.finetune, resume=resume, overwrite=options.overwrite)
        if not is_first:
            continue
        counted = coder.provenance.training["counted"]
        print(
            f"trained on {counted['tokens']:,} tokens; left out {counted['first_left_out']:,} first positions "
            f"and {counted['outliers_left_out']:,} norm outliers\nnext: crosslayer evaluate {run}"
        )
    if is_first:
        print_skipped(data)


def _cost(model: LoadedModel, data: Examples, config: TrainConfig, options: TrainOptions, mesh: Mesh | None) -> str:
    ranks = options.mesh.ranks or (None if mesh is None else mesh.size)
    if ranks is None:
        return cost_table(estimate(model, data, config, options.out), len(options.seed))
    layout = Layout(ranks, options.feature_ranks, options.shard_model)
    return mesh_table(*price(model, config, layout, options.mesh), config.tokens)


def _model_and_data(options: TrainOptions) -> tuple[LoadedModel, Examples]:
    if options.data is None:
        raise UserError("there is nothing to train on; give DATA or --store")
    load = options.loading.sketch if options.dry_run else options.loading.load
    loaded = load(options.model, options.read)
    return loaded, read_data(options.data, options.reading, loaded)
