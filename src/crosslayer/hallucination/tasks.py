"""What to ask: queries with what is true, from POPE files or from pictures with COCO's annotations."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crosslayer.data.examples import Example, Examples
from crosslayer.data.load import READERS
from crosslayer.data.skipped import Skipped
from crosslayer.data.splits import image_key
from crosslayer.errors import UserError
from crosslayer.files import atomic_path
from crosslayer.hallucination.labelling import parse
from crosslayer.hallucination.pope import SAMPLINGS, Counts, asked_about
from crosslayer.hallucination.responses import CAPTION, QUESTION, YES, Query
from crosslayer.hallucination.synonyms import SynonymTable

QUESTION_TEXT = "Is there {} in the image?"
"""POPE's own; {} is "a dog"."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Queries about pictures, and the words for what these show."""

    name: str
    queries: Sequence[Query]
    table: SynonymTable
    picture: Callable[[int], Any]
    """Of query number i, as `Example.image` has it, for where the query names no file, or one that is still to be."""
    skipped: Skipped = field(default_factory=Skipped)

    def __post_init__(self):
        if not self.queries:
            raise UserError(f"{self.name}: holds nothing to ask; give pictures, or POPE's questions")

    def save_pictures(self, folder: Path) -> None:
        """Save those that the queries place in the folder of results, where they are not there yet."""
        for i, query in enumerate(self.queries):
            if query.image is not None and not (folder / query.image).exists():
                with atomic_path(folder / query.image) as temporary:
                    self.picture(i).save(temporary, format="png")

    def examples(self, folder: Path) -> Examples:
        """The queries as examples for a model, by the same numbers and ids; `folder` is that of the results."""

        def make(i: int) -> Example:
            example = self.queries[i].example(folder)
            return example if example.image is not None else replace(example, image=self.picture(i))

        return Examples(self.name, len(self.queries), make, self.skipped)


def pope_task(data: Examples, source: Path, table: SynonymTable) -> Task:
    """The questions of a POPE file: rows with a picture, a question, and yes or no for an answer.

    The sampling is read from the file's name, where this has it, as in coco_pope_adversarial.json.

    Raises:
        UserError: when a row has no such answer, or asks about no object of the table or about several.
    """
    own, samplings = (
        _question_ids(source, {example.id for example in data}),
        tuple(s for s in SAMPLINGS if s in source.name),
    )
    rows = tqdm(data, desc=f"read {data.name}", unit="row", delay=2, leave=False)
    queries = [_pope_query(example, own.get(example.id, example.id), samplings, table) for example in rows]
    _check_unique(data.name, queries)
    return Task(name=data.name, queries=queries, table=table, picture=lambda i: data[i].image, skipped=data.skipped)


def caption_task(
    data: Examples,
    truths: Mapping[str, Sequence[str]],
    table: SynonymTable,
    *,
    questions: int = 0,
    question_text: str = QUESTION_TEXT,
    seed: int = 0,
) -> Task:
    """A caption of every picture whose objects are known, then POPE's questions about all of them.

    Captions and questions are kept apart, as a batch takes as long as its longest answer.

    Args:
        data: pictures with a prompt; of rows with the same picture the first counts.
        truths: the objects of each picture, by `image_id`; popular objects, and those that stand together, are counted
            in it.
        table: the words for the objects.
        questions: with the answer yes, at most, about each picture; as many with no for each sampling.
        question_text: with {} where "a dog" goes.
        seed: of the questions.

    Raises:
        UserError: when no picture's objects are known, or a prompt has earlier turns.
    """
    if "{}" not in question_text:
        raise UserError(f"the question is {question_text!r}; write {{}} where the object goes: {QUESTION_TEXT!r}")
    counts, objects = Counts.of(truths.values()), tuple(table.phrases)
    numbers: dict[str, int] = {}
    for number, example in enumerate(data):
        _check_single(example)
        known = image_id(example)
        if known in truths:
            numbers.setdefault(known, number)
        else:
            data.skipped.note(example.id, f"image {known} is not in the annotations")
    captions, questions_asked = list[tuple[Query, int]](), list[tuple[Query, int]]()
    for known, number in numbers.items():
        caption = _query(data[number], f"{known}:caption", CAPTION, tuple(truths[known]))
        asked = asked_about(known, caption.truth, objects, counts, questions, seed)
        about = questions_about(caption, asked, lambda name: question_text.replace("{}", with_article(name)))
        captions.append((caption, number))
        questions_asked += [(query, number) for query in about]
    if not captions:
        raise UserError(
            f"{data.name}: none of its {len(data):,} images is in the annotations; give those of its images"
        )
    both = [*captions, *questions_asked]
    queries, places = [query for query, _ in both], [number for _, number in both]
    return Task(
        name=data.name, queries=queries, table=table, picture=lambda i: data[places[i]].image, skipped=data.skipped
    )


def questions_about(
    caption: Query, asked: Mapping[str, tuple[str, ...]], question: Callable[[str], str]
) -> list[Query]:
    """A question for each object, about the picture of a caption's query."""
    values = {**vars(caption), "kind": QUESTION}
    return [
        Query(
            **{**values, "id": f"{caption.image_id}:{name}", "prompt": question(name), "object": name, "samplings": s}
        )
        for name, s in asked.items()
    ]


def image_id(example: Example) -> str:
    """What an example's picture is known by: the name of its file, as COCO's years agree on it, or else a hash."""
    if isinstance(example.image, Path):
        return image_key(example).decode()
    return example.id if example.image is None else blake2b(image_key(example), digest_size=8).hexdigest()


def with_article(name: str) -> str:
    """ "a dog", "an apple"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _pope_query(example: Example, id: str, samplings: tuple[str, ...], table: SynonymTable) -> Query:
    _check_single(example)
    told = parse(example.response or "")
    if told is None:
        raise UserError(
            f"{example.id}: has no yes or no under 'label'; give POPE's questions, or --instances for captions"
        )
    objects = list(dict.fromkeys(named.object for named in table.find(example.prompt)))
    if len(objects) != 1:
        found = f"{len(objects)} objects" if objects else "no object"
        raise UserError(
            f"{example.id}: asks about {found} of the synonym table {table.name} ({example.prompt[:80]!r}); add a line "
            "for what it asks about to a table of your own (--synonyms)"
        )
    query = _query(example, id, QUESTION, (objects[0],) if told[0] == YES else ())
    return replace(query, object=objects[0], samplings=samplings)


def _query(example: Example, id: str, kind: Any, truth: tuple[str, ...]) -> Query:
    return Query(
        id=id,
        image_id=image_id(example),
        image=str(example.image.resolve()) if isinstance(example.image, Path) else None,
        prompt=example.prompt,
        kind=kind,
        truth=truth,
        form=example.form,
    )


def _question_ids(source: Path, used: Collection[str]) -> dict[str, str]:
    """POPE's own numbers of the questions of a file, by the ids of the rows that are used."""
    if source.suffix not in READERS or not source.is_file():
        return {}
    rows = READERS[source.suffix](source)
    read = {rows.id(i): rows.read(i).get("question_id") for i in range(rows.n) if rows.id(i) in used}
    return {id: str(number) for id, number in read.items() if number is not None}


def _check_unique(name: str, queries: Sequence[Query]) -> None:
    ids: set[str] = set()
    for query in queries:
        if query.id in ids:
            raise UserError(f"{name}: has two questions with question_id {query.id}; number them anew")
        ids.add(query.id)


def _check_single(example: Example) -> None:
    if example.history:
        raise UserError(
            f"{example.id}: has earlier turns; hallucination is measured on single prompts, so leave it out"
        )
