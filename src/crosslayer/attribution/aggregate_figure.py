"""An aggregate or a contrast as a figure: the nodes that matter most, by layer, with their intervals."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas

from crosslayer.attribution.aggregate import Aggregate
from crosslayer.attribution.contrast import Contrast
from crosslayer.attribution.roles import Role
from crosslayer.files import atomic_path
from crosslayer.metrics import Figure

SHOWN = 28
"""Nodes in a figure."""
RAISES, LOWERS, NEITHER = "#2f6f8f", "#c2703d", "#8a8f98"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw_aggregate(found: Aggregate, path: str | Path) -> None:
    """Write the figure of an aggregate as PNG, atomically: the nodes of most influence."""
    nodes = sorted(found.nodes[:SHOWN], key=lambda row: _height(row.role))
    columns = {
        "influence, as a share": [row.influence for row in nodes],
        "effect on the target, in logits": [row.effect for row in nodes],
    }
    colours = [RAISES if row.effect.value > 0 else LOWERS for row in nodes]
    _draw(f"mean of {len(found)} graphs, 95 % intervals", [row.role for row in nodes], columns, colours, path)


def draw_contrast(found: Contrast, path: str | Path) -> None:
    """Write the figure of a contrast as PNG, atomically: the nodes whose influence differs most surely."""
    nodes = sorted(found.nodes[:SHOWN], key=lambda row: _height(row.role))
    columns = {
        "difference of influence": [row.influence.difference for row in nodes],
        "difference of effect, in logits": [row.effect.difference for row in nodes],
    }
    ups = {"gained": RAISES, "appeared": RAISES, "lost": LOWERS, "suppressed": LOWERS}
    colours = [ups.get(row.change, NEITHER) for row in nodes]
    title = f"{found.n_here} graphs less {found.n_there} others, 95 % intervals; grey: q above 5 %"
    _draw(title, [row.role for row in nodes], columns, colours, path)


def _height(role: Role) -> tuple[bool, int, str]:
    """Inputs at the bottom, layers upwards."""
    return role.kind in ("feature", "error"), -1 if role.layer is None else role.layer, str(role)


def _draw(
    title: str,
    roles: Sequence[Role],
    columns: Mapping[str, Sequence[Figure]],
    colours: Sequence[str],
    path: str | Path,
) -> None:
    """A row a node, a panel a measure, a point with its interval where they meet."""
    with mpl.rc_context(STYLE), atomic_path(Path(path)) as temporary:
        canvas = Canvas(figsize=(11, 1.4 + 0.24 * len(roles)), layout="constrained")
        panels = canvas.subplots(1, len(columns), sharey=True)
        for panel, (name, figures) in zip(panels, columns.items(), strict=True):
            panel.axvline(0, color="#b8bcc2", linewidth=0.8)
            for y, (figure, colour) in enumerate(zip(figures, colours, strict=True)):
                panel.plot([figure.low, figure.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
                panel.plot([figure.value], [y], "o", color=colour, markersize=4)
            panel.set_xlabel(name)
            panel.grid(axis="x", color="#ececec")
        panels[0].set_yticks(range(len(roles)), list(map(str, roles)))
        canvas.suptitle(title, fontsize=10)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", dpi=110)
        temporary.write_bytes(buffer.getvalue())
