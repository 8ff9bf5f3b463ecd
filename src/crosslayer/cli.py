"""The command line: one subcommand per verb, each of which parses, calls and prints."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import huggingface_hub
import transformers
import tyro
from tyro.conf import Positional, arg

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.data.examples import Example, Examples, open_image
from crosslayer.data.load import EMOJI_SCENES, load_data
from crosslayer.demo import DEFAULT_TOKENS, MODEL, run_demo
from crosslayer.eleuther_options import translate
from crosslayer.errors import UserError
from crosslayer.evaluation import evaluate as run_evaluation
from crosslayer.files import claim_folder, write_json, write_text
from crosslayer.formats import (
    read_circuit_tracer,
    read_eleuther,
    read_gemma_scope,
    write_circuit_tracer,
    write_eleuther,
)
from crosslayer.model_options import AS_IT_IS, ModelOptions
from crosslayer.models.load import LoadedModel, load_model
from crosslayer.options import TrainOptions
from crosslayer.planning import estimate
from crosslayer.replacement.model import ReplacementModel
from crosslayer.replacement.model import generate as run_generation
from crosslayer.report import comparison_table, cost_table, evaluation_table, inspection, side_by_side, write_report
from crosslayer.wiring import Wiring
from crosslayer.workflow import RUN_FILES, adopt
from crosslayer.workflow import train as run_training

READERS: dict[str, Any] = {
    "eleuther": read_eleuther,
    "circuit-tracer": read_circuit_tracer,
    "gemma-scope": read_gemma_scope,
}
WRITERS: dict[str, Any] = {"eleuther": write_eleuther, "circuit-tracer": write_circuit_tracer}

Model = Annotated[
    Positional[str], arg(metavar="MODEL", help="Bundled name (emoji-llava, smollm2), model folder, or hub id.")
]
Data = Annotated[Positional[str], arg(metavar="DATA", help="emoji-scenes, a text file (a line each), or JSON lines.")]
Run = Annotated[Positional[str], arg(metavar="RUN", help="Folder of a trained transcoder, or its hub id.")]
Images = Annotated[Path | None, arg(help="Folder that image paths in DATA are relative to; DATA's own by default.")]
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
    """Train a transcoder on a model's activations; Ctrl-C keeps a state that --resume goes on from.

    EleutherAI's option names (--cross_layer, --coalesce_topk, ...) work too.
    """
    load = options.loading.sketch if options.dry_run else options.loading.load
    loaded = load(options.model, options.read)
    start = None if options.finetune is None else CrossLayerTranscoder.load(options.finetune)
    configs = [options.config(loaded.n_layers, start, seed) for seed in options.seed]
    data = load_data(options.data, options.images, loaded)
    if options.dry_run:
        print(cost_table(estimate(loaded, data, configs[0], options.out), len(configs)))
        return
    for config in configs:
        run = options.out if len(configs) == 1 else options.out / f"seed-{config.seed}"
        coder = run_training(
            loaded, data, config, run, start=options.finetune, resume=options.resume, overwrite=options.overwrite
        )
        counted = coder.provenance.training["counted"]
        print(
            f"trained on {counted['tokens']:,} tokens; left out {counted['first_left_out']:,} first positions "
            f"and {counted['outliers_left_out']:,} norm outliers\nnext: crosslayer evaluate {run}"
        )


def evaluate(
    run: Run,
    data: Annotated[
        Positional[str | None], arg(help="Held-out data; the bundled scenes for the bundled model.")
    ] = None,
    images: Images = None,
    prompts: Annotated[int, arg(help="How many examples to use at most.")] = 128,
    json: Annotated[Path | None, arg(help="File for all figures, per layer and modality too.")] = None,
    model: OtherModel = None,
    loading: Loading = AS_IT_IS,
) -> None:
    """Measure how well a run's replacement model stands in for the original."""
    coder, loaded = _load_run(run, model, loading)
    result = run_evaluation(loaded, coder, _held_out(loaded, data, images, prompts))
    if json is not None:
        write_text(json, result.to_json() + "\n")
    print(evaluation_table(result))


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


def import_(
    format: Annotated[Positional[str], arg(metavar="FORMAT", help=f"One of {', '.join(READERS)}.")],
    source: Annotated[Positional[Path], arg(metavar="SRC", help="Folder to read.")],
    out: Annotated[Path, arg(help="Folder of the run to write.")],
    model: Annotated[str | None, arg(help="Model it is of; its writes at first positions are measured.")] = None,
    data: Annotated[str | None, arg(help="Data to measure that on.")] = None,
    overwrite: Overwrite = False,
    loading: Loading = AS_IT_IS,
) -> None:
    """Turn transcoders trained elsewhere into a run that every verb takes."""
    coder = _format(READERS, format)(source)
    if (model is None) != (data is None):
        raise UserError("give --model and --data together, or neither")
    if model is not None and data is not None:
        loaded = loading.load(model, coder.provenance.read)
        adopt(loaded, load_data(data, model=loaded), coder)
    claim_folder(out, overwrite, RUN_FILES)
    coder.save(out)
    print(f"{out}: {coder.wiring.n_layers} layers of {coder.d_transcoder:,} features\nnext: crosslayer evaluate {out}")


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
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
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


def _held_out(model: LoadedModel, data: str | None, images: Path | None, prompts: int) -> Examples:
    if data is None and model.id != "emoji-llava":
        raise UserError(f"name the DATA to evaluate on; {EMOJI_SCENES} are for the bundled model only")
    return load_data(data or EMOJI_SCENES, images, model, split="test", n=prompts)
