"""Where an intervention acts: everywhere, at positions, or at a part of the prompt. Never where a prompt begins."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from crosslayer.errors import UserError

PARTS = ("image", "text", "answer")


@dataclass(frozen=True)
class Places:
    """What is known of each position of one forward pass."""

    position: Int[Tensor, "B P"]
    """In its prompt, padding not counted, generated tokens counted on; what it says of padding does not matter."""
    image: Bool[Tensor, "B P"] | None
    """True at image patches; None where the pass does not show them."""
    answer: Bool[Tensor, "B P"] | None
    """True at tokens of the answer, generated or given; None where no answer is known of."""

    @property
    def first(self) -> Bool[Tensor, "B P"]:
        """The positions that begin a prompt: they have no features."""
        return self.position == 0


@runtime_checkable
class Where(Protocol):
    """Chooses positions of a forward pass."""

    def mask(self, places: Places) -> Bool[Tensor, "B P"]:
        """True at the positions chosen; padding and first positions do not matter.

        Raises:
            UserError: where the pass does not show what is asked for.
        """
        ...


@dataclass(frozen=True)
class Everywhere:
    """All positions but the first, of prompts and answers alike."""

    def mask(self, places: Places) -> Tensor:
        """See `Where.mask`."""
        return torch.ones_like(places.first)


@dataclass(frozen=True)
class Positions:
    """Some positions, counted from the beginning of the prompt without padding; an answer's go on counting.

    Raises:
        UserError: for none, and for the first, which has no features.
    """

    at: tuple[int, ...]

    def __post_init__(self):
        if not self.at or any(type(p) is not int or p < 1 for p in self.at):
            raise UserError(
                f"positions are {list(self.at)}; give whole numbers from 1 on (a prompt's first position, 0, has no "
                "features and cannot be edited)"
            )

    def mask(self, places: Places) -> Tensor:
        """See `Where.mask`."""
        return torch.isin(places.position, places.position.new_tensor(self.at))


@dataclass(frozen=True)
class Part:
    """One part of what the model sees: `image` (patches), `text` (all else), or `answer` (generated or given)."""

    name: str

    def __post_init__(self):
        if self.name not in PARTS:
            raise UserError(f"a part is {self.name!r}; choose one of {', '.join(PARTS)}")

    def mask(self, places: Places) -> Tensor:
        """See `Where.mask`."""
        found = places.answer if self.name == "answer" else places.image
        if found is None:
            why = "where its answer begins; hand over the batch" if self.name == "answer" else "which are image patches"
            raise UserError(f"an intervention acts at the part {self.name}, but a forward pass does not show {why}")
        return ~found if self.name == "text" else found


WHERES: dict[str, type] = {"everywhere": Everywhere, "positions": Positions, "part": Part}
