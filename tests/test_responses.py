"""Labelled responses: on disk and back without a model, and what is said about a file that holds something else."""

import json

import pytest

from crosslayer import UserError
from crosslayer.hallucination.responses import Mention, Response, read_responses, write_responses

SAID = Response(
    id="scene-1-caption",
    image_id="scene-1",
    image="images/scene-1.png",
    prompt="describe the picture .",
    kind="caption",
    truth=("dog", "star"),
    setting="alone",
    pair=("dog", "bone"),
    response="a dog and a bone .",
    token_ids=(3, 4, 5, 3, 6, 7),
    mentions=(
        Mention(object="dog", chars=(2, 5), tokens=(1, 2), hallucinated=False),
        Mention(object="bone", chars=(12, 16), tokens=(4, 5), hallucinated=True),
    ),
)


def test_responses_come_back_from_disk_as_they_were(tmp_path):
    asked = Response(
        id="q", image_id="7", image=None, prompt="is there a cat ?", kind="question", truth=(), object="cat",
        samplings=("random", "popular"), response="perhaps",
    )  # fmt: skip
    write_responses(tmp_path / "r.jsonl", [SAID, asked])
    assert read_responses(tmp_path / "r.jsonl") == [SAID, asked]
    assert (SAID.hallucinates, asked.hallucinates) == (True, False)
    assert SAID.answered(tmp_path).image == tmp_path / "images" / "scene-1.png"


def test_what_is_no_labelled_response_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    with pytest.raises(UserError, match="r.jsonl: no such file; `crosslayer hallucination score` writes one"):
        read_responses(path)
    for text, words in (
        ("\n", "holds no responses"),
        ("{", "r.jsonl:1: is no"),
        ('{"id": "a"}', "r.jsonl:1.*mentions"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            read_responses(path)
    write_responses(path, [SAID])
    path.write_text(path.read_text() + json.dumps({"mentions": [], "id": "a"}))
    with pytest.raises(UserError, match="r.jsonl:2: is no labelled response .*'image_id'"):
        read_responses(path)
