"""The verb `hallucination score`: how much of what a model says is not there."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from crosslayer.answering import Answering
from crosslayer.coders.checkpoint import is_run
from crosslayer.data.examples import Examples
from crosslayer.data.load import EMOJI_SCENES, read_data
from crosslayer.data.reading import DATA_KINDS, Reading
from crosslayer.distributed.joining import crew
from crosslayer.errors import UserError
from crosslayer.files import check_folder, claim_folder, write_json, write_text
from crosslayer.hallucination.answers import captions_task, match, read_answers
from crosslayer.hallucination.asking import ANSWERS, SETTINGS, ask_on_disk
from crosslayer.hallucination.coco import read_truths
from crosslayer.hallucination.labelling import Said
from crosslayer.hallucination.responses import RESPONSES, write_responses
from crosslayer.hallucination.scenes import scene_task
from crosslayer.hallucination.scoring import label_all
from crosslayer.hallucination.scoring import score as run_score
from crosslayer.hallucination.synonyms import COCO, load_table
from crosslayer.hallucination.tasks import QUESTION_TEXT, Task, caption_task, pope_task
from crosslayer.model_options import AS_SAVED, RunOptions
from crosslayer.models.load import LoadedModel
from crosslayer.replacement.model import ReplacementModel
from crosslayer.verbs.arguments import HowRead, Overwrite, RunLoading, check_positive, load_run
from crosslayer.verbs.hallucination_tables import score_tables

SCORE = "score.json"
BUNDLED_MODEL = "emoji-llava"
FILES = (RESPONSES, SCORE, "score.csv", f"{ANSWERS}*", "answers.skipped.jsonl", SETTINGS)
"""What an earlier run leaves in --out; its pictures stay and are used again."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is known of the pictures, and the words for it."""

    instances: Path | None = None
    """COCO's instances_*.json, to score captions of DATA's images; without it DATA is POPE's questions."""
    captions: Path | None = None
    """COCO's captions_*.json: what reference captions name is there, too, as in CHAIR."""
    synonyms: str | None = None
    """coco (the default), or a file with a line an object: name, synonyms; the bundled scenes have their own words."""
    questions: int = 3
    """Objects there to ask about, at most, for each image; as many absent ones for each sampling; 0: only captions."""
    question_text: str = QUESTION_TEXT
    """How to ask about the objects of COCO's images, {} being one with its article."""

    def __post_init__(self):
        if self.questions < 0:
            raise UserError(f"questions is {self.questions}; choose at least 0")
        if self.captions is not None and self.instances is None:
            raise UserError("--captions is given without --instances; CHAIR's truth needs both")


def score(
    model: Annotated[
        Positional[str | None],
        arg(metavar="MODEL_OR_RUN", help="Model, or run whose replacement model is to answer; the bundled model."),
    ] = None,
    data: Annotated[
        Positional[str | None], arg(metavar="DATA", help=f"{DATA_KINDS} {EMOJI_SCENES} by default.")
    ] = None,
    *,
    out: Annotated[Path, arg(help="Folder of the results: responses.jsonl, score.json, score.csv.")],
    reading: HowRead = Reading(),  # noqa: B008
    truth: Annotated[Truth, arg(name="")] = Truth(),
    answers: Annotated[
        Path | None,
        arg(help="Answers that exist already, as `respond` or LLaVA writes them; MODEL then only lends its tokenizer."),
    ] = None,
    limit: Annotated[int | None, arg(help="Scenes of each kind (100), or rows of DATA (all), at most.")] = None,
    seed: Annotated[int, arg(help="Seed of the scenes and of the questions.")] = 0,
    max_new_tokens: Annotated[int, arg(help="Tokens of an answer at most.")] = Answering.max_new_tokens,
    batch_prompts: Annotated[int, arg(help="Prompts answered together.")] = Answering.batch_prompts,
    resume: Annotated[bool, arg(help="Go on after an interruption, to the result of an unbroken run.")] = False,
    overwrite: Overwrite = False,
    loading: RunLoading = AS_SAVED,
) -> None:
    """Score hallucination: CHAIR of a model's captions and POPE of its yes-or-no answers, all greedy.

    On the bundled scenes the truth is exact and hallucination is planted. Elsewhere DATA is POPE's questions, or images
    with --instances (and --captions) of COCO. The labelled responses are what the other hallucination verbs read.
    """
    if limit is not None:
        check_positive(limit=limit)
    here = crew()
    resume = resume or here.restarted
    if answers is not None:
        here.dismiss()
    if not resume:
        here.first(lambda: check_folder(out, overwrite))
    if answers is not None:
        task, said = _existing(data, reading, truth, answers, limit)
        processor = None if model is None else loading.processor(model)
        _claim(out, resume, overwrite)
    else:
        speaker = _speaker(model or BUNDLED_MODEL, loading)
        task, processor = _task(speaker.model, data, reading, truth, limit, seed), speaker.model.processor
        here.first(lambda: _claim(out, resume, overwrite))
        settings = Answering(max_new_tokens=max_new_tokens, batch_prompts=batch_prompts)
        with speaker.speaking:
            said = ask_on_disk(speaker.model, task, out, settings, name=speaker.name, resume=resume, crew=here)
    here.dismiss()
    responses = label_all(task, said, processor)
    result = run_score(responses)
    about = {"model": model or ("" if answers else BUNDLED_MODEL), "data": task.name, "synonyms": task.table.name}
    write_responses(out / RESPONSES, responses)
    write_json(out / SCORE, {**about, **result.to_dict()})
    write_text(out / "score.csv", result.to_csv())
    print("\n".join([score_tables(result), *_left_out(task, len(responses))]))


def _left_out(task: Task, answered: int) -> list[str]:
    n = len(task.queries)
    unanswered = [f"{n - answered:,} of {n:,} queries have no answer"] if answered < n else []
    return unanswered + ([str(task.skipped)] if task.skipped.reasons else [])


@dataclass(frozen=True)
class _Speaker:
    """Who answers: a model as it is, or with its MLPs replaced."""

    name: str
    model: LoadedModel
    speaking: AbstractContextManager[None]


def _speaker(name: str, loading: RunOptions) -> _Speaker:
    if not is_run(name):
        if loading.offload:
            raise UserError(f"--offload is given, but {name} is a model and no run; leave it out")
        loaded = loading.load(name)
        return _Speaker(name, loaded, nullcontext())
    coder, loaded = load_run(name, None, loading)
    return _Speaker(name, loaded, ReplacementModel(loaded, coder).replaced())


def _task(model: LoadedModel, data: str | None, reading: Reading, truth: Truth, limit: int | None, seed: int) -> Task:
    """What to ask the model."""
    if data is None and model.id != BUNDLED_MODEL:
        raise UserError(f"name the DATA to ask {model.id} about; {EMOJI_SCENES} are for the bundled model only")
    if data in (None, EMOJI_SCENES):
        if (truth.instances, truth.synonyms) != (None, None) or reading != Reading(split=reading.split):
            raise UserError(
                f"{EMOJI_SCENES}: bring their own truth, words and prompts; leave --instances, --synonyms and all "
                "options of DATA but --split out"
            )
        return scene_task(limit or 100, questions=truth.questions, split=reading.split or "test", seed=seed)
    return _pictures(read_data(data, reading, model, n=limit), data, truth, seed)


def _pictures(examples: Examples, data: str, truth: Truth, seed: int) -> Task:
    table = load_table(truth.synonyms or COCO)
    if truth.instances is None:
        return pope_task(examples, Path(data), table)
    truths = read_truths(truth.instances, truth.captions, table)
    return caption_task(
        examples, truths, table, questions=truth.questions, question_text=truth.question_text, seed=seed
    )


def _existing(
    data: str | None, reading: Reading, truth: Truth, answers: Path, limit: int | None
) -> tuple[Task, Mapping[str, Said]]:
    """Answers that exist already, and what they answer: DATA's questions, or captions of images with --instances."""
    found = read_answers(answers)
    if (data is None) == (truth.instances is None):
        raise UserError(
            f"{answers}: what do these answer? name POPE's questions as DATA, or, for captions, --instances; not both"
        )
    table = load_table(truth.synonyms or COCO)
    if data is not None:
        task = pope_task(read_data(data, reading, n=limit), Path(data), table)
        matched = match(found, task)
    else:
        truths = read_truths(truth.instances, truth.captions, table) if truth.instances else {}
        task, matched = captions_task(found[slice(limit)], truths, table, reading.images or answers.parent)
    if matched.unasked:
        print(f"{matched.unasked:,} of {len(found):,} answers are to something else and were left out")
    return task, matched.said


def _claim(out: Path, resume: bool, overwrite: bool) -> None:
    if not resume:
        claim_folder(out, overwrite, FILES)
