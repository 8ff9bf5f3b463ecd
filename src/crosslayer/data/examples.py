"""One prompt with its picture and its answer, and sets of them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

from PIL import Image

from crosslayer.data.images import as_rgb, open_image
from crosslayer.data.skipped import Apart, Skipped
from crosslayer.distributed.crew import Crew

FEW = 16
"""Examples that tell two data sets apart."""


@dataclass(frozen=True)
class Example:
    """A prompt, with a picture and the response to it where there are some.

    The response is what is scored; an example without one is scored on all its text.
    """

    id: str
    prompt: str
    response: str | None = None
    image: "Image.Image | Path | bytes | None" = None
    """A picture, the path of one, or the bytes of its file."""
    history: tuple[tuple[str, str], ...] = ()
    """Earlier turns of the conversation: what was asked and what was answered."""
    form: Literal["chat", "text"] = "chat"
    """`chat` goes through the model's chat template, where it has one; `text` is taken as it is."""
    tokens: tuple[int, ...] | None = None
    """Token ids that are the whole example, instead of all the above."""

    def picture(self) -> Image.Image | None:
        """The picture as RGB pixels, read from disk where only its path is held.

        Raises:
            UserError: when the file is missing or holds no picture.
        """
        if self.image is None:
            return None
        return as_rgb(self.image, self.id) if isinstance(self.image, Image.Image) else open_image(self.image, self.id)

    def asked(self) -> "Example":
        """The same without its response; of mere tokens the first half, so that there is something to go on from."""
        half = None if self.tokens is None else self.tokens[: max(1, len(self.tokens) // 2)]
        return replace(self, response=None, tokens=half)


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """A set of examples, made one at a time when asked for; the same index always gives the same one."""

    name: str
    n: int
    make: Callable[[int], Example]
    skipped: Skipped = field(default_factory=Skipped, compare=False)
    """Takes note of bad rows: those that were left out here, and those that turn out to be bad in use."""

    def __len__(self) -> int:
        return self.n

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> "Examples": ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            chosen = range(self.n)[index]
            return Examples(self.name, len(chosen), lambda i: self.make(chosen[i]), self.skipped)
        return self.make(range(self.n)[index])


def digest(data: Sequence[Example]) -> str:
    """What tells most data sets of one name and length apart: the words of a few examples."""
    few = [data[i] for i in range(0, len(data), max(1, len(data) // FEW))]
    words = repr([(e.id, e.prompt, e.response, e.history, e.form, e.tokens) for e in few])
    return hashlib.sha256(words.encode()).hexdigest()[:12]


def apart(data: Sequence[Example], crew: Crew) -> tuple[Sequence[Example], Apart]:
    """The same data set with notes of its own, to be heard later, and these; one alone goes on taking them at once."""
    notes = Apart()
    return (data if crew.alone or not isinstance(data, Examples) else replace(data, skipped=notes)), notes


def hear(data: Sequence[Example], looks: Sequence[Any]) -> None:
    """Let a data set that takes notes have those taken apart."""
    if isinstance(data, Examples):
        data.skipped.hear(looks)
