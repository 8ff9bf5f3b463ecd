"""Data: examples from files and the bundled world, and every way a file can be wrong."""

import json

import pytest
from PIL import Image

from crosslayer import Example, UserError, load_data
from crosslayer.data import load
from crosslayer.data.examples import Examples


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGBA", (20, 10), "red").save(tmp_path / "images" / "red.png")
    return tmp_path


def write_lines(path, *lines) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_a_text_file_holds_an_example_a_line(folder):
    data = load_data(write_lines(folder / "t.txt", "a cat", "", "  a dog"))
    assert list(data) == [Example("t.txt:1", "a cat", form="text"), Example("t.txt:3", "  a dog", form="text")]
    assert data.name == "t.txt"


def test_json_lines_hold_prompts_responses_and_images(folder):
    lines = [
        {"prompt": "describe", "response": "red", "image": "red.png"},
        {"text": "a cat"},
        {"prompt": "is it ?", "response": None, "image": None},
    ]
    data = load_data(write_lines(folder / "t.jsonl", *lines), images=folder / "images")
    assert data.skipped.reasons == {}
    assert data[0] == Example("t.jsonl:1", "describe", "red", folder / "images" / "red.png")
    assert data[0].picture().getpixel((3, 3)) == (255, 0, 0)
    assert data[1] == Example("t.jsonl:2", "a cat", form="text")
    assert (data[2].response, data[2].picture()) == (None, None)


def test_images_are_looked_for_beside_the_file_by_default(folder):
    data = load_data(write_lines(folder / "images" / "t.jsonl", {"prompt": "x", "image": "red.png"}))
    assert data[0].picture().size == (20, 10)


def test_only_line_ends_end_a_line(folder):
    prompts = ["one\u2028line", "and\x0bone"]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    assert [e.prompt for e in load_data(write_lines(folder / "t.jsonl", *lines))] == prompts
    (folder / "t.txt").write_bytes(b"a cat\r\na dog\r\n")
    assert [e.prompt for e in load_data(folder / "t.txt")] == ["a cat", "a dog"]


def test_n_takes_the_first(folder):
    assert [e.prompt for e in load_data(write_lines(folder / "t.txt", "a", "b", "c"), n=2)] == ["a", "b"]


def test_scenes_are_drawn_on_demand_and_alike(monkeypatch):
    data, again = load_data("emoji-scenes", n=6, seed=3), load_data("emoji-scenes", n=9, seed=3)
    assert len(data) == 6
    for one, other in zip(data, again[:6], strict=True):
        assert (one.id, one.prompt, one.response) == (other.id, other.prompt, other.response)
        assert one.picture().tobytes() == other.picture().tobytes()
    held_out = load_data("emoji-scenes", n=6, seed=3, split="test")
    assert data[0].picture().tobytes() != held_out[0].picture().tobytes()
    monkeypatch.setattr(load, "N_SCENES", 5)
    assert len(load_data("emoji-scenes")) == 5


def test_examples_are_a_sequence_made_when_asked_for():
    made = []

    def make(i: int) -> Example:
        made.append(i)
        return Example(str(i), "x")

    data = Examples("numbers", 10, make)
    assert made == []
    assert [e.id for e in data[2:9:3]] == ["2", "5", "8"]
    assert [e.id for e in data[2:9][1:3]] == ["3", "4"]
    assert data[-1].id == "9"
    assert made == [2, 5, 8, 3, 4, 9]
    with pytest.raises(IndexError):
        data[10]


def test_bad_lines_are_skipped_noted_and_counted(folder):
    lines = [{"prompt": f"p{i}"} for i in range(40)]
    lines[7], lines[9] = {"prompt": 5}, {"prompt": "x", "image": "none.png"}
    file = write_lines(folder / "t.jsonl", *lines)
    data = load_data(file)
    assert [e.prompt for e in data] == [f"p{i}" for i in range(40) if i not in (7, 9)]
    assert list(data.skipped.reasons) == ["t.jsonl:8", "t.jsonl:10"]
    with pytest.raises(
        UserError,
        match="2 of 40 rows are bad, more than --bad-share 0.04 allows; a larger share would list them; the first",
    ):
        load_data(file, bad_share=0.04)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", r"t.jsonl:3: is not JSON"),
        pytest.param("[" * 100_000, r"t.jsonl:3: is not JSON \(maximum recursion depth", id="deep"),
        ("[1]", r"t.jsonl:3: needs a string under 'prompt' \(or 'text'\); found \[1\]"),
        ({"response": "x"}, "t.jsonl:3: needs a string under 'prompt'"),
        ({"prompt": 5}, "t.jsonl:3: needs a string under 'prompt'"),
        ({"prompt": "x", "response": 5}, "t.jsonl:3: needs a string under 'response', where there is one; found 5"),
        (
            {"prompt": "x", "image": 5},
            "t.jsonl:3: needs a string under 'image', where there is one; found 5",
        ),
    ],
)
def test_wrong_lines_are_named_by_their_number(folder, line, named):
    with pytest.raises(UserError, match=named):
        load_data(write_lines(folder / "t.jsonl", {"prompt": "fine"}, "", line))


@pytest.mark.parametrize(
    ("image", "named"), [("none.png", "none.png: no such image"), (".", "images: is a folder, not an image")]
)
def test_images_that_are_not_there_are_found_at_once(folder, image, named):
    with pytest.raises(UserError, match=named):
        load_data(write_lines(folder / "t.jsonl", {"prompt": "x", "image": image}), images=folder / "images")


def test_wrong_data_sets_are_named(folder):
    with pytest.raises(UserError, match="emoji-sceenes: no such data, here or on the hub"):
        load_data("emoji-sceenes")
    with pytest.raises(UserError, match="nothing.txt: no such data; give a file, a folder, an id on the hub or one of"):
        load_data("nothing.txt")
    with pytest.raises(UserError, match=r"t.txt: holds no examples"):
        load_data(write_lines(folder / "t.txt", "", "  "))
    with pytest.raises(UserError, match="nowhere: no such folder of images"):
        load_data(write_lines(folder / "t.txt", "a"), images=folder / "nowhere")
    (folder / "t.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="t.txt:1: is not UTF-8 text"):
        load_data(folder / "t.txt")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"n": 0}, "0 examples"),
        ({"split": "tset"}, "'tset'; choose one of"),
        ({"context": 0}, "--context is 0"),
        ({"bad_share": 1.5}, "--bad-share is 1.5; choose between 0 and 1"),
        ({"columns": ("promt=x",)}, "'promt=x'; write NAME=COLUMN with NAME one of prompt, response, image"),
        ({"context": 64}, "--context says nothing about this kind of data"),
        ({"prompt": "who ?"}, "--prompt says nothing about this kind of data"),
    ],
)
def test_numbers_and_splits_that_are_none_are_refused(settings, named):
    with pytest.raises(UserError, match=named):
        load_data("emoji-scenes", **settings)


def test_images_for_a_model_that_reads_none_are_refused(llama, llava):
    assert len(load_data("emoji-scenes", model=llava, n=2)) == 2
    with pytest.raises(UserError, match="has images, which this model does not read"):
        load_data("emoji-scenes", model=llama, n=2)
