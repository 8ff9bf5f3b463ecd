"""Finding a data set by name or path and reading it as examples."""

import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm

from crosslayer.data import folders, tables
from crosslayer.data.examples import Example, Examples
from crosslayer.data.folders import image_folder, text_folder
from crosslayer.data.images import SUFFIXES
from crosslayer.data.json_file import json_file
from crosslayer.data.lines import json_lines, text_lines
from crosslayer.data.mixture import mix, read_mixture
from crosslayer.data.packing import pack
from crosslayer.data.reading import Reading
from crosslayer.data.rows import RowReader, Rows
from crosslayer.data.samples import LENGTH, MODEL_SAMPLES, N_SAMPLES, model_samples
from crosslayer.data.skipped import BAD_SHARE, Skipped
from crosslayer.data.splits import split_of
from crosslayer.errors import UserError
from crosslayer.zoo.emoji_llava.world import conversations, render

EMOJI_SCENES = "emoji-scenes"
N_SCENES = 20_000
BUNDLED = (EMOJI_SCENES, MODEL_SAMPLES)
MIXTURES = (".yaml", ".yml")
PART_SETTINGS = {"images": str, "prompt": str, "columns": list, "plain": bool, "context": int, "stream": int}
"""What each part of a mixture may have of its own, beside `data` and `weight`, and what each is."""
READERS = {".jsonl": json_lines, ".ndjson": json_lines, ".json": json_file}
"""Of files by how they end; those that end otherwise are text, or tables."""
FILES = {*READERS, *tables.SUFFIXES, *folders.TEXTS, *MIXTURES}
"""Endings that no id on the hub has."""
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


@runtime_checkable
class Reader(Protocol):
    """What a data set asks of the model that will read it."""

    @property
    def sees(self) -> bool:
        """Whether it reads images."""
        ...

    @property
    def processor(self) -> Any:
        """Its tokenizer, or what has one."""
        ...


def load_data(
    source: str | Path,
    images: str | Path | None = None,
    model: Reader | None = None,
    *,
    split: str | None = None,
    n: int | None = None,
    seed: int = 0,
    prompt: str | None = None,
    columns: Sequence[str] = (),
    plain: bool = False,
    context: int | None = None,
    split_seed: int = 0,
    stream: int | None = None,
    bad_share: float = BAD_SHARE,
) -> Examples:
    """Read a data set; docs/data.md shows every kind.

    Args:
        source: `emoji-scenes` (the bundled model's world, drawn on demand), `model-samples` (text that the model makes
            up), a text file (an example a line), JSON lines, a JSON file (LLaVA's conversations, COCO's annotations), a
            folder of images or texts, a table (parquet, CSV, a `datasets` folder or id), or a YAML file that mixes
            several.
        images: folder that `image` paths are relative to; the file's own folder when left out.
        model: what will read the data, to be told at once where it cannot; packing and sampling need it.
        split: `train`, `validation` or `test`; see `crosslayer.data.splits`.
        n: how many examples; all there are, 20,000 scenes or 1,024 samples, when left out.
        seed: of `emoji-scenes` and `model-samples`.
        prompt: what to ask about images that come without prompts.
        columns: columns under other names, as in `("prompt=question", "image=picture")`.
        plain: take prompts as they are, without the model's chat template.
        context: pack text into pieces of so many tokens.
        split_seed: another number, other splits.
        stream: of a table, read only the first rows, as they come.
        bad_share: share of bad rows that are skipped (see `Examples.skipped`).

    Raises:
        UserError: when there is no such data set, it is empty, too many rows are bad, or there are images and the
            model reads none.
    """
    reading = Reading(
        images=None if images is None else Path(images),
        prompt=prompt,
        columns=tuple(columns),
        plain=plain,
        context=context,
        split=split,
        split_seed=split_seed,
        stream=stream,
        bad_share=bad_share,
    )
    return read_data(source, reading, model, n=n, seed=seed)


def read_data(
    source: str | Path, reading: Reading, model: Reader | None = None, *, n: int | None = None, seed: int = 0
) -> Examples:
    """The same as `load_data`, with its settings as one record."""
    if n is not None and n < 1:
        raise UserError(f"{n} examples were asked for; choose at least 1")
    examples = _read(source, reading, model, n, seed)
    if model is not None and not model.sees and any(e.image is not None for e in examples[:100]):
        raise UserError(f"{source}: has images, which this model does not read; choose another model or data set")
    return examples


def _read(
    source: str | Path, reading: Reading, model: Any, n: int | None, seed: int, within: tuple[Path, ...] = ()
) -> Examples:
    """Examples of a source; `within` are the mixtures that it is a part of, the outermost first."""
    path = Path(source)
    if str(source) == EMOJI_SCENES:
        _refuse(source, reading, "images", "prompt", "columns", "plain", "stream", "context")
        return _emoji_scenes(N_SCENES if n is None else n, reading.split or "train", seed)
    if str(source) == MODEL_SAMPLES:
        _refuse(source, reading, "images", "prompt", "columns", "plain", "stream", "split")
        return model_samples(model, N_SAMPLES if n is None else n, reading.context or LENGTH, seed)
    if path.suffix in MIXTURES and path.is_file():
        _refuse(source, reading, "context", "stream")
        return _mixture(path, reading, model, seed, within)[slice(n)]
    rows, native = _rows(source, reading)
    whole = replace(reading, split=None) if native else reading
    examples = _chosen(rows, whole, n if reading.context is None else None)
    if reading.context is None:
        return examples
    if examples[0].form != "text":
        raise UserError(f"{source}: holds prompts, not running text, so --context cannot pack it; leave it out")
    return pack(examples, _tokenizer(model, source), reading.context, n)


def _rows(source: str | Path, reading: Reading) -> tuple[Rows, bool]:
    """The rows of a data set, and whether they are a split that it came with."""
    path, suffix = Path(source), Path(source).suffix.lower()
    if path.is_dir():
        return _folder(path, reading)
    if not path.is_file():
        if isinstance(source, Path) or suffix in FILES or not HUB_ID.fullmatch(source):
            raise UserError(
                f"{source}: no such data; give a file, a folder, an id on the hub or one of {', '.join(BUNDLED)}"
            )
        return tables.table(source, reading.split, reading.stream)
    if suffix in tables.SUFFIXES:
        return tables.table(path, reading.split, reading.stream)
    _refuse(source, reading, "stream")
    return READERS.get(suffix, text_lines)(path), False


def _folder(path: Path, reading: Reading) -> tuple[Rows, bool]:
    """A folder by what is in it: tables, unless they merely lie beside images, then images, then texts."""
    listed = [Path(name) for name in folders.files(path, (*tables.SUFFIXES, ".jsonl", ".json"))]
    pictures = bool(folders.files(path, SUFFIXES))
    if listed and (not pictures or any(name.stem == "metadata" or name.suffix in tables.BINARY for name in listed)):
        return tables.table(path, reading.split, reading.stream)
    _refuse(path, reading, "stream")
    return image_folder(path) if pictures else text_folder(path), False


def _refuse(source: str | Path, reading: Reading, *names: str) -> None:
    """Refuse settings that say nothing about this kind of data, rather than ignore them."""
    for name in names:
        if getattr(reading, name) != getattr(Reading(), name):
            raise UserError(f"{source}: --{name} says nothing about this kind of data; leave it out (see docs/data.md)")


def _chosen(rows: Rows, reading: Reading, n: int | None) -> Examples:
    """The first n examples of the split that are not bad; every row is looked at once, pictures are not opened.

    Raises:
        UserError: when there are none, or too many are bad.
    """
    if reading.images is not None and not reading.images.is_dir():
        raise UserError(f"{reading.images}: no such folder of images")
    reader = RowReader(reading.images or rows.folder, reading.prompt, reading.column_names(), reading.plain)
    skipped, chosen, looked_at = Skipped(reading.bad_share), array("q"), 0
    for i in tqdm(range(rows.n), desc=f"read {rows.name}", unit="row", delay=2, leave=False):
        if len(chosen) == n:
            break
        looked_at += 1
        try:
            example = _present(reader.example(rows.id(i), (rows.peek or rows.read)(i)))
        except UserError as error:
            skipped.note(rows.id(i), str(error))
            continue
        if reading.split is None or split_of(example, reading.split_seed) == reading.split:
            chosen.append(i)
    skipped.look(looked_at, looked_at, rows.name)
    skipped.settle()
    if not chosen:
        raise UserError(f"{rows.name}: holds no examples{f' in split {reading.split}' if reading.split else ''}")
    return Examples(rows.name, len(chosen), lambda i: reader.example(rows.id(chosen[i]), rows.read(chosen[i])), skipped)


def _present(example: Example) -> Example:
    if isinstance(example.image, Path) and not example.image.is_file():
        found = "is a folder, not an image" if example.image.is_dir() else "no such image"
        raise UserError(f"{example.image}: {found}")
    if not (example.prompt.strip() or example.response or example.image):
        raise UserError(f"{example.id}: holds no text")
    return example


def _emoji_scenes(n: int, split: str, seed: int) -> Examples:
    turns = conversations(n, seed=seed, split=split)

    def make(i: int) -> Example:
        turn = turns[i]
        return Example(f"{split}-{seed}-{i}", turn.prompt, turn.response, render(turn.scene))

    return Examples(EMOJI_SCENES, n, make)


def _mixture(path: Path, reading: Reading, model: Any, seed: int, within: tuple[Path, ...]) -> Examples:
    """The parts of a mixture file, each read with its own settings where it has some."""
    within = (*within, path.resolve())

    def settings(part: Mapping[str, Any]) -> Reading:
        if unknown := part.keys() - set(PART_SETTINGS):
            raise UserError(f"{path}: has {min(map(str, unknown))!r}, which is none of {', '.join(PART_SETTINGS)}")
        for name, value in part.items():
            if type(value) is not PART_SETTINGS[name]:
                raise UserError(f"{path}: {name} is {value!r}; needs a YAML {PART_SETTINGS[name].__name__}")
        folder = {"images": path.parent / part["images"]} if "images" in part else {}
        return replace(reading, **{**part, **folder, "columns": tuple(map(str, part.get("columns", reading.columns)))})

    parts, weights, skipped = [], [], Skipped(reading.bad_share)
    for number, (data, weight, own) in enumerate(read_mixture(path, settings), 1):
        beside = path.parent / data
        if (again := beside.resolve()) in within:
            way = " of ".join(str(mixture) for mixture in (again, *reversed(within[within.index(again) :])))
            raise UserError(f"{path}: mixes itself ({way}); name other data in part {number}")
        parts.append(_read(beside if beside.exists() else data, own, model, None, seed, within))
        weights.append(weight)
        for id, reason in parts[-1].skipped.reasons.items():
            skipped.note(f"{number}/{id}", reason)
    skipped.settle()
    return mix(path.name, parts, weights, skipped)


def _tokenizer(model: Any, source: str | Path) -> Any:
    if model is None:
        raise UserError(f"{source}: packing needs the model's tokenizer; give model=")
    return getattr(model.processor, "tokenizer", model.processor)
