"""Verbs that look: at a model, and at what stands in for its MLPs."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from crosslayer.data.examples import Example, Examples
from crosslayer.data.images import open_image
from crosslayer.data.load import EMOJI_SCENES, read_data
from crosslayer.data.reading import Reading
from crosslayer.distributed.joining import crew
from crosslayer.errors import UserError
from crosslayer.evaluation import evaluate as run_evaluation
from crosslayer.files import write_text
from crosslayer.model_options import AS_IT_IS, AS_SAVED
from crosslayer.models.load import LoadedModel
from crosslayer.replacement.loading_edits import load_edit
from crosslayer.replacement.model import ReplacementModel
from crosslayer.replacement.model import generate as run_generation
from crosslayer.report import (
    evaluation_table,
    inspection,
    remarks,
    side_by_side,
)
from crosslayer.verbs.arguments import (
    FirstTarget,
    HowRead,
    Loading,
    Model,
    OtherModel,
    Plain,
    Run,
    RunLoading,
    check_positive,
    load_run,
    print_skipped,
)
from crosslayer.wiring import Wiring


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


def evaluate(
    run: Run,
    data: Annotated[
        Positional[str | None], arg(help="Held-out data; the bundled scenes for the bundled model.")
    ] = None,
    reading: HowRead = Reading(),  # noqa: B008
    prompts: Annotated[int, arg(help="How many examples to use at most.")] = 128,
    json: Annotated[Path | None, arg(help="File for all figures, per layer and modality too.")] = None,
    model: OtherModel = None,
    loading: RunLoading = AS_SAVED,
) -> None:
    """Measure how well a run's replacement model stands in for the original."""
    coder, loaded = load_run(run, model, loading)
    examples = _held_out(loaded, data, reading, prompts)
    here = crew()
    if json is not None and here.leads:
        examples.skipped.list_in(json.with_suffix(".skipped.jsonl"))
    result = run_evaluation(loaded, coder, examples, crew=here)
    here.dismiss()
    if json is not None:
        write_text(json, result.to_json() + "\n")
    print("\n".join([*remarks(coder), evaluation_table(result)]))
    print_skipped(examples)


def generate(
    run: Run,
    prompt: Annotated[str, arg(help="What to say to the model; <image> marks where the image goes, first by default.")],
    image: Annotated[Path | None, arg(help="Picture to show it.")] = None,
    max_new_tokens: Annotated[int, arg(help="Tokens to generate at most.")] = 32,
    plain: Plain = False,
    edit: Annotated[Path | None, arg(help="Edit file for this run: the original under it answers too.")] = None,
    temperature: Annotated[float, arg(help="0 is greedy; above it, sampling.")] = 0.0,
    model: OtherModel = None,
    loading: RunLoading = AS_SAVED,
) -> None:
    """Let the original, the replacement, and the original under an edit answer the same prompt, side by side."""
    check_positive(max_new_tokens=max_new_tokens)
    if temperature < 0:
        raise UserError(f"temperature is {temperature}; choose 0 for greedy or more")
    coder, loaded = load_run(run, model, loading)
    editing = None if edit is None else load_edit(edit, loaded, coder)
    examples = [
        Example("prompt", prompt, form="text" if plain else "chat", image=None if image is None else open_image(image))
    ]
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if temperature:
        settings |= {"do_sample": True, "temperature": temperature}
    answers = {"original": run_generation(loaded, examples, **settings)[0]}
    answers["replacement"] = ReplacementModel(loaded, coder).generate_batch(examples, **settings)[0]
    if editing is not None:
        with editing:
            answers["edited"] = run_generation(loaded, examples, **settings)[0]
    print(side_by_side(answers))


def _wiring(model: LoadedModel, span: int | None, first_target: int) -> Wiring:
    return Wiring.full(model.n_layers, first_target) if span is None else Wiring(model.n_layers, span, first_target)


def _held_out(model: LoadedModel, data: str | None, reading: Reading, prompts: int) -> Examples:
    if data is None and model.id != "emoji-llava":
        raise UserError(f"name the DATA to evaluate on; {EMOJI_SCENES} are for the bundled model only")
    if data in (None, EMOJI_SCENES) and reading.split is None:
        reading = replace(reading, split="test")
    return read_data(data or EMOJI_SCENES, reading, model, n=prompts)
