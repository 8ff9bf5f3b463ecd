"""`crosslayer graph RUN DATA --aggregate` as a user meets it."""

import json
import signal

import pytest
from PIL import Image

from crosslayer import Wiring
from crosslayer.attribution import many
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
    check_refused(run(*command, "--max-positions", 0), "budget of positions is 0")
    check_refused(run(*command, "--pool-patches", 0), "pool_patches is 0; choose at least 1")
    check_refused(run(*command, "--logits", 0), "0 of the likeliest tokens")
    check_refused(run(*command, "--target", "cat dog"), "rows are bad", "'cat dog' is 2 tokens")
    check_refused(run("graph", clt, tmp_path / "no.jsonl", "--aggregate", "--out", tmp_path / "out"), "no such data")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "zebroid"], ["rows are bad", "'zebroid' is no token"]),
        (["--token", 30], ["rows are bad", "token is 30", "a larger share would list them"]),
        (["--token", 30, "--bad-share", 1], ["none of 5 examples can be traced; the first: token is 30"]),
        (["--pool-patches", 2, "--workers", 2], ["no image patches to pool"]),
    ],
)
def test_what_is_refused_before_a_graph_is_done_leaves_nothing_behind(run, clt, asked, tmp_path, options, words):
    command = ["graph", clt, asked, "--aggregate", *options, "--out"]
    check_refused(run(*command, tmp_path / "of" / "out"), *words)
    assert not (tmp_path / "of").exists()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    check_refused(run(*command, tmp_path / "there"), *words)
    assert [path.name for path in tmp_path.joinpath("there").rglob("*")] == ["notes.txt"]


def test_what_is_refused_later_keeps_its_graphs_and_goes_on(run, clt, asked, tmp_path):
    out = tmp_path / "out"
    command = ["graph", clt, asked, "--aggregate", "--out", out, "--token", 3]
    check_refused(run(*command), "1 of 5 rows are bad", f"listed in {out / 'skipped.jsonl'}")
    files = sorted(out.joinpath("graphs").iterdir())
    assert sorted(path.name for path in out.iterdir()) == ["graphs", "skipped.jsonl"]
    assert len(files) == 4
    made = [file.stat().st_mtime_ns for file in files]
    assert run(*command, "--bad-share", 0.2)[0] == 0
    assert [file.stat().st_mtime_ns for file in files] == made
    assert json.loads((out / "aggregate.json").read_text())["n"] == 4
    assert json.loads((out / "skipped.jsonl").read_text())["row"] == "asked.jsonl:5"


@pytest.mark.parametrize("done", [0, 2])
def test_ctrl_c_keeps_the_graphs_that_are_done_and_says_how_to_go_on(run, clt, asked, tmp_path, monkeypatch, done):
    calls, attribute = [], many.attribute

    def interrupted(*args, **settings):
        calls.append(args)
        if len(calls) > done:
            signal.raise_signal(signal.SIGINT)
        return attribute(*args, **settings)

    command = ["graph", clt, asked, "--aggregate", "--out", tmp_path / "of" / "out", "--limit", 4]
    with monkeypatch.context() as patch:
        patch.setattr(many, "attribute", interrupted)
        code, _, err = run(*command)
    assert code == 130
    assert err.strip().splitlines()[-1] == (
        f"crosslayer: stopped after {done} of 4 graphs; the same command goes on from there"
    )
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("of/**/*.*"))
    assert left == [f"of/out/graphs/{i:06d}.json" for i in range(done)]
    assert (tmp_path / "of").exists() == bool(done)
    assert run(*command)[0] == 0
    assert json.loads((tmp_path / "of" / "out" / "aggregate.json").read_text())["n"] == 4


def test_patches_are_pooled_and_other_settings_than_those_that_were_begun_with_are_refused(run, llava_folder, tmp_path):
    coder = finished_coder(Wiring.full(3))
    coder.provenance = Provenance(str(llava_folder))
    coder.save(tmp_path / "seeing")
    for i, colour in enumerate(("teal", "navy")):
        Image.new("RGB", (24, 24), colour).save(tmp_path / f"{i}.png")
    rows = [{"prompt": "is there a cat ?", "response": "a cat .", "image": f"{i}.png"} for i in range(2)]
    (tmp_path / "seen.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["graph", tmp_path / "seeing", tmp_path / "seen.jsonl", "--aggregate", "--out", tmp_path / "out"]
    limited = [*command, "--pool-patches", 2, "--max-positions", 4]
    code, out, err = run(*limited)
    assert code == 0, err
    assert "% of influence ends at features without a row of their own" in out
    about = json.loads((tmp_path / "out" / "aggregate.json").read_text())["about"]
    assert (about["pool_patches"], about["positions"]) == (2, 4)
    check_refused(run(*command, "--max-positions", 4), "pool_patches = 2, now None is asked for", "--overwrite")
    check_refused(run(*command, "--pool-patches", 2), "positions = 4, now None is asked for", "--overwrite")
    check_refused(run(*command, "--pool-patches", 4, "--overwrite"), "a grid of 3 x 3; choose 1 to 3")
    assert run(*command, "--overwrite", "--share", 1)[0] == 0
