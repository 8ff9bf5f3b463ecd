"""One prompt with its picture and its answer, and sets of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from PIL import Image, UnidentifiedImageError

from crosslayer.errors import UserError


@dataclass(frozen=True)
class Example:
    """A prompt, with a picture and the response to it where there are some.

    The response is what is scored; an example without one is scored on all its text.
    """

    id: str
    prompt: str
    response: str | None = None
    image: "Image.Image | Path | None" = None

    def picture(self) -> Image.Image | None:
        """The picture as RGB pixels, read from disk where only its path is held.

        Raises:
            UserError: when the file is missing or holds no picture.
        """
        if self.image is None:
            return None
        return open_image(self.image) if isinstance(self.image, Path) else self.image.convert("RGB")


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """A set of examples, made one at a time when asked for."""

    name: str
    n: int
    make: Callable[[int], Example]

    def __len__(self) -> int:
        return self.n

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> "Examples": ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            chosen = range(self.n)[index]
            return Examples(self.name, len(chosen), lambda i: self.make(chosen[i]))
        return self.make(range(self.n)[index])


def open_image(path: Path) -> Image.Image:
    """Read a picture as RGB.

    Raises:
        UserError: when the file is missing or holds no picture.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: is not an image that Pillow can read; give a PNG or JPEG file") from None
    except (OSError, Image.DecompressionBombError, SyntaxError) as error:
        raise UserError(f"{path}: the image is damaged ({error})") from None
