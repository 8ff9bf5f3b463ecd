"""The sprite sheet: one 28 px RGBA picture per object, in the order of `OBJECTS`.

`python -m crosslayer.zoo.emoji_llava.sheet PACKAGE` rebuilds it from an unpacked emoji-datasource-twitter.
"""

import argparse
import json
import os
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from crosslayer.zoo.emoji_llava.objects import EMOJI, OBJECTS

SIDE = 28
"""Pixels along each side of a sprite."""

COLUMNS = 8

PATH = Path(__file__).parent / "sprites" / "sheet.png"


@cache
def sprites() -> dict[str, np.ndarray]:
    """Every object's sprite, float32 [28, 28, 4]: red, green, blue in 0..255 and opacity in 0..1."""
    with Image.open(PATH) as image:
        pixels = np.asarray(image.convert("RGBA"), dtype=np.float32) / np.array([1, 1, 1, 255], np.float32)
    return {name: pixels[top : top + SIDE, left : left + SIDE] for name, (left, top) in _corners()}


def build(package: Path) -> Image.Image:
    """The sheet, drawn from the unpacked npm package emoji-datasource-twitter."""
    entries = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
    files = {entry["short_name"]: entry["image"] for entry in entries}
    sheet = Image.new("RGBA", (COLUMNS * SIDE, -(-len(OBJECTS) // COLUMNS) * SIDE))
    for name, corner in _corners():
        with Image.open(package / "img" / "twitter" / "64" / files[EMOJI[name]]) as image:
            sheet.paste(image.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS), corner)
    return sheet


def _corners() -> list[tuple[str, tuple[int, int]]]:
    return [(name, (i % COLUMNS * SIDE, i // COLUMNS * SIDE)) for i, name in enumerate(OBJECTS)]


def main() -> None:
    """Rebuild the sheet from the command line."""
    parser = argparse.ArgumentParser(description="rebuild the sprite sheet")
    parser.add_argument("package", type=Path, help="folder of the unpacked emoji-datasource-twitter 16.0.0")
    unfinished = PATH.with_suffix(".part.png")
    build(parser.parse_args().package).save(unfinished, optimize=True)
    os.replace(unfinished, PATH)


if __name__ == "__main__":
    main()
