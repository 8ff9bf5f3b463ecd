"""Figures of pages: one style, drawn into the page as SVG, and pictures as data URLs."""

import base64
import io
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from PIL import Image

STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "svg.hashsalt": "crosslayer",
}


def svg(draw: Callable[[Axes], None], size: tuple[float, float] = (5.6, 3.5)) -> str:
    """What `draw` draws, as an element for a page; the size is in inches."""
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=size, layout="constrained")
        draw(canvas.add_subplot())
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue().decode().split("?>", 1)[1].split(">", 1)[1]


def data_url(picture: Image.Image, scale: int = 2) -> str:
    """A data URL of the picture, enlarged without smoothing."""
    buffer = io.BytesIO()
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
