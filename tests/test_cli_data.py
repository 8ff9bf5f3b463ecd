"""The command line on data of every kind: how it is read, what is skipped, and what stops it."""

import json
from functools import partial

import pytest
from PIL import Image

from crosslayer import workflow
from crosslayer.activations.capture import ModelSource
from test_cli import check_refused, run

__all__ = ["run"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(workflow, "ModelSource", partial(ModelSource, chunk_prompts=60))


@pytest.fixture
def asked(tmp_path):
    """60 prompts on pictures, one of which is damaged."""
    (tmp_path / "photos").mkdir()
    for i in range(60):
        Image.new("RGB", (40, 30), (4 * i, 90, 20)).save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "photos" / "6.png").write_bytes(b"")
    rows = [{"image": f"{i}.png", "question": "is there a dog ?"} for i in range(60)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "asked.jsonl"


SMALL = ("--tokens", 400, "--batch-tokens", 100, "--d-transcoder", 16, "--k", 6)


def test_answers_train_and_evaluate(run, llava_folder, asked, tmp_path):
    said, out = tmp_path / "said.jsonl", tmp_path / "run"
    photos = ["--images", tmp_path / "photos"]
    code, printed, err = run("respond", llava_folder, asked, *photos, "--out", said, "--max-new-tokens", 4)
    assert code == 0, err
    assert f"{said}: 59 answers" in printed
    assert f"1 bad row skipped, listed in {tmp_path / 'said.skipped.jsonl'}" in printed
    code, _, err = run("train", llava_folder, said, "--split", "train", "--out", out, *SMALL)
    assert code == 0, err
    code, printed, err = run("evaluate", out, asked, *photos, "--prompts", 20, "--json", tmp_path / "figures.json")
    assert code == 0, err
    assert "1 bad row skipped" in printed
    assert "6.png: is empty (0 bytes)" in (tmp_path / "figures.skipped.jsonl").read_text()
    check_refused(run("respond", llava_folder, asked, *photos, "--out", said), "already exists", "--overwrite")


def test_too_many_bad_rows_stop_a_training_and_are_listed(run, llava_folder, asked, tmp_path):
    for i in range(20, 30):
        (tmp_path / "photos" / f"{i}.png").write_text("no picture")
    line = ["train", llava_folder, asked, "--images", tmp_path / "photos", "--out", tmp_path / "run", *SMALL]
    check_refused(run(*line), "asked.jsonl: 11 of 60 rows are bad", "--bad-share 0.05")
    code, printed, err = run(*line, "--bad-share", 0.2, "--overwrite")
    assert code == 0, err
    listed = tmp_path / "run" / "skipped.jsonl"
    assert f"11 bad rows skipped, listed in {listed}" in printed
    assert len(listed.read_text().splitlines()) == 11


def test_text_is_packed_and_made_up(run, llama_folder, tmp_path):
    (tmp_path / "text.txt").write_text("a cat and a dog .\nis there a banana ? yes\n" * 30)
    for data in (tmp_path / "text.txt", "model-samples"):
        line = ["train", llama_folder, data, "--context", 16, "--out", tmp_path / "run", "--overwrite", *SMALL]
        code, _, err = run(*line)
        assert code == 0, err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--split", "tset"], ["'tset'", "train, validation, test"]),
        (["--context", 0], ["--context is 0"]),
        (["--columns", "promt=q"], ["'promt=q'", "NAME=COLUMN"]),
        (["--columns", "prompt=q"], ["has no column 'q' for the prompt", "it has image, question"]),
        (["--images", "nowhere"], ["nowhere: no such folder of images"]),
        (["--bad-share", 2], ["--bad-share is 2.0"]),
    ],
)
def test_readings_that_cannot_work(run, llava_folder, asked, tmp_path, options, words):
    photos = [] if "--images" in options else ["--images", tmp_path / "photos"]
    check_refused(run("train", llava_folder, asked, *photos, "--out", tmp_path / "run", *options, *SMALL), *words)
    assert not (tmp_path / "run").exists()


def test_ctrl_c_says_how_to_go_on(run, llava_folder, asked, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    line = ["respond", llava_folder, asked, "--images", tmp_path / "photos", "--out", tmp_path / "said.jsonl"]
    monkeypatch.setattr("crosslayer.answering.continuation", interrupt)
    code, _, err = run(*line)
    assert code == 130
    assert "stopped after 0 of 60 prompts; the same command with --resume goes on from there" in err
