"""Rows of every kind become examples, and bad ones say what is wrong with them."""

from pathlib import Path

import pytest
from PIL import Image

from crosslayer import Example, UserError
from crosslayer.data.rows import RowReader

READER = RowReader(Path("photos"), prompt="what is it ?")
PHOTO = Path("photos/a.jpg")


def read(row: dict, reader: RowReader = READER) -> Example:
    return reader.example("r:1", row)


def test_llava_conversations_have_turns_and_a_last_answer():
    turns = [("human", "<image>\nwho ?"), ("gpt", "a cat"), ("human", "sure ?"), ("gpt", "yes")]
    row = {"id": "7", "image": "a.jpg", "conversations": [{"from": f, "value": v} for f, v in turns]}
    assert read(row) == Example("r:1", "sure ?", "yes", PHOTO, (("<image>\nwho ?", "a cat"),))
    row["conversations"] = row["conversations"][:3]
    assert read(row) == Example("r:1", "sure ?", None, PHOTO, (("<image>\nwho ?", "a cat"),))


def test_messages_of_chat_templates_are_conversations_too():
    parts = [{"type": "image"}, {"type": "text", "text": "who ?"}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a cat"}]
    assert read({"images": ["a.jpg"], "messages": said}) == Example("r:1", "<image>who ?", "a cat", PHOTO)


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"prompt": "p", "response": "r", "image": "a.jpg"}, Example("r:1", "p", "r", PHOTO)),
        ({"question": "p", "answer": "r"}, Example("r:1", "p", "r")),
        ({"instruction": "p", "output": "r", "image_path": "a.jpg"}, Example("r:1", "p", "r", PHOTO)),
        ({"prompt": "p", "text": "r", "question_id": 3, "model_id": "m"}, Example("r:1", "p", "r")),
        ({"question_id": 1, "image": "a.jpg", "text": "p", "label": "yes"}, Example("r:1", "p", "yes", PHOTO)),
        ({"image": "a.jpg", "caption": "r"}, Example("r:1", "what is it ?", "r", PHOTO)),
        ({"image": "a.jpg", "label": "cat"}, Example("r:1", "what is it ?", "cat", PHOTO)),
        ({"prompt": "p", "text": {"raw": 1}, "form": 7}, Example("r:1", "p")),
        ({"image": "a.jpg", "label": 3}, Example("r:1", "what is it ?", None, PHOTO)),
        ({"text": "t"}, Example("r:1", "t", form="text")),
        ({"text": "t", "label": 1}, Example("r:1", "t", form="text")),
        ({"text": "p", "response": "r"}, Example("r:1", "p", "r")),
        ({"prompt": "p", "image": {"bytes": b"x", "path": "b.jpg"}}, Example("r:1", "p", image=b"x")),
        ({"prompt": "p", "image": {"bytes": None, "path": "a.jpg"}}, Example("r:1", "p", image=PHOTO)),
        ({"prompt": "p", "image": None, "response": None}, Example("r:1", "p")),
        (
            {"prompt": "p", "response": "r", "history": [["a", "b"]], "form": "text"},
            Example("r:1", "p", "r", None, (("a", "b"),), "text"),
        ),
    ],
)
def test_the_usual_names_of_columns_are_known(row, example):
    assert read(row) == example


def test_columns_can_have_other_names():
    reader = RowReader(Path("photos"), columns={"prompt": "q", "response": "a", "image": "file"})
    assert read({"q": "p", "a": "r", "file": "a.jpg", "image": "b.jpg"}, reader) == Example("r:1", "p", "r", PHOTO)
    with pytest.raises(UserError, match="r:1: has no column 'q' for the prompt; it has text"):
        read({"text": "p"}, reader)


def test_plain_prompts_go_round_the_template():
    assert read({"prompt": "p", "response": "r"}, RowReader(Path(), plain=True)).form == "text"


def test_pictures_that_are_loaded_already_stay_what_they_are():
    picture = Image.new("RGB", (2, 2))
    assert read({"prompt": "p", "images": [picture]}).image is picture


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"image": "a.jpg"}, "r:1: has an image and no prompt; say what to ask with --prompt"),
        ({"a": 1}, r"r:1: needs a string under 'prompt' \(or 'text'\); found {'a': 1}"),
        ({"prompt": "p", "images": ["a", "b"]}, "r:1: has 2 images under 'images'; give rows of one"),
        ({"conversations": []}, "r:1: needs turns of human and gpt .*; found none"),
        ({"conversations": "x"}, "r:1: needs turns of human and gpt .*; found none"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "needs turns of human and gpt .*; found gpt"),
        ({"conversations": [{"from": "human", "value": 3}]}, "needs turns with 'from' and 'value'"),
        ({"conversations": ["x"]}, "needs turns with 'from' and 'value', or 'role' and 'content'; found x"),
        ({"messages": [{"role": "system", "content": "x"}]}, "found system"),
        ({"prompt": "p", "history": "x"}, "r:1: needs pairs of prompt and response under 'history'"),
        ({"prompt": "p", "history": [["a"]]}, "r:1: needs pairs of prompt and response under 'history'"),
        ({"prompt": "p", "history": 3}, "r:1: needs pairs of prompt and response under 'history'"),
    ],
)
def test_bad_rows_are_named(row, named):
    with pytest.raises(UserError, match=named):
        read(row, RowReader(Path()))
