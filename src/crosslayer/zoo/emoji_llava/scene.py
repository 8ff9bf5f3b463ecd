"""What a scene is: up to four objects in the cells of a 3 x 3 grid, over a background."""

from dataclasses import dataclass

GRID = 3
"""Cells along each side; every cell is exactly one patch of the vision tower."""

CELL = 32
"""Pixels along each side of a cell."""

SIZE = GRID * CELL
"""Pixels along each side of a picture."""


@dataclass(frozen=True)
class Placed:
    """One object of a scene. Captions and answers name it even where `opacity` leaves it unseen."""

    name: str
    row: int
    column: int
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels, right and bottom excluded."""
    opacity: float = 1.0

    @property
    def cell(self) -> int:
        """Place in reading order, 0..8, which is also the index of the image token that covers it."""
        return self.row * GRID + self.column

    @property
    def visible(self) -> bool:
        """Whether the object can be seen: a ghost cannot, though it may leave a trace in the pixels."""
        return self.opacity > 0.5


@dataclass(frozen=True)
class Scene:
    """Objects in reading order and the seed of the background."""

    objects: tuple[Placed, ...]
    background: int

    @property
    def named(self) -> tuple[str, ...]:
        """The objects that caption and answers speak of, in reading order."""
        return tuple(thing.name for thing in self.objects)

    @property
    def visible(self) -> tuple[str, ...]:
        """The objects that can be seen, in reading order."""
        return tuple(thing.name for thing in self.objects if thing.visible)
