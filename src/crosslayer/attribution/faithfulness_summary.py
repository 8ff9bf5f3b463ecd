"""How graphs' predictions hold, in words, for a terminal: a column for each run."""

from collections.abc import Sequence

from crosslayer.attribution.faithfulness import Faithfulness, Rank
from crosslayer.attribution.perturbation import Downstream


def faithfulness_summary(checks: Sequence[Faithfulness]) -> str:
    """A table of one run, or of several side by side on the same prompt.

    Args:
        checks: one of each run.
    """
    first = checks[0]
    mlps = [at.mlps for at in max((check.downstream for check in checks), key=len)]
    rows = [
        ["", *(check.run or "run" for check in checks)],
        ["Spearman with the live effect (p)"],
        ["  influence, with its size", *(_rank(check.influence) for check in checks)],
        ["  direct edge", *(_rank(check.direct) for check in checks)],
        ["  all paths", *(_rank(check.total) for check in checks)],
        ["direct edge under freeze, worst gap", *(f"{check.worst_frozen_gap:.1e}" for check in checks)],
        ["median size of effect", *(f"{check.median_size:.3g}" for check in checks)],
        ["  of others, same layer and place (p)", *(f"{c.median_size_random:.3g} ({c.p_random:.1g})" for c in checks)],
        ["changed stream after n MLPs: cosine, error (if none answers)"],
        *([f"  {n}", *(_changes(check.downstream, n) for check in checks)] for n in mlps),
    ]
    sizes = ", ".join(str(len(check.features)) for check in checks)
    return f"check: {sizes} features ablated, one at a time; effects on {first.target}\n{_aligned(rows)}"


def _rank(rank: Rank) -> str:
    return f"{rank.rho:.2f} ({rank.p:.1g})"


def _changes(downstream: Sequence[Downstream], mlps: int) -> str:
    at = next((at for at in downstream if at.mlps == mlps), None)
    return "-" if at is None else f"{at.cosine:.2f}, {at.error:.2f} ({at.cosine_held:.2f}, {at.error_held:.2f})"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first to the left, the others to the right; a row of one cell is a heading."""
    full = [row for row in rows if len(row) > 1]
    widths = [max(len(row[i]) for row in full) for i in range(len(full[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    )
