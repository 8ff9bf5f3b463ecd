"""Where the objects of the bundled world's scenes stand: each in the patch of its cell."""

from collections.abc import Sequence
from functools import cache

from crosslayer.hallucination.responses import Response
from crosslayer.zoo.emoji_llava.scene import GRID, Scene
from crosslayer.zoo.emoji_llava.world import PAIRS, scenes

LEAD_OF = {partner: lead for lead, partner in PAIRS}
BACKGROUND = "background"
LEAD, NAMED, OTHER = "lead", "named", "other"


def patches(response: Response) -> dict[int, str]:
    """The object in each cell of a response's picture, `background 3` where there is none; of other pictures nothing.

    The scene is drawn again from what its image's name says (`crosslayer.hallucination.scenes`).
    """
    split, seed, kind, number = (*response.image_id.split("-"), "", "", "", "")[:4]
    if not response.setting or kind != response.setting or not (seed.isdigit() and number.isdigit()):
        return {}
    scene = _scenes(kind, split, int(seed), int(number) // 64)[int(number) % 64]
    if scene.visible != response.truth:
        return {}
    seen = {thing.cell: thing.name for thing in scene.objects if thing.visible}
    return {cell: seen.get(cell, f"{BACKGROUND} {cell}") for cell in range(GRID * GRID)}


def parts(named: str, places: Sequence[str]) -> dict[str, str]:
    """What each of these places is to a mention: its lead, the object named itself, another object, or background."""
    return {place: _part(place, named) for place in places}


def _part(place: str, named: str) -> str:
    if place.startswith(BACKGROUND):
        return BACKGROUND
    return NAMED if place == named else LEAD if place == LEAD_OF.get(named) else OTHER


@cache
def _scenes(kind: str, split: str, seed: int, block: int) -> list[Scene]:
    return scenes(kind, (block + 1) * 64, seed=seed, split=split)[block * 64 :]
