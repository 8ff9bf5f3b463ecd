"""Mixtures: shares as weighted, nothing lost, the same order every time, no image in two splits."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crosslayer import Example, UserError, load_data
from crosslayer.data.examples import Examples
from crosslayer.data.mixture import mix
from crosslayer.data.skipped import Skipped


def part(name: str, n: int) -> Examples:
    return Examples(name, n, lambda i: Example(f"{name}:{i}", name))


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 10)), min_size=1, max_size=4))
def test_shares_are_as_weighted_all_along_and_nothing_is_lost(sizes):
    names = [f"p{i}" for i in range(len(sizes))]
    parts, weights = [part(name, n) for name, (n, _) in zip(names, sizes, strict=True)], [w for _, w in sizes]
    mixed = list(mix("mix", parts, weights, Skipped()))
    wanted = {f"{name}:{i}" for name, (n, _) in zip(names, sizes, strict=True) for i in range(n)}
    assert {e.id.partition("/")[2] for e in mixed} == wanted
    for end in {1, len(mixed) // 2, len(mixed)} - {0}:
        counts = Counter(e.prompt for e in mixed[:end])
        for name, weight in zip(names, weights, strict=True):
            assert abs(counts[name] - end * weight / sum(weights)) <= len(sizes)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(30):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")
    told = [{"image": f"{i}.png", "prompt": f"p{i}", "response": "r"} for i in range(30)]
    (tmp_path / "told.jsonl").write_text("\n".join(map(json.dumps, told)))
    (tmp_path / "text.txt").write_text("a cat and a dog\n" * 10)
    (tmp_path / "other.yaml").write_text("- {data: mix.yaml}")
    return tmp_path


def mixture(files, *lines: str):
    (files / "mix.yaml").write_text("\n".join(lines))
    return files / "mix.yaml"


def test_a_mixture_file_mixes_kinds_of_data(files, llava):
    told, text = "- {data: told.jsonl, images: photos, weight: 3}", "- {data: text.txt, context: 8}"
    data = load_data(mixture(files, told, text, "- data: photos", "  prompt: who ?"), model=llava)
    kinds = Counter(e.id[0] for e in data)
    assert kinds == {"1": 90, "2": 30, "3": 30}
    assert data[0] == Example("1/told.jsonl:1", "p0", "r", files / "photos" / "0.png")
    assert [e.id for e in data] == [e.id for e in load_data(files / "mix.yaml", model=llava)]
    assert len(load_data(files / "mix.yaml", model=llava, n=7)) == 7


def test_an_image_is_in_one_split_of_all_parts(files):
    path = mixture(files, "- {data: told.jsonl, images: photos}", "- {data: photos, prompt: 'who ?'}")
    seen = {split: {e.image for e in load_data(path, split=split)} for split in ("train", "test")}
    assert seen["train"] & seen["test"] == set()
    assert min(len(images) for images in seen.values()) > 0


def test_bad_rows_of_all_parts_are_noted(files):
    (files / "photos" / "3.png").unlink()
    path = mixture(files, "- {data: text.txt}", "- {data: told.jsonl, images: photos}")
    assert list(load_data(path).skipped.reasons) == ["2/told.jsonl:4"]


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (["- {data: text.txt, weight: 0}"], "part 1 needs 'data' and a 'weight' above 0; found 'text.txt', 0"),
        (["- {weight: 1}"], "part 1 needs 'data'"),
        (["data: text.txt"], "needs a list of parts"),
        (["- ["], "cannot be read as YAML"),
        (["- {data: text.txt, split: test}"], "has 'split', which is none of images, prompt"),
        (["- {data: nothing.txt}"], "nothing.txt: no such data"),
        (["- {data: text.txt, context: 0}"], "--context is 0; choose at least 1"),
        (["- {data: text.txt, context: abc}"], "mix.yaml: context is 'abc'; needs a YAML int"),
        (["- {data: text.txt, plain: 'no'}"], "mix.yaml: plain is 'no'; needs a YAML bool"),
        (["- {data: photos, prompt: 3}"], "mix.yaml: prompt is 3; needs a YAML str"),
        (["- {data: told.jsonl, columns: prompt=q}"], "mix.yaml: columns is 'prompt=q'; needs a YAML list"),
        (["- {data: told.jsonl, columns: [3]}"], "--columns has '3'; write NAME=COLUMN"),
        (["- {data: text.txt, weight: .inf}"], "needs 'data' and a 'weight' above 0; found 'text.txt', inf"),
        (
            ["- {data: text.txt, weight: 1.0e+9}", "- {data: text.txt}"],
            r"weights \[1000000000.0, 1.0\] make 10,000,000,010",
        ),
        (["- {data: mix.yaml}"], r"mix.yaml: mixes itself \(.*mix.yaml of .*mix.yaml\); name other data in part 1"),
        (
            ["- {data: text.txt}", "- {data: other.yaml}"],
            r"other.yaml: mixes itself \(.*mix.yaml of .*other.yaml of .*mix",
        ),
    ],
)
def test_wrong_mixtures_are_named(files, lines, named):
    with pytest.raises(UserError, match=named):
        load_data(mixture(files, *lines))
    with pytest.raises(UserError, match="--context says nothing about this kind of data"):
        load_data(mixture(files, "- {data: text.txt}"), context=8)
