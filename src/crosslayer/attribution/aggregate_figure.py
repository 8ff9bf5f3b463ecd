"""An aggregate or a contrast as a figure: the nodes that matter most, by layer, with their intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from crosslayer.attribution.aggregate import Aggregate
from crosslayer.attribution.contrast import Contrast
from crosslayer.attribution.node import INPUTS
from crosslayer.attribution.roles import Role
from crosslayer.files import atomic_path
from crosslayer.metrics import Figure

SHOWN = 28
"""Nodes in a figure."""
RAISES, LOWERS, NEITHER = "#2f6f8f", "#c2703d", "#8a8f98"
COLOURS = {"gained": RAISES, "appeared": RAISES, "lost": LOWERS, "suppressed": LOWERS, "": NEITHER}
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Mark:
    """A node as it is drawn: a figure for each panel."""

    role: Role
    colour: str
    figures: Sequence[Figure]


def draw_aggregate(found: Aggregate, path: str | Path) -> None:
    """Write the figure of an aggregate as PNG, atomically: the nodes of most influence."""
    names = ("influence, as a share", "effect on the target, in logits")
    marks = [
        Mark(row.role, RAISES if row.effect.value > 0 else LOWERS, (row.influence, row.effect))
        for row in found.nodes[:SHOWN]
    ]
    _draw(f"mean of {len(found)} graphs, 95 % intervals", names, marks, path)


def draw_contrast(found: Contrast, path: str | Path) -> None:
    """Write the figure of a contrast as PNG, atomically: the nodes whose influence differs most surely."""
    names = ("difference of influence", "difference of effect, in logits")
    marks = [
        Mark(row.role, COLOURS[row.change], (row.influence.difference, row.effect.difference))
        for row in found.nodes[:SHOWN]
    ]
    title = f"{found.n_here} graphs less {found.n_there} others, 95 % intervals; grey: q above 5 %"
    _draw(title, names, marks, path)


def _draw(title: str, names: Sequence[str], marks: Sequence[Mark], path: str | Path) -> None:
    """A panel a measure; features and errors above, layers upwards, and inputs, on a scale of their own, below."""
    above, below = (
        sorted((mark for mark in marks if (mark.role.kind in INPUTS) == inputs), key=_height)
        for inputs in (False, True)
    )
    groups = [group for group in (above, below) if group]
    with mpl.rc_context(STYLE), atomic_path(Path(path)) as temporary:
        canvas = Canvas(figsize=(11, 2 + 0.24 * len(marks)), layout="constrained")
        rows = {"height_ratios": [len(group) + 1 for group in groups]}
        grid = canvas.subplots(len(groups), len(names), sharey="row", squeeze=False, gridspec_kw=rows)
        for panels, group in zip(grid, groups, strict=True):
            for i, panel in enumerate(panels):
                _panel(panel, group, i)
            panels[0].set_yticks(range(len(group)), [str(mark.role) for mark in group])
        for panel, name in zip(grid[-1], names, strict=True):
            panel.set_xlabel(name)
        canvas.suptitle(title, fontsize=10)
        canvas.savefig(temporary, format="png", dpi=110)


def _panel(panel: Axes, group: Sequence[Mark], i: int) -> None:
    """A point with its interval for each node."""
    panel.axvline(0, color="#b8bcc2", linewidth=0.8)
    panel.grid(axis="x", color="#ececec")
    for y, mark in enumerate(group):
        figure = mark.figures[i]
        panel.plot([figure.low, figure.high], [y, y], color=mark.colour, linewidth=1.6, solid_capstyle="butt")
        panel.plot([figure.value], [y], "o", color=mark.colour, markersize=4)


def _height(mark: Mark) -> tuple[int, str]:
    return -1 if mark.role.layer is None else mark.role.layer, str(mark.role)
