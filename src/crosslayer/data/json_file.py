"""JSON files: LLaVA's lists of conversations, and COCO's captions and instances."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crosslayer.data.rows import Rows
from crosslayer.errors import UserError
from crosslayer.files import read_json


def json_file(path: Path) -> Rows:
    """The rows of a JSON file: a list of them, or a dictionary in COCO's layout.

    Raises:
        UserError: when it is neither.
    """
    content = read_json(path)
    if isinstance(content, Mapping) and isinstance(content.get("images"), list):
        content = _coco(path, content)
    if not isinstance(content, list):
        raise UserError(f"{path}: needs a list of rows, or COCO's 'images' and 'annotations'; found neither")
    return Rows(path.name, len(content), lambda i: _record(f"{path.name}:{i + 1}", content[i]), path.parent)


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
