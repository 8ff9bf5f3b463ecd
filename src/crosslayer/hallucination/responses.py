"""Labelled responses: what was asked about a picture, what was answered, and which objects the answer names."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from crosslayer.data.examples import Example
from crosslayer.errors import UserError
from crosslayer.files import write_text

RESPONSES = "responses.jsonl"
"""Name of the labelled responses in a folder of results."""
CAPTION, QUESTION = "caption", "question"
YES, NO = "yes", "no"


@dataclass(frozen=True, kw_only=True)
class Mention:
    """An object that a response names; of a question, the "yes" that affirms the object asked about."""

    object: str
    chars: tuple[int, int]
    """Where in the response, the end excluded."""
    tokens: tuple[int, int] | None = None
    """Which of the response's tokens, the end excluded; None where it was labelled without a tokenizer."""
    hallucinated: bool
    """Whether the object is not there."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """Something to ask about a picture, and what is known to be true of it."""

    id: str
    """Unlike any other of the set."""
    image_id: str
    """What the image is known by: queries that share it go into the same split, and into the same bootstrap cluster."""
    image: str | None
    """Path of the picture; a relative one is relative to the folder of the file that the record stands in."""
    prompt: str
    kind: Literal["caption", "question"]
    truth: tuple[str, ...]
    """The objects that are there; of a question from a POPE file, only whether `object` is one of them."""
    object: str | None = None
    """What a question asks about."""
    samplings: tuple[str, ...] = ()
    """Of a question, the POPE samplings it belongs to: random, popular, adversarial; one with "yes" to all of them."""
    setting: str = ""
    """Kind of the scene, on the bundled world: plain, alone, together, partner."""
    pair: tuple[str, str] | None = None
    """Planted pair (lead, partner) that the scene is about, on the bundled world."""
    form: Literal["chat", "text"] = "chat"
    """See `Example.form`."""

    def example(self, folder: Path, response: str | None = None) -> Example:
        """The prompt and its picture, for a model; `folder` is that of the record's file."""
        image = None if self.image is None else folder / self.image
        return Example(self.id, self.prompt, response, image, form=self.form)


@dataclass(frozen=True, kw_only=True)
class Response(Query):
    """A query with its answer and the objects that this names, true and hallucinated ones."""

    response: str
    token_ids: tuple[int, ...] | None = None
    """Tokens of the response as they were generated, without the end; None where no tokenizer was at hand."""
    answer: Literal["yes", "no"] | None = None
    """Of a question, how the response was understood; None where it is neither."""
    mentions: tuple[Mention, ...] = ()

    @property
    def hallucinates(self) -> bool:
        """Whether the response names something that is not there."""
        return any(mention.hallucinated for mention in self.mentions)

    def answered(self, folder: Path) -> Example:
        """The prompt, its picture and the response; what `prepare` counts as its response begins with `token_ids`."""
        return self.example(folder, self.response)


def write_responses(path: Path, responses: Iterable[Response]) -> None:
    """Write labelled responses as JSON lines, atomically."""
    write_text(path, "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in responses))


def read_responses(path: Path) -> list[Response]:
    """Read labelled responses; no model is needed.

    Raises:
        UserError: when there is no such file, it is empty, or a line holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; `crosslayer hallucination score` writes one")
    lines = path.read_text(encoding="utf-8").splitlines()
    read = [_read(f"{path.name}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not read:
        raise UserError(f"{path}: holds no responses; `crosslayer hallucination score` writes some")
    return read


def _read(place: str, line: str) -> Response:
    try:
        record = json.loads(line)
        mentions = tuple(_made(Mention, mention) for mention in record.pop("mentions"))
        return _made(Response, {**record, "mentions": mentions})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{place}: is no labelled response ({error}); `crosslayer hallucination score` writes them"
        ) from None


def _made(kind: type, values: dict[str, Any]) -> Any:
    """A record of JSON values, in which tuples have become lists."""
    known = {field.name for field in fields(kind)}
    return kind(**{name: _tuple(value) for name, value in values.items() if name in known})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
