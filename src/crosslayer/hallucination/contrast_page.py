"""The table of features as one HTML file that opens offline, with the pictures that they fire on."""

import base64
import io
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2

from crosslayer.data.images import open_image
from crosslayer.files import write_text
from crosslayer.hallucination.feature_table import Contrast, Shown
from crosslayer.hallucination.firing import PLACES

WIDTH = 144
"""Of a picture on the page, in pixels."""
LISTED = 40
"""Features that the page lists."""


@dataclass(frozen=True)
class Picture:
    """A picture on the page."""

    uri: str
    sharp: bool
    """Small ones are enlarged without smoothing."""


def write_page(path: str | Path, found: Contrast, folder: str | Path) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        found: the table.
        folder: that of the responses' file, which the paths of the pictures start from.

    Raises:
        UserError: when a picture cannot be read, or the file system refuses.
    """
    write_text(Path(path), page(found, Path(folder)))


def page(found: Contrast, folder: Path) -> str:
    """The page that `write_page` writes."""
    source = files("crosslayer.hallucination").joinpath("contrast.html.jinja").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    names = {shown.image for feature in found.features for shown in feature.examples if shown.image is not None}
    return template.render(
        found=found,
        places=list(PLACES),
        largest=max((abs(f.attribution.hallucinated) for f in found.features), default=0.0) or 1.0,
        pictures={name: _picture(folder / name) for name in sorted(names)},
        outline=_outline,
        listed=LISTED,
    )


def _picture(path: Path) -> Picture:
    picture = open_image(path)
    sharp = picture.width < WIDTH
    if not sharp:
        picture = picture.resize((WIDTH * 2, round(picture.height * WIDTH * 2 / picture.width)))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return Picture("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), sharp)


def _outline(shown: Shown) -> str:
    """Where the patch lies, as a style."""
    left, top, right, bottom = (f"{100 * edge:.4g}" for edge in shown.box or (0, 0, 1, 1))
    return f"left: {left}%; top: {top}%; right: calc(100% - {right}%); bottom: calc(100% - {bottom}%)"
