"""`crosslayer hallucination score` as a user meets it, and a model's answers in memory against those on disk."""

import csv
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

import crosslayer
from crosslayer import Answering, answering, cli, load_model
from crosslayer.hallucination.asking import ask, ask_on_disk
from crosslayer.hallucination.responses import read_responses
from crosslayer.hallucination.scenes import scene_task
from crosslayer.hallucination.scoring import label_all, score
from crosslayer.replacement.model import ReplacementModel
from crosslayer.wiring import Wiring
from crosslayer.zoo.emoji_llava.measure import measure
from crosslayer.zoo.emoji_llava.replies import replies
from making import finished_coder

PAGE = Path(__file__).parent.parent / "docs" / "hallucination.md"


@pytest.fixture(scope="module")
def emoji():
    return load_model("emoji-llava")


@pytest.fixture
def run(monkeypatch, capsys):
    """Call `crosslayer hallucination`; returns exit code, standard output and the last line of standard error."""

    def call(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["crosslayer", "hallucination", *map(str, args)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, (err.strip().splitlines() or [""])[-1]

    return call


def test_the_bundled_model_hallucinates_as_its_own_measure_says(run, emoji, tmp_path):
    out, n = tmp_path / "h", 24
    code, printed, err = run("score", "--out", out, "--limit", n)
    assert code == 0, err
    assert "adversarial" in printed
    figures = json.loads((out / "score.json").read_text())["figures"]
    found = {(f["kind"], f["group"], f["measure"]): f["figure"]["value"] for f in figures}
    known = measure(partial(replies, emoji.model, emoji.processor), n)
    assert 0.5 < known["lead alone: captions that name the absent partner"] < 1
    for ours, name in (
        (("planted", "all", "absent_named"), "lead alone: captions that name the absent partner"),
        (("planted", "all", "absent_affirmed"), 'lead alone: "yes" when asked for the absent partner'),
        (("planted", "all", "beside_its_lead_named"), "lead and partner: captions that name the partner"),
        (("planted", "all", "without_its_lead_named"), "partner without lead: captions that name the partner"),
        (("caption", "plain", "object_recall"), "plain scenes: seen objects that the caption names"),
    ):
        assert found[ours] == pytest.approx(known[name], abs=1e-12)
    rows = list(csv.DictReader((out / "score.csv").read_text().splitlines()))
    assert [(r["kind"], r["group"], r["measure"], int(r["of"])) for r in rows] == [
        (f["kind"], f["group"], f["measure"], f["of"]) for f in figures
    ]
    assert all((out / r.image).is_file() for r in read_responses(out / "responses.jsonl"))


def test_a_resumed_score_is_that_of_an_unbroken_run(run, tmp_path, monkeypatch):
    options, left = ("--limit", 2, "--questions", 1, "--batch-prompts", 8), iter([answering.continuation] * 2)

    def interrupted(*args, **sampling):
        generate = next(left, None)
        if generate is None:
            raise KeyboardInterrupt
        return generate(*args, **sampling)

    assert run("score", "--out", tmp_path / "whole", *options)[0] == 0
    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(answering, "continuation", interrupted)
        code, _, err = run("score", "--out", broken, *options)
    assert code == 130
    assert "stopped after 16 of 38 prompts; the same command with --resume goes on from there" in err
    assert "already exists and is not empty" in run("score", "--out", broken, *options)[2]
    code, _, err = run("score", "--out", broken, *options, "--limit", 3, "--resume")
    assert code == 2
    assert "asked.json: was started with queries = 38, now 57 is asked for" in err
    for _ in range(2):  # to the end, and then once more from answers that are complete
        assert run("score", "--out", broken, *options, "--resume")[0] == 0
        for name in ("responses.jsonl", "score.json", "score.csv", "asked.json"):
            assert (broken / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_answers_in_memory_are_those_on_disk_and_follow_what_is_done_to_the_model(emoji, tmp_path):
    task, settings = scene_task(2, questions=1), Answering(max_new_tokens=12, batch_prompts=16)
    said = ask_on_disk(emoji, task, tmp_path, settings, name="emoji-llava")
    on_disk = label_all(task, said, emoji.processor)
    in_memory = ask(emoji, task.queries, tmp_path, task.table, max_new_tokens=12)
    assert in_memory == on_disk
    coder = finished_coder(Wiring.full(emoji.n_layers), D=emoji.d_model)
    with ReplacementModel(emoji, coder).replaced():
        replaced = ask(emoji, on_disk, tmp_path, task.table, max_new_tokens=12)
    assert [r.id for r in replaced] == [r.id for r in on_disk]
    assert (
        score(replaced).figure("caption", "object_recall").value
        < score(on_disk).figure("caption", "object_recall").value
    )
    assert ask(emoji, on_disk, tmp_path, task.table, max_new_tokens=12) == on_disk


def test_a_run_answers_through_its_replacement_model(run, emoji, tmp_path):
    coder = finished_coder(Wiring.full(emoji.n_layers), D=emoji.d_model)
    coder.provenance = type(coder.provenance)("emoji-llava")
    coder.save(tmp_path / "run")
    options = ("--limit", 1, "--questions", 1, "--max-new-tokens", 6)
    code, _, err = run("score", tmp_path / "run", "--out", tmp_path / "out", *options)
    assert code == 0, err
    task = scene_task(1, questions=1)
    expected = ReplacementModel(emoji, coder).generate(task.queries[0].prompt, task.picture(0), max_new_tokens=6)
    assert read_responses(tmp_path / "out" / "responses.jsonl")[0].response == expected


@pytest.fixture
def pope(tmp_path):
    Image.new("RGB", (96, 96)).save(tmp_path / "7.jpg")
    rows = [
        {"question_id": i, "image": "7.jpg", "text": f"is there a {name} ?", "label": label}
        for i, (name, label) in enumerate([("dog", "yes"), ("cat", "no"), ("pizza", "no")])
    ]
    path = tmp_path / "pope_random.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pope_files_are_asked_or_answers_to_them_scored(run, pope, llava_folder, tmp_path):
    code, printed, err = run("score", llava_folder, pope, "--out", tmp_path / "asked", "--max-new-tokens", 4)
    assert code == 0, err
    assert "1 images, 0 captions, 3 questions" in printed
    answers = tmp_path / "said.jsonl"
    said = ("Yes", "Maybe")
    answers.write_text("".join(json.dumps({"question_id": i, "text": text}) + "\n" for i, text in enumerate(said)))
    code, printed, err = run("score", "emoji-llava", pope, "--answers", answers, "--out", tmp_path / "said")
    assert code == 0, err
    assert "1 of 3 queries have no answer" in printed
    scored = json.loads((tmp_path / "said" / "score.json").read_text())
    assert (scored["questions"], scored["unparseable"]) == (2, 1)
    assert read_responses(tmp_path / "said" / "responses.jsonl")[0].mentions[0].tokens == (0, 1)


def test_captions_that_exist_are_scored_without_a_model(run, tmp_path):
    annotations = {
        "images": [{"id": 7, "file_name": "COCO_val2014_000000000007.jpg"}],
        "annotations": [{"image_id": 7, "category_id": 18}],
        "categories": [{"id": 18, "name": "dog"}],
    }
    (tmp_path / "i.json").write_text(json.dumps(annotations))
    (tmp_path / "said.jsonl").write_text(json.dumps({"image_id": 7, "caption": "A dog and a hot dog."}))
    options = ("--answers", tmp_path / "said.jsonl", "--out", tmp_path / "out")
    assert run("score", "--instances", tmp_path / "i.json", *options)[0] == 0
    figures = json.loads((tmp_path / "out" / "score.json").read_text())["figures"]
    assert [f["figure"]["value"] for f in figures] == [0.5, 1, 1, 6]
    code, _, err = run("score", *options, "--overwrite")
    assert code == 2
    assert "said.jsonl: what do these answer? name POPE's questions as DATA" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--limit", 0], "limit is 0; choose at least 1"),
        (["--questions", -1], "questions is -1; choose at least 0"),
        (["--captions", "c.json"], "--captions is given without --instances"),
        (["--synonyms", "coco"], "emoji-scenes: bring their own truth, words and prompts; leave --instances"),
        (["--prompt", "Hm?"], "emoji-scenes: bring their own truth, words and prompts; leave --instances"),
        (["--answers", "none.jsonl"], "none.jsonl: no such file of answers"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(run, tmp_path, args, words):
    code, printed, err = run("score", "--out", tmp_path / "out", *args)
    assert (code, printed) == (2, "")
    assert err.startswith("crosslayer: ")
    assert words in err
    assert not (tmp_path / "out").exists()


def test_scenes_are_for_the_bundled_model(run, llava_folder, tmp_path):
    code, _, err = run("score", llava_folder, "--out", tmp_path / "out")
    assert code == 2
    assert "name the DATA to ask" in err


def test_the_examples_of_the_docs_run(run, emoji, tmp_path, monkeypatch):
    assert run("score", "--out", tmp_path / "h", "--limit", 1, "--questions", 1)[0] == 0
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    coder = finished_coder(Wiring.full(emoji.n_layers), D=emoji.d_model)
    names = {"xl": crosslayer, "model": emoji, "clt": coder}
    exec(compile("\n".join(examples), str(PAGE), "exec"), names)
    assert [r.id for r in names["edited"]] == [r.id for r in names["responses"]]
