"""Reading pictures of every kind as RGB, and refusing with a reason those that hold none."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from crosslayer.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
"""What files in a folder of images end with."""
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 2**27
"""More than these are taken for a decompression bomb: 89 million, Pillow's own limit."""


def open_image(source: Path | bytes, name: str = "image") -> Image.Image:
    """Read a picture, the first frame of an animated one, as RGB.

    Args:
        source: the path of an image file, or the bytes of one.
        name: what to call it in an error, where there is no path.

    Raises:
        UserError: when the file is missing, empty or damaged, holds no picture, or one of too many pixels.
    """
    called = str(source) if isinstance(source, Path) else name
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            return as_rgb(image, called)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{called}: no such image") from None
    except IsADirectoryError:
        raise UserError(f"{called}: is a folder; name one image in it") from None
    except UnidentifiedImageError:
        empty = not (source if isinstance(source, bytes) else source.stat().st_size)
        found = "is empty (0 bytes)" if empty else "is not an image that Pillow can read"
        raise UserError(f"{called}: {found}; give a PNG or JPEG file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{called}: has more than {MAX_PIXELS:,} pixels; make it smaller") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{called}: the image is damaged ({error})") from None


def as_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """The picture turned as its EXIF says, on white where it is transparent, in 8 bits a colour.

    Raises:
        UserError: when it has too many pixels, or no known range of brightness.
    """
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"{name}: has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}; make it smaller")
    turned = ImageOps.exif_transpose(image)
    if turned.mode == "F":
        raise UserError(f"{name}: holds floating-point numbers, whose white is unknown; save it with 8 or 16 bits")
    if turned.mode.startswith("I"):
        return _from_16_bits(turned).convert("RGB")
    if turned.has_transparency_data:
        layers = turned.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return turned if turned.mode == "RGB" else turned.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """In 8 bits: Pillow's own conversion would cut everything above 255 off."""
    return Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
