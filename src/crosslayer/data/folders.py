"""Folders of images, of which each is asked the same, and of text files, of which each is a document."""

from pathlib import Path

from crosslayer.data.images import SUFFIXES
from crosslayer.data.rows import Rows
from crosslayer.errors import UserError

TEXTS = (".txt", ".md")
"""What text files end with."""


def image_folder(folder: Path) -> Rows:
    """A row for each image in the folder and the folders in it, in the order of their paths."""
    paths = files(folder, SUFFIXES)
    return Rows(folder.name, len(paths), lambda i: {"image": paths[i]}, folder, paths.__getitem__)


def text_folder(folder: Path) -> Rows:
    """A row for each text file in the folder and the folders in it, in the order of their paths."""
    paths = files(folder, TEXTS)
    return Rows(folder.name, len(paths), lambda i: _text_file(folder / paths[i]), folder, paths.__getitem__)


def _text_file(path: Path) -> dict[str, str]:
    """A whole text file as a row."""
    try:
        return {"text": path.read_text(encoding="utf-8")}
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None


def files(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Paths, relative to the folder, of all files in and below it that end so, in order."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in found)
