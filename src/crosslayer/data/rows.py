"""From a row of any data set to an example: which key holds the prompt, the response, the picture."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from crosslayer.data.examples import Example
from crosslayer.errors import UserError

IMAGE_MARK = "<image>"
"""Where the picture goes in a prompt."""
PROMPT = ("prompt", "question", "instruction", "query")
RESPONSE = ("response", "answer", "output", "caption", "completion")
IMAGE = ("image", "image_path", "image_file", "file_name", "images")
"""Keys that are looked for, in this order."""
HUMAN, MODEL = ("human", "user"), ("gpt", "assistant", "model")


@dataclass(frozen=True)
class Rows:
    """The rows of a data set, as they are stored, read one at a time."""

    name: str
    n: int
    read: Callable[[int], Mapping[str, Any]]
    """Row number i; raises UserError where it cannot be read."""
    folder: Path = Path()
    """What paths of images are relative to, unless another folder is named."""
    label: Callable[[int], str] = field(default=lambda i: str(i + 1))
    """What row number i is called, behind the data set's name."""
    peek: Callable[[int], Mapping[str, Any]] | None = None
    """The same as `read`, where there is a cheaper way that leaves the pixels out."""

    def id(self, i: int) -> str:
        """What to call row number i."""
        return f"{self.name}:{self.label(i)}"


@dataclass(frozen=True)
class RowReader:
    """How rows become examples."""

    images: Path
    """What paths of images are relative to."""
    prompt: str | None = None
    """What to ask about a picture where the row has no prompt."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Keys of this data set, by `prompt`, `response` and `image`."""
    plain: bool = False
    """Whether prompts are taken as they are, without a chat template."""

    def example(self, id: str, row: Mapping[str, Any]) -> Example:
        """The example that a row holds.

        Raises:
            UserError: when it holds none; names the row and what is missing.
        """
        turns = row.get("conversations", row.get("messages"))
        example = self._of_columns(id, row) if turns is None else self._of_turns(id, row, turns)
        return replace(example, form="text") if self.plain else example

    def _of_turns(self, id: str, row: Mapping[str, Any], turns: Any) -> Example:
        said = [_turn(id, turn) for turn in turns] if isinstance(turns, Sequence) and not isinstance(turns, str) else []
        asked = [text for speaker, text in said if speaker in HUMAN]
        told = [text for speaker, text in said if speaker in MODEL]
        alternating = [(HUMAN, MODEL)[i % 2] for i in range(len(said))]
        if not said or any(speaker not in wanted for (speaker, _), wanted in zip(said, alternating, strict=True)):
            found = ", ".join(str(speaker) for speaker, _ in said[:6]) or "none"
            raise UserError(f"{id}: needs turns of human and gpt (or user and assistant) by turns; found {found}")
        history = tuple(zip(asked[:-1], told, strict=False))
        response = told[-1] if len(told) == len(asked) else None
        return Example(id, asked[-1], response, self._image(id, row), history)

    def _of_columns(self, id: str, row: Mapping[str, Any]) -> Example:
        image = self._image(id, row)
        prompt, response = self._text(id, row, "prompt", PROMPT), self._text(id, row, "response", RESPONSE)
        text, label = (value if isinstance(value, str) else None for value in (row.get("text"), row.get("label")))
        if text is not None and prompt is None and response is None and image is None:
            return Example(id, text, form="text")
        if prompt is None:
            prompt, text = text, label
        if prompt is None and image is not None:
            prompt = self._what_to_ask(id)
        if prompt is None:
            raise UserError(f"{id}: needs a string under 'prompt' (or 'text'); found {_short(dict(row))}")
        response, history = text if response is None else response, _history(id, row.get("history") or ())
        return Example(id, prompt, response, image, history, "text" if row.get("form") == "text" else "chat")

    def _what_to_ask(self, id: str) -> str:
        if self.prompt is None:
            raise UserError(f"{id}: has an image and no prompt; say what to ask with --prompt")
        return self.prompt

    def _text(self, id: str, row: Mapping[str, Any], what: str, keys: Sequence[str]) -> str | None:
        named = self.columns.get(what)
        if named is not None and named not in row:
            raise UserError(f"{id}: has no column {named!r} for the {what}; it has {', '.join(map(str, row))}")
        return _string(id, row, named or next((key for key in keys if row.get(key) is not None), keys[0]))

    def _image(self, id: str, row: Mapping[str, Any]) -> Any:
        keys = (self.columns["image"],) if "image" in self.columns else IMAGE
        key = next((key for key in keys if row.get(key) is not None), None)
        value = None if key is None else row[key]
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            if len(value) > 1:
                raise UserError(f"{id}: has {len(value)} images under {key!r}; give rows of one")
            value = value[0] if value else None
        if isinstance(value, Mapping):  # as `datasets` stores an image
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, str | bytes | Image.Image | None):
            raise UserError(f"{id}: needs a string under {key!r}, where there is one; found {_short(value)}")
        return self.images / value if isinstance(value, str) and value else value or None


def _string(id: str, row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    if not isinstance(value, str | None):
        raise UserError(f"{id}: needs a string under {key!r}, where there is one; found {_short(value)}")
    return value


def _history(id: str, turns: Any) -> tuple[tuple[str, str], ...]:
    pairs = [tuple(turn) for turn in turns if isinstance(turn, Sequence)] if isinstance(turns, Sequence) else None
    if pairs is None or len(pairs) < len(turns) or any(len(p) != 2 or {*map(type, p)} != {str} for p in pairs):
        raise UserError(f"{id}: needs pairs of prompt and response under 'history'; found {_short(turns)}")
    return tuple((asked, told) for asked, told in pairs)


def _turn(id: str, turn: Any) -> tuple[Any, str]:
    """Who speaks and what is said, in LLaVA's (`from`, `value`) or the chat templates' (`role`, `content`) keys."""
    if not isinstance(turn, Mapping):
        raise UserError(f"{id}: needs turns with 'from' and 'value', or 'role' and 'content'; found {_short(turn)}")
    speaker, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if isinstance(said, Sequence) and not isinstance(said, str):
        said = "".join(IMAGE_MARK if part.get("type") == "image" else str(part.get("text", "")) for part in said)
    if not isinstance(said, str):
        raise UserError(f"{id}: needs turns with 'from' and 'value', or 'role' and 'content'; found {_short(turn)}")
    return speaker, said


def _short(value: Any) -> str:
    return re.sub(r"\s+", " ", str(value))[:60]
