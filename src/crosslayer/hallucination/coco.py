"""The objects of COCO's pictures, from its annotation files."""

from collections.abc import Iterator
from contextlib import contextmanager
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
    name. A picture that `instances` lists without objects has none; one that it does not list is not known.

    Args:
        instances: COCO's instances_*.json, or another file of `images`, `annotations` and `categories`.
        captions: COCO's captions_*.json; without it only what is outlined counts.
        table: the words for the objects, which must have every category.

    Raises:
        UserError: when a file is not in COCO's layout, or the table lacks a category.
    """
    content = _content(instances, "categories")
    with _layout(instances):
        names = {c["id"]: table.object(c["name"], instances.name) for c in content["categories"]}
        found: dict[str, set[str]] = {image: set() for image in _images(content).values()}
        for image, annotation in _annotations(instances, content):
            found[image].add(names[annotation["category_id"]])
    if captions is not None:
        with _layout(captions):
            for image, annotation in _annotations(captions, _content(captions)):
                if image in found:
                    found[image] |= {named.object for named in table.find(annotation["caption"])}
    return {image: tuple(name for name in table.phrases if name in objects) for image, objects in found.items()}


def _content(path: Path, *more: str) -> Any:
    content = read_json(path)
    for key in ("images", "annotations", *more):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path}: has no list under {key!r}; give a file in COCO's layout")
    return content


def _images(content: Any) -> dict[Any, str]:
    """What the images are known by, by their number."""
    return {image["id"]: name_key(image["file_name"]).decode() for image in content["images"]}


def _annotations(path: Path, content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each annotation with its image."""
    images = _images(content)
    for annotation in tqdm(content["annotations"], desc=f"read {path.name}", delay=2, disable=None, leave=False):
        yield images[annotation["image_id"]], annotation


@contextmanager
def _layout(path: Path) -> Iterator[None]:
    """Inside, a key that is missing is the file's fault."""
    try:
        yield
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: is not in COCO's layout; some image, category or annotation lacks {error}") from None
