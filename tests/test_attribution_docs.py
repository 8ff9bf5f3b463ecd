"""The Python of docs/attribution.md runs as it stands."""

import re
from pathlib import Path

from crosslayer import Wiring
from crosslayer.coders.transcoder import Provenance
from making import finished_coder
from making_graphs import random_graph

PAGE = Path(__file__).parent.parent / "docs" / "attribution.md"


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    coder = finished_coder(Wiring.full(10), D=128, F=8)
    coder.provenance = Provenance("emoji-llava")
    coder.save("runs/clt")
    random_graph(1, features=10).save("GRAPH.json")
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile("\n".join(examples), str(PAGE), "exec"), {})
    assert "replacement score" in capsys.readouterr().out
    assert {"graph.html", "graphs", "why"} < {path.name for path in tmp_path.iterdir()}
