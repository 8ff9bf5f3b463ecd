"""Finding a data set by name or path and reading it as examples."""

import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from crosslayer.data.examples import Example, Examples
from crosslayer.errors import UserError
from crosslayer.zoo.emoji_llava.world import conversations, render

EMOJI_SCENES = "emoji-scenes"
N_SCENES = 20_000
SPLITS = ("train", "validation", "test")


@runtime_checkable
class Reader(Protocol):
    """What a data set asks of the model that will read it."""

    @property
    def sees(self) -> bool:
        """Whether it reads images."""
        ...


def load_data(
    source: str | Path,
    images: str | Path | None = None,
    model: Reader | None = None,
    *,
    split: str = "train",
    n: int | None = None,
    seed: int = 0,
) -> Examples:
    """Read a data set.

    Args:
        source: `emoji-scenes` (the bundled model's world, drawn on demand), a text file (an example a line) or JSON
            lines with `prompt` (or `text`), and `response` and `image` where there are some.
        images: folder that `image` paths are relative to; the file's own folder when left out.
        model: what will read the data, to be told at once where it cannot.
        split: `train`, `validation` or `test`; of `emoji-scenes` only.
        n: how many examples; all of a file's, or 20,000 scenes, when left out.
        seed: of `emoji-scenes` only.

    Raises:
        UserError: when there is no such data set, it is empty, a line is not what it should be, or there are images
            and the model reads none.
    """
    examples = _read(source, images, split, n, seed)
    if model is not None and not model.sees and any(e.image is not None for e in examples[:100]):
        raise UserError(f"{source}: has images, which this model does not read; choose another model or data set")
    return examples


def _read(source: str | Path, images: str | Path | None, split: str, n: int | None, seed: int) -> Examples:
    if n is not None and n < 1:
        raise UserError(f"{n} examples were asked for; choose at least 1")
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
    if str(source) == EMOJI_SCENES:
        return _emoji_scenes(N_SCENES if n is None else n, split, seed)
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{source}: no such data; give a text file, a .jsonl file or {EMOJI_SCENES}")
    base = Path(images) if images is not None else path.parent
    if not base.is_dir():
        raise UserError(f"{base}: no such folder of images")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; give a text file or JSON lines") from None
    lines = [(f"{path.name}:{i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()][:n]
    if not lines:
        raise UserError(f"{path}: holds no examples; give at least one line")
    if path.suffix != ".jsonl":
        return Examples(path.name, len(lines), lambda i: Example(*lines[i]))
    examples = [_record(id, line, base) for id, line in lines]
    return Examples(path.name, len(examples), examples.__getitem__)


def _emoji_scenes(n: int, split: str, seed: int) -> Examples:
    turns = conversations(n, seed=seed, split=split)

    def make(i: int) -> Example:
        turn = turns[i]
        return Example(f"{split}-{seed}-{i}", turn.prompt, turn.response, render(turn.scene))

    return Examples(EMOJI_SCENES, n, make)


def _record(id: str, line: str, base: Path) -> Example:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{id}: is not JSON ({error})") from None
    prompt = record.get("prompt", record.get("text")) if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise UserError(f"{id}: needs a string under 'prompt' (or 'text'); found {line[:60]}")
    response, image = record.get("response"), record.get("image")
    for name, value in (("response", response), ("image", image)):
        if not isinstance(value, str | None):
            raise UserError(f"{id}: needs a string under {name!r}, where there is one; found {str(value)[:60]}")
    return Example(id, prompt, response, base / image if image else None)
