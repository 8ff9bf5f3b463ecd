"""Answers that exist already, in the layouts that tools write them, and whose queries they answer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosslayer.data.load import READERS
from crosslayer.data.rows import IMAGE, IMAGE_MARK, PROMPT
from crosslayer.data.splits import name_key
from crosslayer.errors import UserError
from crosslayer.hallucination.labelling import Said
from crosslayer.hallucination.responses import CAPTION, Query
from crosslayer.hallucination.synonyms import SynonymTable
from crosslayer.hallucination.tasks import Task

ID = ("question_id", "id")
TEXT = ("response", "answer", "text", "caption", "output", "completion")
"""Keys that are looked for, in this order; those of prompts and images are those of data."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer of a file, and what the file says of what it answers."""

    place: str
    """File and line."""
    id: str | None
    image: str | None
    """Path of the picture, as the file has it."""
    prompt: str | None
    said: Said

    @property
    def image_id(self) -> str | None:
        """What the picture is known by; see `crosslayer.hallucination.tasks.image_id`."""
        return None if self.image is None else name_key(self.image).decode()


def read_answers(path: Path) -> list[Answer]:
    """The answers of JSON lines or of a JSON list, as `crosslayer respond` or LLaVA's evaluation writes them.

    Raises:
        UserError: when there is no such file, it is empty, or a row holds no answer.
    """
    if not path.is_file() or path.suffix not in READERS:
        raise UserError(f"{path}: no such file of answers; give JSON lines with 'question_id' (or 'image') and 'text'")
    rows = READERS[path.suffix](path)
    if not rows.n:
        raise UserError(f"{path}: holds no answers")
    return [_answer(rows.id(i), rows.read(i)) for i in range(rows.n)]


@dataclass(frozen=True)
class Matched:
    """What was said to the queries of a task."""

    said: Mapping[str, Said]
    """By id of the query."""
    unasked: int
    """Answers to something else."""


def match(answers: Sequence[Answer], task: Task) -> Matched:
    """Find what each answer answers: by the query's id, or else by picture and prompt.

    Raises:
        UserError: when none answers a query of the task, one names a query's id and another prompt, or two answer the
            same.
    """
    by_id = {query.id: query for query in task.queries}
    by_prompt = {(query.image_id, _plain(query.prompt)): query for query in task.queries}
    said: dict[str, Said] = {}
    unasked: list[Answer] = []
    for answer in answers:
        query = by_id.get(answer.id or "") or by_prompt.get((answer.image_id or "", _plain(answer.prompt or "")))
        if query is None:
            unasked.append(answer)
            continue
        _check_prompt(answer, query, task.name)
        if query.id in said:
            raise UserError(f"{answer.place}: answers {query.id} for the second time; leave one out")
        said[query.id] = answer.said
    if not said:
        raise UserError(
            f"{unasked[0].place}: none of {len(unasked)} answers is to a question of {task.name}, by question_id "
            "or by image and prompt; give the answers to these questions"
        )
    return Matched(said, len(unasked))


def captions_task(
    answers: Sequence[Answer], truths: Mapping[str, Sequence[str]], table: SynonymTable, images: Path
) -> tuple[Task, Matched]:
    """Captions that exist, as a task with its answers.

    Args:
        answers: captions with their pictures.
        truths: the objects of each picture, by the name of its file.
        table: the words for the objects.
        images: folder of the pictures.

    Raises:
        UserError: when none is of a picture whose objects are known, or two are of the same with the same prompt.
    """
    known = [answer for answer in answers if answer.image_id in truths]
    if not known:
        found = answers[0].image or "no image"
        raise UserError(
            f"{answers[0].place}: none of {len(answers)} answers is about an image of the annotations; the first is "
            f"about {found}"
        )
    queries, said = [], {}
    files = {name_key(path.name).decode(): path for path in sorted(images.iterdir())} if images.is_dir() else {}
    for answer in known:
        query = _captioned(answer, truths, files.get(answer.image_id or "", images / (answer.image or "")))
        if query.id in said:
            raise UserError(f"{answer.place}: describes {answer.image} for the second time; leave one out")
        queries.append(query)
        said[query.id] = answer.said
    task = Task(
        name=answers[0].place.rpartition(":")[0],
        queries=queries,
        table=table,
        picture=lambda i: Path(queries[i].image or ""),
    )
    return task, Matched(said, len(answers) - len(known))


def _captioned(answer: Answer, truths: Mapping[str, Sequence[str]], image: Path) -> Query:
    known = answer.image_id
    assert known is not None
    return Query(
        id=f"{known}:caption",
        image_id=known,
        image=str(image.resolve()),
        prompt=_plain(answer.prompt or ""),
        kind=CAPTION,
        truth=tuple(truths[known]),
    )


def _answer(place: str, row: Mapping[str, Any]) -> Answer:
    prompt, text, id, ids = _first(row, PROMPT), _first(row, TEXT), _first(row, ID), row.get("token_ids")
    if not isinstance(text, str) or ("label" in row and _first(row, TEXT[:2]) is None and prompt is None):
        raise UserError(f"{place}: holds no answer; write it under 'text' (or 'response'); found {str(dict(row))[:60]}")
    image = _first(row, (*IMAGE, "image_id"))
    if isinstance(image, int):
        image = f"{image:012d}.jpg"  # COCO's own name for that picture
    image, prompt = (value if isinstance(value, str) else None for value in (image, prompt))
    said = Said(text.strip(), None if ids is None else tuple(ids), image)
    return Answer(place=place, id=None if id is None else str(id), image=image, prompt=prompt, said=said)


def _first(row: Mapping[str, Any], keys: Iterable[str]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _check_prompt(answer: Answer, query: Query, name: str) -> None:
    """An instruction around the question, as LLaVA's evaluation adds, is no other prompt."""
    if answer.prompt is not None and _plain(query.prompt) not in _plain(answer.prompt):
        raise UserError(
            f"{answer.place}: answers {query.id} with the prompt {_plain(answer.prompt)[:60]!r}, but {name} asks "
            f"{_plain(query.prompt)[:60]!r}; give the answers to these questions"
        )


def _plain(prompt: str) -> str:
    return " ".join(prompt.replace(IMAGE_MARK, " ").split())
