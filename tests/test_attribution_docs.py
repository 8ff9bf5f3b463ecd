"""The Python of docs/attribution.md runs as it stands."""

import re
from pathlib import Path

from making_graphs import random_graph

PAGE = Path(__file__).parent.parent / "docs" / "attribution.md"


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random_graph(1, features=10).save("GRAPH.json")
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile("\n".join(examples), str(PAGE), "exec"), {})
    assert "replacement score" in capsys.readouterr().out
    assert {"graph.html", "graphs"} < {path.name for path in tmp_path.iterdir()}
