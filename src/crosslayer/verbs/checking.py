"""What `graph --check` does: measure whether graphs say what happens, and write it down."""

from collections.abc import Sequence
from pathlib import Path

from crosslayer.attribution.faithfulness import faithfulness
from crosslayer.attribution.faithfulness_figure import draw_faithfulness
from crosslayer.attribution.faithfulness_summary import faithfulness_summary
from crosslayer.attribution.graph import AttributionGraph
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.data.examples import Example
from crosslayer.files import write_json
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import prepare

SCHEMA = 1


def check_paths(out: Path) -> tuple[Path, Path]:
    """GRAPH.check.json and GRAPH.check.png, beside GRAPH.json."""
    return out.with_suffix(".check.json"), out.with_suffix(".check.png")


def checked_on(
    model: LoadedModel, graphs: Sequence[tuple[CrossLayerTranscoder, AttributionGraph]], example: Example, out: Path
) -> str:
    """Check transcoders' graphs of an example; write figures and a picture beside the graph; what to print.

    Those of an earlier graph go first, so that they never lie beside this one.
    """
    record, picture = check_paths(out)
    for path in (record, picture):
        path.unlink(missing_ok=True)
    batch = prepare(model.model, model.processor, [example])
    checks = [faithfulness(model, coder, graph, batch) for coder, graph in graphs]
    write_json(record, {"schema": SCHEMA, "prompt": example.prompt, "checks": [check.to_dict() for check in checks]})
    draw_faithfulness(checks, picture)
    return f"{faithfulness_summary(checks)}\nall figures in {record}, a picture in {picture}"
