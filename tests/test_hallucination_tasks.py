"""What is asked and true: of the bundled world, of POPE's files, of COCO's annotations; and which answers fit."""

import json
from pathlib import Path

import pytest
from PIL import Image

from crosslayer import UserError, load_data
from crosslayer.hallucination.answers import captions_task, match, read_answers
from crosslayer.hallucination.coco import read_truths
from crosslayer.hallucination.pope import SAMPLINGS
from crosslayer.hallucination.scenes import KINDS, scene_task
from crosslayer.hallucination.synonyms import load_table, read_table
from crosslayer.hallucination.tasks import caption_task, pope_task
from crosslayer.zoo.emoji_llava.world import render, scenes

TABLE = load_table("coco")
TWO = read_table("dog, puppy\ncat", "two")
ASKED = [
    {
        "question_id": 1,
        "image": "COCO_val2014_000000000007.jpg",
        "text": "Is there a dog in the image?",
        "label": "yes",
    },
    {"question_id": 2, "image": "COCO_val2014_000000000007.jpg", "text": "Is there a cat in the image?", "label": "no"},
    {"question_id": 3, "image": "8.jpg", "text": "Is there a dining table in the image?", "label": "no"},
]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    for name in ("COCO_val2014_000000000007.jpg", "8.jpg", "9.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def pope(photos):
    path = write_lines(photos / "coco_pope_popular.json", ASKED)  # lines, as POPE's own .json files are
    return pope_task(load_data(path), path, TABLE)


@pytest.fixture
def annotations(tmp_path) -> tuple[Path, Path]:
    images = [{"id": 7, "file_name": "000000000007.jpg"}, {"id": 8, "file_name": "8.jpg"}]
    categories = [{"id": 1, "name": "cat"}, {"id": 18, "name": "dog"}]
    outlined = [{"image_id": 7, "category_id": 18}, {"image_id": 7, "category_id": 18}]
    told = [{"image_id": 7, "caption": "a cat, and puppies"}, {"image_id": 5, "caption": "a dog of no known image"}]
    (tmp_path / "i.json").write_text(json.dumps({"images": images, "annotations": outlined, "categories": categories}))
    (tmp_path / "c.json").write_text(
        json.dumps({"images": [*images, {"id": 5, "file_name": "5.jpg"}], "annotations": told})
    )
    return tmp_path / "i.json", tmp_path / "c.json"


def test_scenes_have_their_exact_truth_and_ask_for_the_planted_partner_first(tmp_path):
    task = scene_task(8, questions=2)
    captions = [q for q in task.queries if q.kind == "caption"]
    drawn = [(kind, scene) for kind in KINDS for scene in scenes(kind, 8, seed=0, split="test")]
    assert [(q.setting, q.truth) for q in captions] == [(kind, scene.visible) for kind, scene in drawn]
    assert task.examples(tmp_path)[0].image == tmp_path / "images" / "test-0-plain-0.png"
    task.save_pictures(tmp_path)
    last = task.examples(tmp_path)[len(task.queries) - 1]
    assert last.picture().tobytes() == render(drawn[-1][1]).tobytes()
    for query in captions:
        lead, partner = query.pair or ("", "")
        about = [q for q in task.queries if q.image_id == query.image_id and q.kind == "question"]
        assert all(q.samplings == SAMPLINGS for q in about if q.object in q.truth)
        if query.setting == "alone":
            assert lead in query.truth
            assert ["adversarial" in q.samplings for q in about if q.object == partner] == [True]


def test_pope_files_say_what_is_asked_and_what_is_true(pope):
    dog, cat, table = pope.queries
    assert (dog.id, dog.object, dog.truth, dog.samplings) == ("1", "dog", ("dog",), ("popular",))
    assert (cat.object, cat.truth, table.object, table.truth) == ("cat", (), "dining table", ())
    assert dog.image_id == cat.image_id == "000000000007.jpg"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": "perhaps"}, "p.jsonl:1: has no yes or no under 'label'; give POPE's questions, or --instances"),
        ({"text": "Is there a unicorn?"}, "p.jsonl:1: asks about no object of the synonym table coco .*unicorn.*add"),
        ({"text": "Is there a cat or a dog?"}, "p.jsonl:1: asks about 2 objects of the synonym table coco"),
        ({"question_id": 2}, "p.jsonl: has two questions with question_id 2; number them anew"),
    ],
)
def test_questions_that_cannot_be_scored(photos, change, words):
    path = write_lines(photos / "p.jsonl", [{**ASKED[0], **change}, *ASKED[1:]])
    with pytest.raises(UserError, match=words):
        pope_task(load_data(path), path, TABLE)


def test_truth_is_what_is_outlined_and_what_reference_captions_name(annotations):
    instances, captions = annotations
    assert read_truths(instances, captions, TWO) == {"000000000007.jpg": ("dog", "cat"), "8.jpg": ()}
    assert read_truths(instances, None, TWO) == {"000000000007.jpg": ("dog",), "8.jpg": ()}
    with pytest.raises(UserError, match="i.json: names the object 'cat', which the synonym table mine lacks"):
        read_truths(instances, captions, read_table("dog", "mine"))
    with pytest.raises(UserError, match="c.json: has no list under 'categories'; give a file in COCO's layout"):
        read_truths(captions, None, TWO)
    captions.write_text(instances.read_text())
    with pytest.raises(
        UserError, match="c.json: is not in COCO's layout; some image, category or annotation lacks 'capt"
    ):
        read_truths(instances, captions, TWO)


def test_pictures_with_annotations_are_described_and_asked_about(photos, annotations):
    data = load_data(photos, prompt="Describe it.")
    task = caption_task(data, read_truths(*annotations, TWO), TWO)
    assert [(q.id, q.kind, q.prompt, q.truth) for q in task.queries] == [
        ("8.jpg:caption", "caption", "Describe it.", ()),
        ("000000000007.jpg:caption", "caption", "Describe it.", ("dog", "cat")),
    ]
    assert list(data.skipped.reasons.values()) == ["image 9.jpg is not in the annotations"]
    none = {"elsewhere.jpg": ("dog",)}
    with pytest.raises(UserError, match="none of its 3 images is in the annotations; give those of its images"):
        caption_task(data, none, TWO)
    with pytest.raises(UserError, match="write {} where the object goes"):
        caption_task(data, none, TWO, question_text="Is it there?")
    owl = read_table("dog\nowl", "owl")
    asked = caption_task(data, {"8.jpg": ("dog",)}, owl, questions=3, question_text="Is there {}?").queries[1:]
    assert [(q.prompt, q.truth, q.samplings) for q in asked] == [
        ("Is there a dog?", ("dog",), SAMPLINGS),
        ("Is there an owl?", ("dog",), SAMPLINGS),
    ]


LLAVA = [{"question_id": row["question_id"], "prompt": f"{row['text']}\nIn a word.", "text": "Yes"} for row in ASKED]
PLAIN = [{"image": f"photos/{row['image']}", "question": f"<image>\n{row['text']}", "answer": "Yes"} for row in ASKED]


@pytest.mark.parametrize("rows", [LLAVA, PLAIN, [{"id": "2", "response": " Yes "}]])
def test_answers_find_their_questions(pope, tmp_path, rows):
    matched = match(read_answers(write_lines(tmp_path / "said.jsonl", rows)), pope)
    assert {said.text for said in matched.said.values()} == {"Yes"}
    assert set(matched.said) == ({"1", "2", "3"} if len(rows) == 3 else {"2"})
    assert matched.unasked == 0


def test_answers_to_something_else_are_counted(pope, tmp_path):
    rows = [*LLAVA, {"question_id": 99, "prompt": "Who?", "text": "I"}]
    assert match(read_answers(write_lines(tmp_path / "said.jsonl", rows)), pope).unasked == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"question_id": 7, "text": "Yes"}], "a.jsonl:1: none of 1 answers is to a question of coco_pope_popular"),
        (
            [{"question_id": 1, "prompt": "Who?", "text": "I"}],
            r"a.jsonl:1: answers 1 with the prompt 'Who\?', but coco",
        ),
        ([LLAVA[0], LLAVA[0]], "a.jsonl:2: answers 1 for the second time; leave one out"),
        ([ASKED[0]], "a.jsonl:1: holds no answer; write it under 'text'"),
        ([{"question_id": 1, "text": 3}], "a.jsonl:1: holds no answer"),
        ([], "a.jsonl: holds no answers"),
    ],
)
def test_answers_that_do_not_fit(pope, tmp_path, rows, words):
    with pytest.raises(UserError, match=words):
        match(read_answers(write_lines(tmp_path / "a.jsonl", rows)), pope)


def test_captions_that_exist_are_matched_by_their_picture(tmp_path):
    rows = [{"image_id": 7, "caption": "a dog"}, {"image": "b/8.jpg", "text": "a cat"}, {"image": "9.jpg", "text": "x"}]
    truths = {"000000000007.jpg": ("dog",), "8.jpg": ()}
    answers = read_answers(write_lines(tmp_path / "a.jsonl", rows))
    (tmp_path / "COCO_val2014_000000000007.jpg").touch()
    task, matched = captions_task(answers, truths, TWO, tmp_path)
    assert [(q.image_id, q.truth) for q in task.queries] == [("000000000007.jpg", ("dog",)), ("8.jpg", ())]
    photos = [tmp_path / "COCO_val2014_000000000007.jpg", tmp_path / "b" / "8.jpg"]
    assert [q.image for q in task.queries] == [str(photo.resolve()) for photo in photos]
    assert [matched.said[q.id].text for q in task.queries] == ["a dog", "a cat"]
    assert matched.unasked == 1
    with pytest.raises(UserError, match="a.jsonl:3: none of 1 answers is about an image of the annotations"):
        captions_task(answers[2:], truths, TWO, tmp_path)
    with pytest.raises(UserError, match="a.jsonl:2: describes b/8.jpg for the second time"):
        captions_task([*answers, answers[1]], truths, TWO, tmp_path)
