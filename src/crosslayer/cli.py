"""The command line: one subcommand per verb, each of which parses, calls and prints."""

import os
import re
import sys
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

import huggingface_hub
import transformers
import tyro
from tyro.conf import Positional, arg

from crosslayer.activations.from_batches import store_batches
from crosslayer.activations.store import Store
from crosslayer.activations.to_store import capture_to_store
from crosslayer.activations.writer import SHARD_BYTES
from crosslayer.answering import Answering
from crosslayer.answering import respond as run_respond
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.data.examples import Example, Examples
from crosslayer.data.images import open_image
from crosslayer.data.load import EMOJI_SCENES, load_data, read_data
from crosslayer.data.reading import DATA_KINDS, Reading
from crosslayer.demo import DEFAULT_TOKENS, MODEL, run_demo
from crosslayer.eleuther_options import translate
from crosslayer.errors import UserError
from crosslayer.evaluation import evaluate as run_evaluation
from crosslayer.files import check_folder, claim_folder, write_json, write_text
from crosslayer.formats import (
    read_circuit_tracer,
    read_eleuther,
    read_gemma_scope,
    read_layered_batches,
    read_layered_plt,
    write_circuit_tracer,
    write_eleuther,
)
from crosslayer.model_options import AS_IT_IS, ModelOptions
from crosslayer.models.load import LoadedModel, load_model
from crosslayer.options import TrainOptions
from crosslayer.planning import estimate
from crosslayer.replacement.model import ReplacementModel
from crosslayer.replacement.model import generate as run_generation
from crosslayer.report import (
    comparison_table,
    cost_table,
    evaluation_table,
    inspection,
    remarks,
    side_by_side,
    store_table,
    write_report,
)
from crosslayer.wiring import Wiring
from crosslayer.workflow import RUN_FILES, adopt, train_from_store
from crosslayer.workflow import train as run_training

LAYERED_BATCHES = "layered-batches"
READERS: dict[str, Any] = {
    "eleuther": read_eleuther,
    "circuit-tracer": read_circuit_tracer,
    "gemma-scope": read_gemma_scope,
    "layered-plt": read_layered_plt,
}
WRITERS: dict[str, Any] = {"eleuther": write_eleuther, "circuit-tracer": write_circuit_tracer}

Model = Annotated[
    Positional[str], arg(metavar="MODEL", help="Bundled name (emoji-llava, smollm2), model folder, or hub id.")
]
Data = Annotated[Positional[str], arg(metavar="DATA", help=DATA_KINDS)]
Run = Annotated[Positional[str], arg(metavar="RUN", help="Folder of a trained transcoder, or its hub id.")]
HowRead = Annotated[Reading, arg(name="")]
Read = Annotated[str, arg(help="What the encoders read: resid (before the MLP's norm) or mlp_in (after).")]
Loading = Annotated[ModelOptions, arg(name="")]
Seed = Annotated[int, arg(help="Seed of the weights and of the order of the data.")]
FirstTarget = Annotated[int, arg(help="0: a source writes to its own layer first; 1: to the next.")]
OtherModel = Annotated[str | None, arg(help="Model to use instead of the one the run names.")]
MaybeData = Annotated[Positional[str | None], arg(help="Held-out data; bundled scenes for the bundled model.")]
Overwrite = Annotated[bool, arg(help="Replace what an earlier run left in the output folder.")]


def demo(
    out: Annotated[Path, arg(help="Folder for report.html, report.json and the trained runs.")] = Path("demo"),
    tokens: Annotated[int, arg(help="Tokens that every arm is trained on.")] = DEFAULT_TOKENS,
    prompts: Annotated[int, arg(help="Held-out scenes that every arm is evaluated on.")] = 128,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train PLT and CLT on the bundled model, put them in its place, compare: the whole story in five minutes."""
    _check_positive(tokens=tokens, prompts=prompts)
    claim_folder(out, overwrite, ("report.html", "report.json"))
    model = load_model(MODEL)
    print(inspection(model, Wiring.full(model.n_layers)), end="\n\n")
    result = run_demo(model, out, tokens=tokens, prompts=prompts, seed=seed)
    write_json(out / "report.json", result.to_dict())
    write_report(out / "report.html", result)
    print(comparison_table(result))
    print(f"\nreport: {out / 'report.html'}  ({result.total_seconds:.0f} s in all)")


def inspect(
    model: Model,
    read: Annotated[
        str, arg(help="What the encoders read: resid (before the MLP's norm) or mlp_in (after).")
    ] = "resid",
    span: Annotated[int | None, arg(help="Layers a source writes to, for the wiring table; all by default.")] = None,
    first_target: FirstTarget = 0,
    loading: Loading = AS_IT_IS,
) -> None:
    """Print a model's sites, sizes and the self-test: residual identity and self-replacement."""
    loaded = loading.load(model, read)
    print(inspection(loaded, _wiring(loaded, span, first_target)))


def train(options: Annotated[TrainOptions, arg(name="")]) -> None:
    """Train a transcoder on activations, captured from DATA on the way or kept in a store; --resume goes on.

    EleutherAI's option names (--cross_layer, --coalesce_topk, ...) work too.
    """
    start = None if options.finetune is None else CrossLayerTranscoder.load(options.finetune)
    data = None
    if options.store is not None:
        store = Store(options.store)
        options.check_store(store.manifest)
        run_one = partial(train_from_store, store, model_id=options.model)
        n_layers = store.manifest.n_layers
    else:
        loaded, data = _model_and_data(options)
        run_one, n_layers = partial(run_training, loaded, data), loaded.n_layers
        if options.dry_run:
            config = options.config(n_layers, start, options.seed[0])
            print(cost_table(estimate(loaded, data, config, options.out), len(options.seed)))
            return
    for config in [options.config(n_layers, start, seed) for seed in options.seed]:
        run = options.out if len(options.seed) == 1 else options.out / f"seed-{config.seed}"
        coder = run_one(config, run, start=options.finetune, resume=options.resume, overwrite=options.overwrite)
        counted = coder.provenance.training["counted"]
        print(
            f"trained on {counted['tokens']:,} tokens; left out {counted['first_left_out']:,} first positions "
            f"and {counted['outliers_left_out']:,} norm outliers\nnext: crosslayer evaluate {run}"
        )
    _print_skipped(data)


def capture(
    model: Model,
    data: Data,
    out: Annotated[Path, arg(help="Folder of the store.")],
    reading: HowRead = Reading(),  # noqa: B008
    tokens: Annotated[int | None, arg(help="Tokens to keep.")] = None,
    prompts: Annotated[int | None, arg(help="Prompts to keep all tokens of; by default all of DATA once.")] = None,
    store_dtype: Annotated[str, arg(help="bf16, fp32, or int8 with a scale for each token and layer.")] = "bf16",
    layers: Annotated[str | None, arg(help="Layers to keep, as in 8-15; training needs all, the default.")] = None,
    seed: Annotated[int, arg(help="Seed of the order of the data; train with the same to train as on the stream.")] = 0,
    shard_mib: Annotated[int, arg(help="Size that a file does not pass, in MiB.")] = SHARD_BYTES // 2**20,
    read: Read = "resid",
    resume: Annotated[bool, arg(help="Go on after the last whole shard in --out.")] = False,
    overwrite: Annotated[bool, arg(help="Replace the store that --out holds.")] = False,
    loading: Loading = AS_IT_IS,
) -> None:
    """Keep what a model's MLPs read and write on disk; the room needed is said first; resumable."""
    loaded = loading.load(model, read)
    examples = read_data(data, reading, loaded)
    store = capture_to_store(
        loaded,
        examples,
        out,
        tokens=tokens,
        prompts=prompts,
        dtype=store_dtype,
        layers=None if layers is None else _layers(layers),
        seed=seed,
        shard_bytes=shard_mib * 2**20,
        resume=resume,
        overwrite=overwrite,
    )
    print(f"{store_table(store)}\n\nnext: crosslayer train {model} --store {out} --out RUN")
    _print_skipped(examples)


def store(
    action: Annotated[Positional[Literal["info", "verify"]], arg(metavar="{info,verify}", help="What to do.")],
    store: Annotated[Positional[Path], arg(metavar="STORE", help="Folder that `crosslayer capture` wrote.")],
) -> None:
    """Print what a store of activations holds (info), or compare every shard with its checksum (verify)."""
    found = Store(store)
    if action == "info":
        print(store_table(found))
    else:
        found.verify()
        print(f"{store}: all {len(found.manifest.shards):,} shards are as they were written")


def evaluate(
    run: Run,
    data: Annotated[
        Positional[str | None], arg(help="Held-out data; the bundled scenes for the bundled model.")
    ] = None,
    reading: HowRead = Reading(),  # noqa: B008
    prompts: Annotated[int, arg(help="How many examples to use at most.")] = 128,
    json: Annotated[Path | None, arg(help="File for all figures, per layer and modality too.")] = None,
    model: OtherModel = None,
    loading: Loading = AS_IT_IS,
) -> None:
    """Measure how well a run's replacement model stands in for the original."""
    coder, loaded = _load_run(run, model, loading)
    examples = _held_out(loaded, data, reading, prompts)
    if json is not None:
        examples.skipped.list_in(json.with_suffix(".skipped.jsonl"))
    result = run_evaluation(loaded, coder, examples)
    if json is not None:
        write_text(json, result.to_json() + "\n")
    print("\n".join([*remarks(coder), evaluation_table(result)]))
    _print_skipped(examples)


def generate(
    run: Run,
    prompt: Annotated[str, arg(help="What to say to the model; <image> marks where the image goes, first by default.")],
    image: Annotated[Path | None, arg(help="Picture to show it.")] = None,
    max_new_tokens: Annotated[int, arg(help="Tokens to generate at most.")] = 32,
    temperature: Annotated[float, arg(help="0 is greedy; above it, sampling.")] = 0.0,
    model: OtherModel = None,
    loading: Loading = AS_IT_IS,
) -> None:
    """Let the original and the replacement answer the same prompt, side by side."""
    _check_positive(max_new_tokens=max_new_tokens)
    if temperature < 0:
        raise UserError(f"temperature is {temperature}; choose 0 for greedy or more")
    coder, loaded = _load_run(run, model, loading)
    examples = [Example("prompt", prompt, image=None if image is None else open_image(image))]
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if temperature:
        settings |= {"do_sample": True, "temperature": temperature}
    original = run_generation(loaded, examples, **settings)[0]
    replaced = ReplacementModel(loaded, coder).generate_batch(examples, **settings)[0]
    print(side_by_side({"original": original, "replacement": replaced}))


def respond(
    model: Model,
    data: Data,
    out: Annotated[Path, arg(help="File of JSON lines: id, image, prompt, response; it can be DATA again.")],
    reading: HowRead = Reading(),  # noqa: B008
    prompts: Annotated[int | None, arg(help="How many examples to answer at most; all by default.")] = None,
    answering: Annotated[Answering, arg(name="")] = Answering(),  # noqa: B008
    resume: Annotated[bool, arg(help="Go on after an interruption, to the answers of an unbroken run.")] = False,
    overwrite: Annotated[bool, arg(help="Replace an earlier file of answers.")] = False,
    loading: Loading = AS_IT_IS,
) -> None:
    """Let a model answer every prompt of DATA, greedily by default, and keep prompts, images and answers."""
    loaded = loading.load(model)
    examples = read_data(data, reading, loaded, n=prompts)
    n = run_respond(loaded, examples, out, answering, resume=resume, overwrite=overwrite)
    print(f"{out}: {n:,} answers\nnext: crosslayer train {model} {out} --out RUN")
    _print_skipped(examples)


def import_(
    format: Annotated[Positional[str], arg(metavar="FORMAT", help=f"One of {', '.join(READERS)}, {LAYERED_BATCHES}.")],
    source: Annotated[Positional[Path], arg(metavar="SRC", help="Folder to read.")],
    out: Annotated[Path, arg(help="Folder of the run, or of the store, to write.")],
    model: Annotated[str | None, arg(help="Model it is of; its writes at first positions are measured.")] = None,
    data: Annotated[str | None, arg(help="Data to measure that on.")] = None,
    read: Annotated[
        str | None, arg(help="Site that was read, resid or mlp_in, where it is not what the format says.")
    ] = None,
    names: Annotated[
        tuple[str, str, str] | None,
        arg(help="layered-plt: what LayerNorm, encoder and decoder are called; enc.0 enc.1 dec by default."),
    ] = None,
    target_offset: Annotated[
        int | None,
        arg(help="layered-*: what file or folder l writes is the output of MLP l + 1 (1, the default) or of l (0)."),
    ] = None,
    unwritten: Annotated[
        str | None,
        arg(help="layered-plt: a layer that no file writes to can keep its own MLP (keep, the default) or write zero."),
    ] = None,
    norm_eps: Annotated[float | None, arg(help="layered-plt: eps of the LayerNorms, 1e-5 by default.")] = None,
    store_dtype: Annotated[
        str | None, arg(help="layered-batches: form of the store, bf16 (default), fp32 or int8.")
    ] = None,
    overwrite: Overwrite = False,
    loading: Loading = AS_IT_IS,
) -> None:
    """Turn transcoders trained elsewhere into a run that every verb takes, or foreign activations into a store.

    layered-plt: one PyTorch state dict (or safetensors file) a layer, of LayerNorm, linear encoder, ReLU and linear
    decoder; the number in a file's name is its layer's.

    layered-batches: folders L0, L1, ... of batch_{i}_x.pt and batch_{i}_y.pt, or of batch_{i}.pt with 'x' and
    'targets'. With --model the reads and writes are proved to be its MLPs' own, and writes that are missing are
    computed.
    """
    check_folder(out, overwrite)
    settings = {"read": read, "names": names, "target_offset": target_offset, "unwritten": unwritten}
    settings |= {"norm_eps": norm_eps, "store_dtype": store_dtype, "data": data}
    if format == LAYERED_BATCHES:
        loaded = None if model is None else loading.load(model)
        _import_batches(source, out, loaded, overwrite, **_settings_of(_import_batches, format, settings))
        return
    reader = _format(READERS, format)
    coder = reader(source, **_settings_of(reader, format, {**settings, "data": None}))
    if (model is None) != (data is None):
        raise UserError("give --model and --data together, or neither")
    if model is not None and data is not None:
        loaded = loading.load(model, coder.provenance.read)
        adopt(loaded, load_data(data, model=loaded), coder)
    claim_folder(out, overwrite, RUN_FILES)
    coder.save(out)
    sizes = f"{out}: {coder.wiring.n_layers} layers of {coder.d_transcoder:,} features"
    print("\n".join([sizes, *remarks(coder), f"next: crosslayer evaluate {out}"]))


def _import_batches(
    source: Path, out: Path, model: LoadedModel | None, overwrite: bool, *, target_offset: int = 1, store_dtype="bf16"
) -> None:
    batches = read_layered_batches(source, target_offset)
    store = store_batches(batches, out, model=model, dtype=store_dtype, overwrite=overwrite)
    name = "MODEL" if model is None else model.id
    print(f"{store_table(store)}\n\nnext: crosslayer train {name} --store {out} --out RUN")


def export(
    format: Annotated[Positional[str], arg(metavar="FORMAT", help=f"One of {', '.join(WRITERS)}.")],
    run: Run,
    out: Annotated[Path, arg(help="Folder to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Write a run in another tool's format."""
    write = _format(WRITERS, format)
    write(CrossLayerTranscoder.load(run), out, overwrite=overwrite)
    print(f"{out}: written for {format}")


VERBS = {
    "demo": demo,
    "inspect": inspect,
    "capture": capture,
    "store": store,
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "respond": respond,
    "import": import_,
    "export": export,
}


def main() -> None:
    """Entry point: exit code 0, 2 for bad input with one line on standard error, 130 after Ctrl-C."""
    args = sys.argv[1:]
    debug = "--debug" in args
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    try:
        args = [a for a in args if a != "--debug"]
        if args[:1] == ["train"]:
            args = ["train", *translate(args[1:])]
        tyro.extras.subcommand_cli_from_dict(VERBS, prog="crosslayer", description=_DESCRIPTION, args=args)
    except UserError as error:
        _stop(error, debug, 2)
    except KeyboardInterrupt as stop:
        _stop(stop, debug, 130)
    except BrokenPipeError:  # the reader of our output, `head` for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_DESCRIPTION = (
    "Cross-layer transcoders for language and vision-language models: train them, put them in place of the MLPs, "
    "measure. `crosslayer VERB --help` explains every option; add --debug for the traceback of an error."
)


def _stop(error: BaseException, debug: bool, code: int) -> None:
    if debug:
        raise error
    print(f"crosslayer: {str(error) or 'interrupted'}", file=sys.stderr)
    sys.exit(code)


def _format(formats: dict[str, Any], name: str) -> Any:
    if name not in formats:
        raise UserError(f"format is {name!r}; choose one of {', '.join(formats)}")
    return formats[name]


def _settings_of(reader: Any, format: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given, all of which must be this reader's."""
    given = {name: value for name, value in settings.items() if value is not None}
    if foreign := given.keys() - signature(reader).parameters:
        raise UserError(f"--{min(foreign).replace('_', '-')} is given, but {format} has no use for it; leave it out")
    return given


def _model_and_data(options: TrainOptions) -> tuple[LoadedModel, Examples]:
    if options.data is None:
        raise UserError("there is nothing to train on; give DATA or --store")
    load = options.loading.sketch if options.dry_run else options.loading.load
    loaded = load(options.model, options.read)
    return loaded, read_data(options.data, options.reading, loaded)


def _layers(text: str) -> range:
    """`8-15` or `8`, as a range."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not match:
        raise UserError(f"layers are {text!r}; give them as in 8-15")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"{name} is {number}; choose at least 1")


def _wiring(model: LoadedModel, span: int | None, first_target: int) -> Wiring:
    return Wiring.full(model.n_layers, first_target) if span is None else Wiring(model.n_layers, span, first_target)


def _load_run(run: str, model: str | None, loading: ModelOptions) -> tuple[CrossLayerTranscoder, LoadedModel]:
    coder = CrossLayerTranscoder.load(run)
    came_from = coder.provenance
    name = model or came_from.model_id
    if not name:
        raise UserError(f"{run}: does not say which model it was trained on; add --model")
    revision = loading.revision or (None if model else came_from.revision or None)
    return coder, replace(loading, revision=revision).load(name, came_from.read)


def _print_skipped(data: Examples | None) -> None:
    if data is not None and data.skipped.reasons:
        print(data.skipped)


def _held_out(model: LoadedModel, data: str | None, reading: Reading, prompts: int) -> Examples:
    if data is None and model.id != "emoji-llava":
        raise UserError(f"name the DATA to evaluate on; {EMOJI_SCENES} are for the bundled model only")
    if data in (None, EMOJI_SCENES) and reading.split is None:
        reading = replace(reading, split="test")
    return read_data(data or EMOJI_SCENES, reading, model, n=prompts)
