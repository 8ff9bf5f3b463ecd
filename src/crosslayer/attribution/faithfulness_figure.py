"""How graphs' predictions hold, as a figure: predicted against measured effects, and agreement downstream."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from crosslayer.attribution.faithfulness import Faithfulness
from crosslayer.files import atomic_path

LONGEST = 40
"""Letters of a run's name; more leave the axes no room."""
COLOURS = ("#2f6f8f", "#c2703d", "#6b8f3a", "#8a8f98")
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw_faithfulness(checks: Sequence[Faithfulness], path: str | Path) -> None:
    """Write the figure of one run, or of several on the same prompt, as PNG, atomically."""
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(9.6, 4.0), layout="constrained")
        left, right = canvas.subplots(1, 2)
        _effects(left, checks)
        _downstream(right, checks)
        with atomic_path(Path(path)) as temporary:
            canvas.savefig(temporary, format="png", dpi=150)


def _effects(ax: Axes, checks: Sequence[Faithfulness]) -> None:
    ends = [end for check in checks for f in check.features for end in (f.total, f.live)]
    ax.plot([min(ends), max(ends)], [min(ends), max(ends)], color="#cccccc", lw=1, zorder=0)
    for check, colour in zip(checks, COLOURS, strict=False):
        label = f"{_name(check)}: Spearman {check.total.rho:.2f}"
        x, y = [f.total for f in check.features], [f.live for f in check.features]
        ax.scatter(x, y, s=14, color=colour, alpha=0.75, lw=0, label=label)
    ax.set(xlabel="predicted, over all paths", ylabel="measured, in the model itself")
    ax.set_title(f"ablating a feature: effect on {checks[0].target}, in logits", fontsize=9)
    ax.legend(frameon=False, loc="lower right")


def _downstream(ax: Axes, checks: Sequence[Faithfulness]) -> None:
    for check, colour in zip(checks, COLOURS, strict=False):
        mlps = [at.mlps for at in check.downstream]
        ax.plot(mlps, [at.cosine for at in check.downstream], "o-", ms=4, color=colour, label=_name(check))
        ax.plot(mlps, [at.cosine_held for at in check.downstream], "--", lw=1, color=colour)
    ax.set(xlabel="MLPs between", ylabel="cosine", ylim=(0, 1.02))
    ax.set_title("silencing a feature: the stream's change in both", fontsize=9)
    ax.plot([], [], "--", lw=1, color="#777777", label="if no MLP answers")
    ax.legend(frameon=False, loc="lower left")


def _name(check: Faithfulness) -> str:
    """The run's, or the end of it."""
    return f"…{check.run[-LONGEST:]}" if len(check.run) > LONGEST else check.run or "run"
