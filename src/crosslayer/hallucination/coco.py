"""The objects of COCO's pictures, from its annotation files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crosslayer.data.splits import name_key
from crosslayer.errors import UserError
from crosslayer.files import read_json
from crosslayer.hallucination.synonyms import SynonymTable


def read_truths(instances: Path, captions: Path | None, table: SynonymTable) -> dict[str, tuple[str, ...]]:
    """The objects of each picture, by the name of its file, in the order of the table.

    As CHAIR has it (Rohrbach et al. 2018, section 3.1): those that are outlined, and those that the reference captions
    name. A picture that the files list without objects has none.

    Args:
        instances: COCO's instances_*.json, or another file of `images`, `annotations` and `categories`.
        captions: COCO's captions_*.json; without it only what is outlined counts.
        table: the words for the objects, which must have every category.

    Raises:
        UserError: when a file is not in COCO's layout, or the table lacks a category.
    """
    found: dict[str, set[str]] = {}
    content = _content(instances, "categories")
    names = {c["id"]: table.object(c["name"], instances.name) for c in content["categories"]}
    for image, annotation in _annotations(instances, content, found):
        if annotation.get("category_id") not in names:
            raise UserError(f"{instances}: an annotation of {image} has no known category_id; mend the file")
        found[image].add(names[annotation["category_id"]])
    if captions is not None:
        for image, annotation in _annotations(captions, _content(captions), found):
            found[image] |= {named.object for named in table.find(str(annotation.get("caption", "")))}
    return {image: tuple(name for name in table.phrases if name in objects) for image, objects in found.items()}


def _content(path: Path, *more: str) -> Any:
    content = read_json(path)
    for key in ("images", "annotations", *more):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path}: has no list under {key!r}; give a file in COCO's layout")
    return content


def _annotations(path: Path, content: Any, found: dict[str, set[str]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each annotation with its image, every image being entered into `found`."""
    try:
        images = {image["id"]: name_key(image["file_name"]).decode() for image in content["images"]}
        for name in images.values():
            found.setdefault(name, set())
        for annotation in tqdm(content["annotations"], desc=f"read {path.name}", delay=2, disable=None, leave=False):
            yield images[annotation["image_id"]], annotation
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: is not in COCO's layout; an image or an annotation lacks {error}") from None
