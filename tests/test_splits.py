"""Splits: an image is in one split alone, whatever else is in the data."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crosslayer import Example, load_data
from crosslayer.data.splits import SHARES, SPLITS, name_key, split_of

NAMES = st.text("abc0123456789_-", min_size=1, max_size=8).map(lambda name: f"{name}.jpg")


@given(NAMES, st.lists(st.text(max_size=20), min_size=1, max_size=5), st.integers(0, 2**32), st.text("ab/", max_size=6))
def test_all_examples_of_an_image_are_in_one_split(name, prompts, seed, folder):
    found = {split_of(Example(str(i), p, image=Path(folder) / name), seed) for i, p in enumerate(prompts)}
    assert len(found) == 1
    assert found <= set(SPLITS)


@given(st.sets(NAMES, min_size=2, max_size=30), st.data())
def test_adding_data_moves_nothing(names, data):
    examples = [Example(name, "p", image=Path(name)) for name in sorted(names)]
    some = data.draw(st.lists(st.sampled_from(examples), unique_by=lambda e: e.id))
    before = {e.id: split_of(e) for e in some}
    assert {e.id: split_of(e) for e in examples if e.id in before} == before


def test_shares_are_as_stated_and_seeds_draw_anew():
    examples = [Example(str(i), "p", image=Path(f"{i}.jpg")) for i in range(4000)]
    for seed in (0, 1):
        found = [split_of(e, seed) for e in examples]
        for name, share in zip(SPLITS, SHARES, strict=True):
            assert abs(found.count(name) / len(found) - share) < 0.02
    assert [split_of(e, 0) for e in examples] != [split_of(e, 1) for e in examples]


def test_cocos_names_of_one_image_are_one():
    keys = {name_key(name) for name in ("COCO_val2014_000000000042.jpg", "train2017/000000000042.jpg")}
    assert keys == {b"000000000042.jpg"}
    assert name_key("000000000043.jpg") not in keys


def test_pictures_and_texts_are_known_by_their_content():
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    seeds = range(40)
    assert [split_of(Example("a", "x", image=red), s) for s in seeds] == [
        split_of(Example("b", "y", image=red.copy()), s) for s in seeds
    ]
    assert [split_of(Example("a", "x", image=red), s) for s in seeds] != [
        split_of(Example("a", "x", image=blue), s) for s in seeds
    ]
    assert [split_of(Example("a", "x"), s) for s in seeds] == [split_of(Example("b", "x", "y"), s) for s in seeds]


def test_a_file_falls_into_three_splits_without_loss(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("\n".join(f"line {i}" for i in range(300)))
    parts = [{e.id for e in load_data(file, split=split)} for split in SPLITS]
    assert set.union(*parts) == {e.id for e in load_data(file)}
    assert sum(map(len, parts)) == 300
    assert min(map(len, parts)) > 10
