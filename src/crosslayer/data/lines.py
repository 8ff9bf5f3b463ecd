"""Text files and JSON lines: only where each line begins is kept in memory."""

import json
import mmap
from array import array
from itertools import count
from pathlib import Path
from typing import Any

from crosslayer.data.rows import Rows
from crosslayer.errors import UserError


def text_lines(path: Path) -> Rows:
    """A row for each line of a text file that is not blank."""
    return _rows(path, lambda id, line: {"text": line})


def json_lines(path: Path) -> Rows:
    """A row for each line of a file of JSON objects."""
    return _rows(path, _parsed)


class _Lines:
    """The lines of a file that are not blank, without their ends."""

    def __init__(self, path: Path):
        self.path, self.starts, self.numbers = path, array("q"), array("q")
        with path.open("rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        start = 0
        for number in count(1):
            end = self.bytes.find(b"\n", start)
            end = len(self.bytes) if end < 0 else end
            if self.bytes[start:end].strip():
                self.starts.append(start)
                self.numbers.append(number)
            start = end + 1
            if start >= len(self.bytes):
                break

    def __getitem__(self, i: int) -> str:
        start = self.starts[i]
        end = self.bytes.find(b"\n", start)
        try:
            return self.bytes[start : len(self.bytes) if end < 0 else end].decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError:
            raise UserError(f"{self.path.name}:{self.numbers[i]}: is not UTF-8 text") from None


def _rows(path: Path, read: Any) -> Rows:
    lines = _Lines(path)

    def label(i: int) -> str:
        return str(lines.numbers[i])

    return Rows(path.name, len(lines.starts), lambda i: read(f"{path.name}:{label(i)}", lines[i]), path.parent, label)


def _parsed(id: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{id}: is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{id}: needs a string under 'prompt' (or 'text'); found {line[:60]}")
    return record
