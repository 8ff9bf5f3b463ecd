"""Files, folders and tables: which rows they hold, in which order, and how they are read."""

import json

import datasets
import pytest
from PIL import Image

from crosslayer import Example, UserError, load_data
from crosslayer.data.lines import text_lines

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test leaves anything in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name, colour in (("b.png", "red"), ("a.jpg", "blue"), ("more/c.webp", "lime")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("three photos")
    return tmp_path / "photos"


def shown(data) -> list[tuple]:
    return [(e.prompt, e.response, e.picture().getpixel((4, 4)) if e.image else None) for e in data]


def test_lines_are_found_without_being_kept(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\n a\r\n\n\xff\nlast")
    rows = text_lines(tmp_path / "t.txt")
    assert [rows.id(i) for i in range(rows.n)] == ["t.txt:2", "t.txt:4", "t.txt:5"]
    assert rows.read(0) == {"text": " a"}
    assert rows.read(2) == {"text": "last"}
    with pytest.raises(UserError, match="t.txt:4: is not UTF-8 text"):
        rows.read(1)


def test_a_large_file_takes_little_memory(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"prompt": "%s"}\n' % ("word " * 200) * 2000)
    data = load_data(tmp_path / "t.jsonl")
    assert len(data) == 2000
    assert data[1999].id == "t.jsonl:2000"
    (tmp_path / "t.jsonl").unlink()  # the rows are read from the file's mapping, not from a copy
    assert data[0].prompt.startswith("word word")


def test_a_folder_of_images_is_asked_one_prompt(photos):
    data = load_data(photos, prompt="what is it ?")
    assert [e.id for e in data] == ["photos:a.jpg", "photos:b.png", "photos:more/c.webp"]
    assert data[1] == Example("photos:b.png", "what is it ?", image=photos / "b.png")
    with pytest.raises(UserError, match="photos:a.jpg: has an image and no prompt; say what to ask with --prompt"):
        load_data(photos)


def test_what_lies_beside_images_decides_what_a_folder_is(photos):
    (photos / "llava.json").write_text("[]")
    assert len(load_data(photos, prompt="what is it ?")) == 3
    named = [{"file_name": "b.png", "question": "who ?"}, {"file_name": "a.jpg", "question": "what ?"}]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, named)))
    (photos / "llava.json").unlink()
    (photos / "more" / "c.webp").unlink()
    (photos / "notes.txt").rename(photos.parent / "notes.txt")
    assert shown(load_data(photos)) == [("who ?", None, (255, 0, 0)), ("what ?", None, (0, 0, 254))]
    with pytest.raises(UserError, match="notes.txt: --stream says nothing about this kind of data"):
        load_data(photos.parent / "notes.txt", stream=3)


def test_a_folder_of_texts_is_a_document_a_file(tmp_path):
    for name in ("b.txt", "a.md", "x.py"):
        (tmp_path / name).write_text(f"all of\n{name}\n")
    assert [e.prompt for e in load_data(tmp_path)] == ["all of\na.md\n", "all of\nb.txt\n"]


def test_llava_conversations(photos):
    turns = [{"from": "human", "value": "<image>\nwho ?"}, {"from": "gpt", "value": "a cat"}]
    (photos / "llava.json").write_text(json.dumps([{"id": 0, "image": "b.png", "conversations": turns}, {"id": 1}] * 9))
    data = load_data(photos / "llava.json", bad_share=0.5)
    assert data[0] == Example("llava.json:1", "<image>\nwho ?", "a cat", photos / "b.png")
    assert len(data) == len(data.skipped.reasons) == 9


def test_coco_captions_and_instances(photos):
    images = [{"id": 5, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.png"}]
    captions = [{"image_id": 9, "caption": "a cat "}, {"image_id": 9, "caption": "a dog"}]
    boxes = [{"image_id": 5, "category_id": 1, "bbox": [0, 0, 1, 1]}]
    for name, annotations in (("captions", captions), ("instances", boxes)):
        (photos.parent / f"{name}.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    settings = {"images": photos, "prompt": "describe"}
    told = load_data(photos.parent / "captions.json", **settings)
    assert [(e.response, e.image) for e in told] == [("a cat", photos / "b.png"), ("a dog", photos / "b.png")]
    seen = load_data(photos.parent / "instances.json", **settings)
    assert [(e.response, e.image) for e in seen] == [(None, photos / "a.jpg"), (None, photos / "b.png")]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "t.json: cannot be read as JSON"),
        ('{"a": 1}', "t.json: needs a list of rows, or COCO's 'images' and 'annotations'"),
        ('{"images": [{}]}', "t.json: is not in COCO's layout; an image or a caption lacks 'id'"),
        ("[1]", "t.json:1: needs an object with 'conversations', or 'prompt'; found 1"),
        ("[]", "t.json: holds no examples"),
    ],
)
def test_json_that_is_none_of_these(tmp_path, content, named):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=named):
        load_data(tmp_path / "t.json")


ROWS = {"question": ["who ?", "what ?", None], "answer": ["a cat", "a dog", None]}


def table(photos) -> datasets.Dataset:
    pictures = [str(photos / "a.jpg"), str(photos / "b.png"), None]
    return datasets.Dataset.from_dict({**ROWS, "image": pictures}).cast_column("image", datasets.Image())


WANTED = [("who ?", "a cat", (0, 0, 254)), ("what ?", "a dog", (255, 0, 0))]


@pytest.mark.parametrize("stream", [None, 3])
def test_parquet_files_hold_pictures(photos, tmp_path, stream):
    table(photos).to_parquet(tmp_path / "t.parquet")
    data = load_data(tmp_path / "t.parquet", bad_share=0.5, stream=stream)
    assert shown(data) == WANTED
    assert list(data.skipped.reasons) == ["t.parquet:3"]


def test_saved_data_sets_bring_their_own_splits(photos, tmp_path):
    whole = table(photos)
    datasets.DatasetDict(train=whole.select([0]), test=whole.select([1])).save_to_disk(tmp_path / "saved")
    assert shown(load_data(tmp_path / "saved")) == WANTED[:1]
    assert shown(load_data(tmp_path / "saved", split="test")) == WANTED[1:]
    with pytest.raises(UserError, match="comes with the splits train, test; choose one of them"):
        load_data(tmp_path / "saved", split="validation")


def test_folders_of_tables_are_data_sets(tmp_path):
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(ROWS).select([0, 1]).to_csv(tmp_path / "set" / "train.csv", index=False)
    data = load_data(tmp_path / "set")
    assert shown(data) == [(*row[:2], None) for row in WANTED]
    assert len(load_data(tmp_path / "set", n=1)) == 1


def test_a_split_of_embedded_pictures_goes_by_their_names(photos, tmp_path):
    names = [photos / f"{i % 40}.png" for i in range(80)]
    for name in names:
        Image.new("L", (2, 2)).save(name)  # all look alike
    columns = {"image": [str(name) for name in names], "prompt": ["p"] * 80}
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).to_parquet(tmp_path / "t.parquet")
    listed = [{"image": str(name), "prompt": "p"} for name in names]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, listed)))
    for split in ("train", "validation", "test"):
        kinds = [load_data(tmp_path / f"t.{kind}", split=split) for kind in ("parquet", "jsonl")]
        rows = [[e.id.partition(":")[2] for e in data] for data in kinds]
        assert rows[0] == rows[1]
        assert {int(row) for row in rows[0]} == {(int(row) + 39) % 80 + 1 for row in rows[0]}


def test_tables_that_are_none(tmp_path):
    (tmp_path / "t.parquet").write_text("no table")
    with pytest.raises(UserError, match=r"t.parquet: no such data, here or on the hub, or it cannot be read"):
        load_data(tmp_path / "t.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no examples"):
        load_data(tmp_path / "empty")
