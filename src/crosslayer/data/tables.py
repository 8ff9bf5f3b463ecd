"""Tables through the `datasets` library: parquet and CSV files, saved folders, ids on the hub, streams."""

from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from crosslayer.data.rows import Rows
from crosslayer.data.splits import name_key
from crosslayer.errors import UserError

SUFFIXES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv"}
"""Files that are tables, with the builder of `datasets` that reads them."""
BINARY = (".parquet", ".arrow")
"""Files that cannot but be tables."""
SAVED = ("dataset_dict.json", "state.json")
"""What marks a folder that `save_to_disk` wrote."""
BLOCK = 1000
"""Rows looked at together."""


def table(source: str | Path, split: str | None, stream: int | None) -> tuple[Rows, bool]:
    """The rows of a table, and whether they are a split that it came with.

    Args:
        source: a file, a folder, or an id on the hub, with `:configuration` where it has several.
        split: the split to take where it comes with several; its `train`, or else its first, when left out.
        stream: read only so many rows, as they come.

    Raises:
        UserError: when there is no such table, or it cannot be read.
    """
    datasets = import_module("datasets")  # half a second and 80 MB that only tables need
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        found = _load(datasets, source, streaming=stream is not None)
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: no such data, here or on the hub, or it cannot be read ({reason})") from None
    native = isinstance(found, dict) and len(found) > 1 and split is not None
    if isinstance(found, dict):
        found = found[_split(source, found, split)]
    pictures = [name for name, kind in (found.features or {}).items() if isinstance(kind, datasets.Image)]
    for name in pictures:
        found = found.cast_column(name, datasets.Image(decode=False))
    name, folder = (source.name, _folder(source)) if isinstance(source, Path) else (source, Path())
    if stream is None:
        return Rows(name, len(found), found.__getitem__, folder, peek=_Peek(found, pictures)), native
    rows = list(found.take(stream))
    return Rows(name, len(rows), rows.__getitem__, folder), native


def _load(datasets: Any, source: str | Path, **settings: Any) -> Any:
    if not isinstance(source, Path):
        id, _, configuration = source.partition(":")
        return datasets.load_dataset(id, configuration or None, **settings)
    if source.is_file():
        return datasets.load_dataset(SUFFIXES[source.suffix.lower()], data_files=str(source), **settings)
    if any((source / name).is_file() for name in SAVED):
        saved = datasets.load_from_disk(str(source))
        return saved.to_iterable_dataset() if settings["streaming"] and not isinstance(saved, dict) else saved
    return datasets.load_dataset(str(source), **settings)


def _split(source: str | Path, found: Mapping[str, Any], split: str | None) -> str:
    if split is None or len(found) == 1:
        return "train" if "train" in found else next(iter(found))
    if split not in found:
        raise UserError(f"{source}: comes with the splits {', '.join(found)}; choose one of them instead of {split!r}")
    return split


def _folder(source: Path) -> Path:
    return source if source.is_dir() else source.parent


class _Peek:
    """Rows without their pixels: a picture is stood in for by what it is known by."""

    def __init__(self, found: Any, pictures: list[str]):
        self.found, self.light = found, found.remove_columns(pictures)
        self.pictures = {name: _paths(found, name) for name in pictures}
        self.block = lru_cache(1)(lambda number: self.light[number * BLOCK : (number + 1) * BLOCK])

    def __call__(self, i: int) -> Mapping[str, Any]:
        row = {name: values[i % BLOCK] for name, values in self.block(i // BLOCK).items()}
        return row | {name: self._picture(name, i, paths[i].as_py()) for name, paths in self.pictures.items()}

    def _picture(self, name: str, i: int, path: str | None) -> bytes | None:
        return name_key(path) if path else (self.found[i][name] or {}).get("bytes")


def _paths(found: Any, name: str) -> Any:
    return import_module("pyarrow.compute").struct_field(found.data.column(name), "path")
