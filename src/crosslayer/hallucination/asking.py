"""A model's own answers to queries, labelled: in memory, or by way of a file, from which an interrupted run goes on."""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crosslayer.answering import UNFINISHED, Answering, respond
from crosslayer.distributed.crew import ALONE, Crew
from crosslayer.errors import UserError
from crosslayer.files import read_json, write_json
from crosslayer.hallucination.answers import read_answers
from crosslayer.hallucination.labelling import Said, label
from crosslayer.hallucination.responses import Query, Response
from crosslayer.hallucination.synonyms import SynonymTable
from crosslayer.hallucination.tasks import Task
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import prepare
from crosslayer.replacement.model import as_text, continuation, without_end

ANSWERS, SETTINGS = "answers.jsonl", "asked.json"
"""In a folder of results: the answers as `respond` writes them, and what was asked of whom."""


def ask(
    model: LoadedModel,
    queries: Sequence[Query],
    folder: Path,
    table: SynonymTable,
    *,
    max_new_tokens: int = 128,
    batch_prompts: int = 16,
) -> list[Response]:
    """What the model, as it is now, answers greedily: a response to each query, in their order.

    Hooks that are in place count, so that the same queries can be asked of a replacement model or under an edit, and
    the responses compared one by one. Responses are queries too: what an original was asked can be asked again.

    Args:
        model: who answers.
        queries: what is asked; every picture must be readable.
        folder: that their paths of pictures are relative to.
        table: the words for the objects.
        max_new_tokens: of an answer at most.
        batch_prompts: answered together.
    """
    said: list[Said] = []
    bar = tqdm(range(0, len(queries), batch_prompts), unit="batch", desc="ask", disable=None, leave=False)
    for start in bar:
        examples = [query.example(folder) for query in queries[start : start + batch_prompts]]
        batch = prepare(model.model, model.processor, examples)
        generated = continuation(model, batch, max_new_tokens=max_new_tokens)
        pairs = zip(as_text(model, generated), without_end(model, generated), strict=True)
        said += [Said(text, tuple(ids)) for text, ids in pairs]
    return [label(query, words, table, model.processor) for query, words in zip(queries, said, strict=True)]


def ask_on_disk(
    model: LoadedModel,
    task: Task,
    out: Path,
    settings: Answering,
    *,
    name: str,
    resume: bool = False,
    crew: Crew = ALONE,
) -> dict[str, Said]:
    """What the model answers to a task, by id of the query; queries whose pictures are bad are left out, and listed.

    Args:
        model: who answers, as it is now.
        task: what is asked.
        out: folder of the results, with no others in it unless under `resume`.
        settings: how answers are generated.
        name: of who answers, to be told apart at a resume.
        resume: go on after the last whole batch; answers that are complete are taken as they are.
        crew: the processes that share the work; all of them have the answers.

    Raises:
        UserError: when there is something else to resume.
    """
    asked = {"model": name, "task": task.name, "queries": len(task.queries), "digest": _digest(task), **vars(settings)}
    answers = out / ANSWERS

    def begin() -> tuple[bool, bool]:
        started = answers.exists() or answers.with_name(ANSWERS + UNFINISHED).exists()
        if resume and started:
            _check_same(out / SETTINGS, asked)
        write_json(out / SETTINGS, asked)
        task.save_pictures(out)
        return started, answers.exists()

    started, finished = crew.first(begin)
    if not finished:
        respond(model, task.examples(out), answers, settings, resume=resume and started, crew=crew)
    return {answer.id: answer.said for answer in read_answers(answers) if answer.id is not None}


def _check_same(path: Path, asked: dict[str, Any]) -> None:
    kept = read_json(path)
    for key, value in asked.items():
        if kept.get(key) != value:
            raise UserError(
                f"{path}: was started with {key} = {kept.get(key)}, now {value} is asked for; resume with the same "
                "settings or start anew with --overwrite"
            )


def _digest(task: Task) -> str:
    """Tells one list of queries from another."""
    return blake2b(repr([(q.id, q.prompt, q.truth) for q in task.queries]).encode(), digest_size=8).hexdigest()
