"""The commands of docs/tutorial-hallucination.md, one after the other, at small size; and what stops them."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from PIL import Image

from crosslayer import cli
from crosslayer.files import read_json

PAGE = Path(__file__).parent.parent / "docs" / "tutorial-hallucination.md"
SMALL = {
    "train": "--tokens 6000 --d-transcoder 16",
    "score": "--limit 40",
    "contrast": "--traced 6 --resamples 20 --examples 1 --at-least 3",
    "circuits": "--cases 12 --max-features 8",
    "suppress": "--at-most 8 --steps 4 --ranked 1 --sets 1 --control-images 12 --cases 10 --at-least 5 "
    "--clean 2 --strengths 1 --points 30 --workers 2",
    "report": "--doses -1 1 --workers 2",
    "generate": "",
}
"""What is added to each command."""


def call(monkeypatch, line):
    """A command as a user types it; returns its exit code."""
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def commands():
    """Verb and line of each command, at small size: the last of an option given twice counts."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for line in "".join(blocks).splitlines():
        verb = line.removeprefix("crosslayer ").removeprefix("hallucination ").split()[0]
        yield verb, f"{line} {SMALL[verb]}"


DRIVER = """
import shlex, sys
from crosslayer import cli
for line in sys.stdin:
    sys.argv = shlex.split(line)
    cli.main()
"""
"""All commands in one process of their own: types, checked in other tests, would double the time."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all commands of the tutorial have run."""
    folder = tmp_path_factory.mktemp("tutorial")
    drive(folder, *(line for _, line in commands()))
    return folder


def drive(folder, *lines):
    """Call commands, one after the other."""
    driver = [sys.executable, "-c", DRIVER]
    done = subprocess.run(driver, input="\n".join(lines), cwd=folder, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_the_tutorial_ends_in_a_page_and_its_figures(folder):
    record = read_json(folder / "hallucination" / "report.json")
    page = (folder / "hallucination" / "report.html").read_text()
    assert record["unchanged"]["same"] == record["unchanged"]["prompts"] > 0
    for finding in record["findings"]:
        assert finding["evidence"].split(",")[0].replace('"', "&#34;") in page
    assert not re.findall(r"(?:src|href)=\"https?:|@import|url\(http", page)


def test_figures_of_the_report_are_shares_of_the_answers_on_disk(folder):
    """Counted anew from the answers alone."""
    out = folder / "hallucination"
    record = read_json(out / "report.json")
    for tested in record["methods"]:
        before, after = (
            [json.loads(line) for line in (out / "suppress" / f"{name}.jsonl").read_text().splitlines()]
            for name in ("before", tested["method"])
        )
        assert [r["id"] for r in before] == [r["id"] for r in after]
        for answers, side in ((before, "before"), (after, "after")):
            lone = [
                any(m["object"] == r["pair"][1] for m in r["mentions"])
                for r in answers
                if r["kind"] == "caption" and r["setting"] == "alone" and r["pair"]
            ]
            found = tested["changes"]["absent_named"][side]["value"]
            captions = [r for r in answers if r["kind"] == "caption"]
            recalled = sum(len({m["object"] for m in r["mentions"]} & set(r["truth"])) for r in captions)
            assert tested["changes"]["object_recall"][side]["value"] == pytest.approx(
                recalled / sum(len(r["truth"]) for r in captions)
            )
            assert found == pytest.approx(sum(lone) / len(lone))


def test_a_proof_that_one_process_goes_on_with_is_that_of_two(folder, tmp_path):
    """What is there is not tried again."""
    made, out = folder / "hallucination", tmp_path / "hallucination"
    copytree(made, out, ignore=ignore_patterns("report.*", "descent-dose-1.json*", "*-bias.json*", "unchanged.json"))
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "report").iterdir()}
    drive(folder, f"crosslayer hallucination report runs/clt --beside runs/plt --out {out} --doses -1 1")
    files = {path.name: path for path in (out / "report").iterdir()}
    assert all(files[name].stat().st_mtime_ns == written for name, written in kept.items())
    assert files.keys() == {path.name for path in (made / "report").iterdir()} > kept.keys()
    assert all(path.read_bytes() == (made / "report" / name).read_bytes() for name, path in files.items())
    assert read_json(out / "report.json") == read_json(made / "report.json")


def test_a_report_of_another_run_is_refused_in_one_line(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert call(monkeypatch, "crosslayer hallucination report runs/plt --out hallucination") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "hallucination/edit.json: these edits are for run" in line


POPE = {"question_id": 1, "image": "a.png", "text": "Is there a dog in the image?", "label": "no"}
"""A question as POPE writes it."""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("report runs/clt --out few --scenes 3", ["fall to the split", "needed", "in all would do"]),
        ("report --out alone --scenes 3", ["fall to the split", "needed", "in all would do"]),
        (
            "score emoji-llava coco_pope_random.jsonl --answers other.jsonl --images . --out a",
            ["other.jsonl:1", "none of 1 answers"],
        ),
        ("score emoji-llava fish.jsonl --images . --out b", ["zebrafish", "synonym table coco", "--synonyms"]),
        ("report --out c --doses 0.5 1", ["doses are (0.5, 1.0)", "below 0"]),
        ("report --out d --tokens 0", ["tokens is 0"]),
    ],
    ids=[
        "too few examples",
        "too few, of runs in the folder",
        "labels that match nothing",
        "an unknown object",
        "no opposite dose",
        "no tokens",
    ],
)
def test_bad_input_is_one_clear_line(folder, monkeypatch, capsys, line, said):
    monkeypatch.chdir(folder)
    Image.new("RGB", (48, 48)).save("a.png")
    for name in ("clt", "plt"):
        copytree(Path("runs", name), Path("alone", name), dirs_exist_ok=True)
    Path("coco_pope_random.jsonl").write_text(json.dumps(POPE))
    Path("fish.jsonl").write_text(json.dumps({**POPE, "text": "Is there a zebrafish in the image?"}))
    Path("other.jsonl").write_text(json.dumps({"question_id": 77, "text": "yes"}))
    assert call(monkeypatch, f"crosslayer hallucination {line}") == 2
    err = [part for part in capsys.readouterr().err.splitlines() if part.startswith("crosslayer: ")]
    assert len(err) == 1
    for words in said:
        assert words in err[0]
