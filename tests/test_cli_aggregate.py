"""`crosslayer graph RUN DATA --aggregate` as a user meets it."""

import json

import pytest

from crosslayer import Wiring
from crosslayer.coders.transcoder import Provenance
from making import finished_coder
from test_cli import check_refused, run

__all__ = ["run"]


@pytest.fixture
def clt(llama_folder, tmp_path):
    """A run of the tiny Llama."""
    coder = finished_coder(Wiring.full(3))
    coder.provenance = Provenance(str(llama_folder))
    coder.save(tmp_path / "clt")
    return tmp_path / "clt"


@pytest.fixture
def asked(tmp_path):
    """Answered prompts, one of which has too short an answer."""
    rows = [{"prompt": f"is there a {w} ?", "response": "yes a cat ."} for w in ("cat", "dog", "bus", "star")]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"prompt": "a dog", "response": "no"}])))
    return tmp_path / "asked.jsonl"


def test_a_data_set_is_traced_compared_and_taken_up(run, clt, asked, tmp_path):
    command = ["graph", clt, asked, "--aggregate", "--out", tmp_path / "out", "--token", 3, "--limit", 2]
    code, out, err = run(*command)
    assert code == 0, err
    assert "asked.jsonl: 2 graphs; replacement score" in out
    assert {"aggregate.json", "aggregate.png", "edges.csv", "graphs", "nodes.csv"} == {
        path.name for path in (tmp_path / "out").iterdir()
    }
    first = (tmp_path / "out" / "aggregate.json").read_bytes()
    code, out, err = run(*command[:-1], 5, "--against", asked, "--bad-share", 0.2)
    assert code == 0, err
    assert "1 bad row skipped, listed in" in out
    assert "4 graphs against 4" in out
    assert json.loads((tmp_path / "out" / "contrast.json").read_text())["n_here"] == 4
    run(*command)
    assert (tmp_path / "out" / "aggregate.json").read_bytes() == first
    check_refused(run(*command, "--logits", 3), "at_most = 10, now 3", "--overwrite")
    assert run(*command, "--logits", 3, "--overwrite")[0] == 0
    assert sorted(path.name for path in (tmp_path / "out" / "graphs").iterdir()) == ["000000.json", "000001.json"]


def test_what_cannot_be_aggregated_is_said_in_a_line(run, clt, asked, tmp_path):
    command = ["graph", clt, asked, "--aggregate", "--out", tmp_path / "out"]
    check_refused(run(*command, "--limit", 0), "0 examples were asked for")
    check_refused(run(*command, "--workers", 0), "workers is 0")
    check_refused(run(*command, "--share", 2), "share is 2.0")
    check_refused(run(*command, "--node-threshold", 2), "node_threshold is 2.0")
    check_refused(run(*command, "--max-features", 0), "budget of features is 0")
    check_refused(run(*command, "--logits", 0), "0 of the likeliest tokens")
    check_refused(run(*command, "--target", "cat dog"), "rows are bad", "'cat dog' is 2 tokens")
    check_refused(run("graph", clt, tmp_path / "no.jsonl", "--aggregate", "--out", tmp_path / "out"), "no such data")
