"""The README's Python runs as it stands."""

import re
from pathlib import Path

import crosslayer as xl

README = Path(__file__).parent.parent / "README.md"


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(example, str(README), "exec"), {})
    agreement, speech = capsys.readouterr().out.splitlines()
    assert 0 <= float(agreement.split()[0]) <= 1
    assert isinstance(speech, str)
    assert xl.CrossLayerTranscoder.load(tmp_path / "runs" / "clt").wiring.span == 10
