"""What `graph --check` does: measure whether graphs say what happens, and write it down."""

from collections.abc import Sequence
from pathlib import Path

from crosslayer.attribution.faithfulness import Faithfulness
from crosslayer.attribution.faithfulness_figure import draw_faithfulness
from crosslayer.attribution.faithfulness_summary import faithfulness_summary
from crosslayer.files import write_json

SCHEMA = 1


def check_paths(out: Path) -> tuple[Path, Path]:
    """GRAPH.check.json and GRAPH.check.png, beside GRAPH.json."""
    return out.with_suffix(".check.json"), out.with_suffix(".check.png")


def report_check(checks: Sequence[Faithfulness], prompt: str, out: Path) -> str:
    """Write figures and a picture beside the graph; what to print."""
    record, picture = check_paths(out)
    write_json(record, {"schema": SCHEMA, "prompt": prompt, "checks": [check.to_dict() for check in checks]})
    draw_faithfulness(checks, picture)
    return f"{faithfulness_summary(checks)}\nall figures in {record}, a picture in {picture}"
