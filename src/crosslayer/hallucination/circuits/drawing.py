"""Circuits and their scores as figures: layers upwards, patches and words at the bottom, the target at the top."""

import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from crosslayer.attribution.aggregate import NodeRow
from crosslayer.attribution.node import INPUTS
from crosslayer.attribution.roles import Role
from crosslayer.hallucination.circuits.foresight import PUBLISHED, Foresight
from crosslayer.hallucination.circuits.parts import TARGET
from crosslayer.hallucination.circuits.planted import Planted
from crosslayer.hallucination.circuits.record import Drawn

COLUMNS = ("background", "image", "other", "named", "lead", "prompt", "answer", "last", "")
"""Places from left to right."""
RAISES, LOWERS, GREY = "#2f6f8f", "#c2703d", "#8a8f98"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "crosslayer",
}
STRENGTHS = 20
"""Pairs in the figure of their ranking."""

Places = dict[Role, tuple[float, float]]


def circuit_figure(found: Drawn, n_layers: int, n_nodes: int, *, width: float = 11.0, height: float = 6.4) -> str:
    """A circuit as SVG: a column for each place, nodes by influence, blue where they raise the target."""
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        _circuit(canvas.subplots(), found, n_layers, n_nodes)
        return _svg(canvas)


def ranking_figure(found: Planted) -> str:
    """The strongest pairs, planted ones dark, as SVG."""
    rows = found.strengths[:STRENGTHS][::-1]
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(9, 1 + 0.23 * len(rows)), layout="constrained")
        axes = canvas.subplots()
        axes.barh(range(len(rows)), [row.total for row in rows], color=[RAISES if r.planted else GREY for r in rows])
        axes.set_yticks(range(len(rows)), [f"{row.object} → {row.named}  ({row.n})" for row in rows])
        axes.axvline(0, color="#b8bcc2", linewidth=0.8)
        axes.set_xlabel("what the first's patch and word add to the naming of the second, in logits (namings)")
        return _svg(canvas)


def foresight_figure(found: Sequence[Foresight]) -> str:
    """AUCs with their intervals as SVG."""
    rows = found[::-1]
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(9, 1.1 + 0.3 * len(rows)), layout="constrained")
        axes = canvas.subplots()
        for y, row in enumerate(rows):
            axes.plot([row.auc.low, row.auc.high], [y, y], color=RAISES, linewidth=1.8)
            axes.plot([row.auc.value], [y], "o", color=RAISES)
        axes.axvline(0.5, color=GREY, linewidth=0.8)
        axes.axvline(PUBLISHED, color=LOWERS, linewidth=0.8, linestyle="--")
        axes.annotate(f"published {PUBLISHED}", (PUBLISHED + 0.005, len(rows) - 0.5), color=LOWERS, va="center")
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.set_ylim(-0.6, len(rows) - 0.1)
        axes.set_xlabel("AUC on images that the classifier has not seen, 95 % interval over images")
        return _svg(canvas)


def _circuit(axes: Axes, found: Drawn, n_layers: int, n_nodes: int) -> None:
    nodes = [row for row in found.nodes if row.role.kind != "target"][:n_nodes]
    at, centres = _places(nodes, n_layers)
    most = max((row.influence.value for row in found.edges), default=1.0)
    for edge in found.edges:
        if edge.source in at and edge.target in at:
            share = edge.influence.value / most
            ends = zip(at[edge.source], at[edge.target], strict=True)
            axes.plot(*ends, color=_colour(edge.effect.value), linewidth=0.4 + 3.5 * share, alpha=0.35, zorder=1)
    for row in nodes:
        _node(axes, row, *at[row.role])
    axes.set_yticks([0, *range(1, n_layers + 1), n_layers + 1], ["input", *map(str, range(n_layers)), "target"])
    axes.set_xticks(list(centres.values()), [name or "target" for name in centres])
    axes.tick_params(length=0)
    axes.set_ylim(-0.9, n_layers + 1.6)
    axes.grid(axis="y", color="#efefec")
    axes.set_axisbelow(True)
    axes.set_title(f"{found.name}: mean of {found.n} graphs", fontsize=10, loc="left")


def _node(axes: Axes, row: NodeRow, x: float, y: float) -> None:
    role, colour = row.role, _colour(row.effect.value)
    area = 18 + 700 * min(row.influence.value, 0.5)
    marker = "s" if role.kind in INPUTS else "o"
    face = "white" if role.kind == "error" else colour
    axes.scatter([x], [y], s=area, marker=marker, facecolor=face, edgecolor=colour, zorder=3)
    text = {"feature": str(role.feature), "token": role.label.strip() or "“ ”"}.get(role.kind, "")
    if text:
        axes.annotate(text, (x, y), (0, -6 - area**0.5 / 2), textcoords="offset points", ha="center", va="center",
                      fontsize=6.5, color="#3b4a5a", zorder=4)  # fmt: skip


def _places(nodes: Sequence[NodeRow], n_layers: int) -> tuple[Places, dict[str, float]]:
    """Where nodes stand, those of a place and layer side by side, and the middle of each place."""
    cells: dict[tuple[str, int], list[Role]] = defaultdict(list)
    for row in sorted(nodes, key=lambda row: str(row.role)):
        cells[row.role.place, _height(row.role, n_layers)].append(row.role)
    names = [name for name in COLUMNS if name and any(place == name for place, _ in cells)]
    widths = {name: max(len(roles) for (place, _), roles in cells.items() if place == name) for name in names}
    at: Places = {}
    centres, left = {}, 0.0
    for name, width in widths.items():
        centres[name] = left + (width - 1) / 2
        for (place, height), roles in cells.items():
            for i, role in enumerate(roles if place == name else ()):
                at[role] = (centres[name] + i - (len(roles) - 1) / 2, float(height))
        left += width + 0.8
    at[TARGET] = (centres.get("last", 0.0), n_layers + 1.0)
    return at, centres


def _height(role: Role, n_layers: int) -> int:
    if role.kind in INPUTS:
        return 0
    return n_layers if role.layer is None else role.layer + 1


def _colour(effect: float) -> str:
    return RAISES if effect >= 0 else LOWERS


def _svg(canvas: Canvas) -> str:
    text = io.StringIO()
    canvas.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
