"""The verb `hallucination suppress`: an edit of the original model under which it names less that is not there."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.data.load import EMOJI_SCENES
from crosslayer.data.reading import DATA_KINDS
from crosslayer.errors import UserError
from crosslayer.files import read_json
from crosslayer.hallucination.responses import RESPONSES, read_responses
from crosslayer.hallucination.rewriting import without
from crosslayer.hallucination.suppress.calibration import Calibration
from crosslayer.hallucination.suppress.everything import EDIT, Contest, Plan, read_features
from crosslayer.hallucination.suppress.objective import Weighing
from crosslayer.hallucination.suppress.protocol import Protocol, Trial
from crosslayer.hallucination.synonyms import EMOJI, load_table
from crosslayer.model_options import AS_SAVED, RunOptions
from crosslayer.models.load import LoadedModel
from crosslayer.processes import do_at_once
from crosslayer.verbs.arguments import OtherModel, Run, RunLoading, check_positive, load_run
from crosslayer.verbs.scoring import SCORE, Truth, score
from crosslayer.verbs.suppress_tables import suppress_tables

SCENES = 500
"""Of each kind, where none have been scored: 200 of each for the test."""


def suppress(
    run: Run,
    data: Annotated[
        Positional[str | None],
        arg(metavar="DATA", help=f"What to score first where --out holds no responses. {DATA_KINDS}"),
    ] = None,
    *,
    out: Annotated[Path, arg(help="Folder of the results of `score`; adds suppress.json, edit.json and suppress/.")],
    beside: Annotated[
        str | None, arg(help="Another run on the same model, a PLT for one, by the same descent.")
    ] = None,
    circuit: Annotated[Path | None, arg(help="JSON list of features (layer, feature) to try as one whole.")] = None,
    plan: Annotated[Plan, arg(name="")] = Plan(),  # noqa: B008
    weighing: Annotated[Weighing, arg(name="")] = Weighing(),  # noqa: B008
    calibration: Annotated[Calibration, arg(name="")] = Calibration(),  # noqa: B008
    control_images: Annotated[
        int, arg(help="Images of the test on which chance is measured.")
    ] = Protocol.control_images,
    seed: Annotated[int, arg(help="Seed of the splits, of all that is drawn, and of scenes to score first.")] = 0,
    batch_prompts: Annotated[int, arg(help="Prompts in one pass.")] = Protocol.batch_prompts,
    again: Annotated[bool, arg(help="Test once more what was tested with other settings; the files count it.")] = False,
    workers: Annotated[int, arg(help="Processes that try methods, each with one thread.")] = 1,
    model: OtherModel = None,
    loading: RunLoading = AS_SAVED,
) -> None:
    """Suppress hallucination: turn down features of the original model, its errors kept, as far as little is lost.

    Features and how much of each is taken away are chosen on one part of the images, the dose on a second, and the
    result is measured once on a third, beside a difference of means, a linear probe, and features and directions drawn
    by lot. A method that is finished is read from its file.
    """
    check_positive(control_images=control_images, batch_prompts=batch_prompts, workers=workers)
    coder, loaded = load_run(run, model, loading)
    if not (out / RESPONSES).exists():
        score(
            loaded.id,
            data,
            out=out,
            truth=Truth(questions=1),
            limit=SCENES,
            seed=seed,
            batch_prompts=batch_prompts,
            loading=loading,
        )
    settings = Protocol(
        weighing=weighing,
        calibration=calibration,
        control_images=control_images,
        seed=seed,
        batch_prompts=batch_prompts,
    )
    trial = partial(trial_in, out, settings=settings, again=again)
    made = partial(_contest, plan=plan, beside=beside, circuit=circuit, loading=loading)
    contest = made(coder, trial(loaded))
    if workers > 1:
        load = partial(_loaded, run, model, loading, trial, made)
        do_at_once(workers, load, contest.rounds, desc="suppress")
    print(suppress_tables(contest.result()))
    print(f"\nthe edit is {out / EDIT}; try it: crosslayer generate {run} --edit {out / EDIT} --prompt ... --image ...")


def _contest(
    coder: CrossLayerTranscoder,
    trial: Trial,
    *,
    plan: Plan,
    beside: str | None,
    circuit: Path | None,
    loading: RunOptions,
) -> Contest:
    other = None if beside is None else CrossLayerTranscoder.load(beside, offload=loading.offload).requires_grad_(False)
    features = () if circuit is None else read_features(circuit)
    return Contest(trial=trial, coder=coder, plan=plan, beside=other, circuit=features)


def _loaded(
    run: str, model: str | None, loading: RunOptions, trial: Callable[..., Trial], made: Callable[..., Contest]
) -> Contest:
    """The same in a process of its own."""
    coder, loaded = load_run(run, model, loading)
    return made(coder, trial(loaded))


def trial_in(out: Path, model: LoadedModel, settings: Protocol, *, again: bool = False) -> Trial:
    """What edits are tried on: the responses that `score` left in a folder.

    Raises:
        UserError: when they are another model's, naming both.
    """
    responses, about = read_responses(out / RESPONSES), read_json(out / SCORE)
    if about["model"] not in ("", model.id):
        raise UserError(
            f"{out / RESPONSES}: answers of {about['model']}, but the run was trained on {model.id}; score that model"
        )
    table, bundled = load_table(about.get("synonyms") or EMOJI), about["data"] == EMOJI_SCENES
    return Trial(model, responses, out, table, settings, without=without if bundled else None, again=again)
