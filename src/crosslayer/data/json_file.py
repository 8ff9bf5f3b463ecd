"""JSON files: LLaVA's lists of conversations, COCO's captions and instances, and lines that are called .json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crosslayer.data.lines import json_lines
from crosslayer.data.rows import Rows
from crosslayer.errors import UserError
from crosslayer.files import read_json

LONGEST_LINE = 2**20
"""Bytes of a first line that is looked at: a whole COCO file on one line is longer, and no row is."""


def json_file(path: Path) -> Rows:
    """The rows of a JSON file: a list of them, a dictionary in COCO's layout, or, as POPE's files are, one a line.

    Raises:
        UserError: when it is neither.
    """
    if _is_lines(path):
        return json_lines(path)
    content = read_json(path)
    if isinstance(content, Mapping) and isinstance(content.get("images"), list):
        content = _coco(path, content)
    if not isinstance(content, list):
        raise UserError(f"{path}: needs a list of rows, or COCO's 'images' and 'annotations'; found neither")
    return Rows(path.name, len(content), lambda i: _record(f"{path.name}:{i + 1}", content[i]), path.parent)


def _is_lines(path: Path) -> bool:
    """Whether the first line is an object by itself, and others follow."""
    with path.open("rb") as file:
        first, more = file.readline(LONGEST_LINE), file.read(1)
    try:
        return first.endswith(b"\n") and bool(more) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _record(id: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{id}: needs an object with 'conversations', or 'prompt'; found {str(value)[:60]}")
    return value


def _coco(path: Path, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each caption, or, where there are none (as in instances), for each image."""
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        captions = [a for a in content.get("annotations", ()) if "caption" in a]
        told = [{"image": names[a["image_id"]], "caption": a["caption"].strip()} for a in captions]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: is not in COCO's layout; an image or a caption lacks {error}") from None
    return told or [{"image": name} for name in names.values()]
