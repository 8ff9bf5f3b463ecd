"""The command line: one subcommand per verb, each of which parses, calls and prints."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import huggingface_hub
import transformers
import tyro
from tyro.conf import Positional, arg

from crosslayer.coders.sparsity import KINDS, Sparsity, read_sparsity
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.data.examples import Example, Examples, open_image
from crosslayer.data.load import EMOJI_SCENES, load_data
from crosslayer.demo import DEFAULT_TOKENS, MODEL, run_demo
from crosslayer.errors import UserError
from crosslayer.evaluation import evaluate as run_evaluation
from crosslayer.files import claim_folder, write_json, write_text
from crosslayer.models.load import LoadedModel, load_model
from crosslayer.replacement.model import ReplacementModel
from crosslayer.replacement.model import generate as run_generation
from crosslayer.report import comparison_table, evaluation_table, inspection, side_by_side, write_report
from crosslayer.training.config import TrainConfig
from crosslayer.wiring import Wiring
from crosslayer.workflow import train as run_training

Model = Annotated[Positional[str], arg(metavar="MODEL", help="Bundled name (emoji-llava), model folder, or hub id.")]
Data = Annotated[Positional[str], arg(metavar="DATA", help="emoji-scenes, a text file (a line each), or JSON lines.")]
Run = Annotated[Positional[str], arg(metavar="RUN", help="Folder of a trained transcoder, or its hub id.")]
Images = Annotated[Path | None, arg(help="Folder that image paths in DATA are relative to; DATA's own by default.")]
Read = Annotated[str, arg(help="What the encoders read: resid (before the MLP's norm) or mlp_in (after).")]
Revision = Annotated[str | None, arg(help="Revision of a hub id.")]
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
    revision: Revision = None,
    read: Annotated[
        str, arg(help="What the encoders read: resid (before the MLP's norm) or mlp_in (after).")
    ] = "resid",
    span: Annotated[int | None, arg(help="Layers a source writes to, for the wiring table; all by default.")] = None,
    first_target: FirstTarget = 0,
) -> None:
    """Print a model's sites, sizes and the self-test: residual identity and self-replacement."""
    loaded = load_model(model, revision=revision, read=read)
    print(inspection(loaded, _wiring(loaded, span, first_target)))


def train(
    model: Model,
    data: Data,
    out: Annotated[Path, arg(help="Folder of the run.")],
    images: Images = None,
    tokens: Annotated[int, arg(help="Tokens to train on; data is repeated in new orders as needed.")] = 1_000_000,
    seed: Seed = 0,
    span: Annotated[int | None, arg(help="Layers a source writes to: 1 is a PLT, all (default) the full CLT.")] = None,
    first_target: FirstTarget = 0,
    d_transcoder: Annotated[int | None, arg(help="Features a layer; overrides --expansion.")] = None,
    expansion: Annotated[int, arg(help="Features a layer in multiples of d_model.")] = 8,
    sparsity: Annotated[str, arg(help=f"One of {', '.join(KINDS)}.")] = "joint-topk",
    k: Annotated[int | None, arg(help="Active features a token: over all layers (joint-topk), a layer (topk).")] = None,
    penalty: Annotated[float | None, arg(help="Weight of the sparsity penalty of relu and jumprelu.")] = None,
    learning_rate: Annotated[float | None, arg(help="Adam's peak rate; 12 / features a layer, at most 0.016.")] = None,
    batch_tokens: Annotated[int, arg(help="Tokens a step, about.")] = 1024,
    read: Annotated[
        str, arg(help="What the encoders read: resid (before the MLP's norm) or mlp_in (after).")
    ] = "resid",
    revision: Revision = None,
    resume: Annotated[bool, arg(help="Go on from the state in --out, to the result of an unbroken training.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a transcoder on a model's activations; Ctrl-C keeps a state that --resume goes on from."""
    loaded = load_model(model, revision=revision, read=read)
    config = TrainConfig(
        wiring=_wiring(loaded, span, first_target),
        sparsity=_sparsity(sparsity, k, penalty),
        d_transcoder=d_transcoder,
        expansion=expansion,
        tokens=tokens,
        batch_tokens=batch_tokens,
        learning_rate=learning_rate,
        seed=seed,
    )
    coder = run_training(loaded, load_data(data, images, loaded), config, out, resume=resume, overwrite=overwrite)
    counted = coder.provenance.training["counted"]
    print(
        f"trained on {counted['tokens']:,} tokens; left out {counted['first_left_out']:,} first positions "
        f"and {counted['outliers_left_out']:,} norm outliers\nnext: crosslayer evaluate {out}"
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
) -> None:
    """Measure how well a run's replacement model stands in for the original."""
    coder, loaded = _load_run(run, model)
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
) -> None:
    """Let the original and the replacement answer the same prompt, side by side."""
    _check_positive(max_new_tokens=max_new_tokens)
    if temperature < 0:
        raise UserError(f"temperature is {temperature}; choose 0 for greedy or more")
    coder, loaded = _load_run(run, model)
    examples = [Example("prompt", prompt, image=None if image is None else open_image(image))]
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if temperature:
        settings |= {"do_sample": True, "temperature": temperature}
    original = run_generation(loaded, examples, **settings)[0]
    replaced = ReplacementModel(loaded, coder).generate_batch(examples, **settings)[0]
    print(side_by_side({"original": original, "replacement": replaced}))


VERBS = {"demo": demo, "inspect": inspect, "train": train, "evaluate": evaluate, "generate": generate}


def main() -> None:
    """Entry point: exit code 0, 2 for bad input with one line on standard error, 130 after Ctrl-C."""
    args = sys.argv[1:]
    debug = "--debug" in args
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    try:
        tyro.extras.subcommand_cli_from_dict(
            VERBS, prog="crosslayer", description=_DESCRIPTION, args=[a for a in args if a != "--debug"]
        )
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


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"{name} is {number}; choose at least 1")


def _wiring(model: LoadedModel, span: int | None, first_target: int) -> Wiring:
    return Wiring.full(model.n_layers, first_target) if span is None else Wiring(model.n_layers, span, first_target)


def _sparsity(kind: str, k: int | None, penalty: float | None) -> Sparsity:
    settings = {"k": k, "coefficient": penalty}
    given = {name: value for name, value in settings.items() if value is not None}
    if "topk" in kind and k is None:
        given["k"] = 64 if kind == "joint-topk" else 8
    return read_sparsity({"kind": kind, **given})


def _load_run(run: str, model: str | None) -> tuple[CrossLayerTranscoder, LoadedModel]:
    coder = CrossLayerTranscoder.load(run)
    came_from = coder.provenance
    name = model or came_from.model_id
    if not name:
        raise UserError(f"{run}: does not say which model it was trained on; add --model")
    revision = None if model else came_from.revision or None
    return coder, load_model(name, revision=revision, read=came_from.read)


def _held_out(model: LoadedModel, data: str | None, images: Path | None, prompts: int) -> Examples:
    if data is None and model.id != "emoji-llava":
        raise UserError(f"name the DATA to evaluate on; {EMOJI_SCENES} are for the bundled model only")
    return load_data(data or EMOJI_SCENES, images, model, split="test", n=prompts)
