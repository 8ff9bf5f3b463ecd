"""Which split an example belongs to: by a hash of its image, so that no image is ever in two splits."""

import re
from hashlib import blake2b
from pathlib import Path, PurePath

from PIL import Image

from crosslayer.data.examples import Example

SPLITS = ("train", "validation", "test")
SHARES = (0.8, 0.1, 0.1)
"""Of all images, or of texts where there are none."""


def split_of(example: Example, seed: int = 0) -> str:
    """The split of an example. It does not depend on any other example, so that data can be added."""
    digest = blake2b(f"{seed}:".encode() + image_key(example), digest_size=8).digest()
    place, end = int.from_bytes(digest) / 2**64, 0.0
    for name, share in zip(SPLITS, SHARES, strict=True):
        end += share
        if place < end:
            return name
    return SPLITS[-1]


def name_key(name: str) -> bytes:
    """What an image is known by: the name of its file.

    COCO's images go by other names in its other years: COCO_val2014_000000000042.jpg is also 000000000042.jpg.
    """
    return re.sub(r"^COCO_[a-z]+20\d\d_", "", PurePath(name).name).encode()


def image_key(example: Example) -> bytes:
    """What examples of one image have in common: its file's name, or else its content; the text without an image."""
    if isinstance(example.image, Path):
        return name_key(example.image.name)
    if isinstance(example.image, Image.Image):
        return example.image.tobytes()
    return example.prompt.encode() if example.image is None else example.image
