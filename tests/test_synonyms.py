"""Words for objects: the longest phrase counts, only whole words do, and a table that cannot be right is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslayer import UserError
from crosslayer.hallucination.synonyms import COCO, load_table, plural, read_table

TABLE = load_table(COCO)


def named(text: str) -> list[tuple[str, str]]:
    return [(found.object, text[slice(*found.chars)]) for found in TABLE.find(text)]


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("A hot dog beside a dog, a Teddy Bear and two bears.", ["hot dog", "dog", "teddy bear", "bear"]),
        ("Hotdogs at home plate by the train  tracks", ["hot dog"]),
        ("the category of a carpet, a catalog, a dog-eared page", []),
        ("Two men on motor-bikes; puppies and buses.", ["person", "motorcycle", "dog", "bus"]),
        ("a man's tie. A bow tie", ["person", "tie"]),
        ("knives, wine glasses, a remote control, mice", ["knife", "wine glass", "remote", "mouse"]),
        ("a dining table with a coffee\ntable", ["dining table", "dining table"]),
        ("Ponies, pony: it is", ["horse", "horse"]),
        ("", []),
    ],
)
def test_what_a_caption_names(text, objects):
    assert [object for object, _ in named(text)] == objects


def test_a_mention_is_where_it_stands():
    assert named("A Hot Dog and puppies.") == [("hot dog", "Hot Dog"), ("dog", "puppies")]


@given(st.lists(st.sampled_from(sorted(TABLE.phrases)), min_size=1, max_size=6), st.booleans())
def test_every_name_of_coco_is_found_between_other_words(names, many):
    words = [plural(name) if many else name.upper() for name in names]
    assert [object for object, _ in named(f"I see {' next to '.join(words)}, no more")] == names


def test_coco_has_its_80_categories_and_their_names():
    assert len(TABLE.phrases) == 80
    assert TABLE.object("Cell Phones", "x") == "cell phone"
    with pytest.raises(UserError, match="f.json: names the object 'unicorn', which the synonym table coco lacks; add"):
        TABLE.object("unicorn", "f.json")


def test_a_table_of_ones_own(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# mine\n\nunicorn, horned horse\nsphinx # a cat\n-, unicorn frappé\n")
    found = load_table(str(path)).find("A horned horse drinks a unicorn frappé beside sphinxes")
    assert [name.object for name in found] == ["unicorn", "sphinx"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat\ncat, kitten", "mine:2: 'cat' stands there twice"),
        ("cat, pet\ndog, pet", "mine: 'pet' is both 'cat' and 'dog'"),
        (", kitten", "mine:1: '' is no name"),
        ("-, home plate", "mine: names no object"),
    ],
)
def test_a_table_that_cannot_be_right(text, words):
    with pytest.raises(UserError, match=words):
        read_table(text, "mine")


def test_a_table_that_is_not_there():
    with pytest.raises(UserError, match="none.txt: no such synonym table; give a file, or one of coco, emoji"):
        load_table("none.txt")
