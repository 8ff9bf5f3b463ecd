"""Packing: nothing of the documents is lost, added or moved, and every piece has the same length."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslayer import UserError, load_data
from crosslayer.data.examples import Example, Examples
from crosslayer.data.packing import pack
from crosslayer.models.prompts import prepare
from crosslayer.zoo.emoji_llava.architecture import WORDS, tokenizer
from crosslayer.zoo.emoji_llava.objects import OBJECTS

BOS, EOS = WORDS.index("<s>"), WORDS.index("</s>")
TOKENIZER = tokenizer()
DOCUMENT = st.lists(st.sampled_from(OBJECTS), min_size=1, max_size=9).map(" ".join)


def documents(texts: list[str]) -> Examples:
    return Examples("docs", len(texts), lambda i: Example(str(i), texts[i], form="text"))


@settings(max_examples=30)
@given(st.lists(DOCUMENT, min_size=1, max_size=600), st.data())
def test_pieces_are_the_documents_joined_with_end_tokens(texts, data):
    context = data.draw(st.integers(2, 40))
    pieces = list(pack(documents(texts), TOKENIZER, context))
    assert {piece.tokens[0] for piece in pieces} == {BOS}
    assert {len(piece.tokens) for piece in pieces[:-1]} <= {context}
    joined = [id for piece in pieces for id in piece.tokens[1:]]
    assert joined == [id for text in texts for id in [*TOKENIZER(text)["input_ids"][1:], EOS]]


def test_no_more_documents_are_read_than_are_asked_for():
    read, texts = [], ["a cat and a dog"] * 2000
    data = Examples("docs", 2000, lambda i: read.append(i) or Example(str(i), texts[i], form="text"))
    pieces = pack(data, TOKENIZER, 16, n=5)
    assert len(pieces) == 5
    assert [p.id for p in pieces[3:]] == ["docs[3]", "docs[4]"]
    assert len(read) < 300


def test_without_a_begin_token_a_piece_is_all_text(monkeypatch):
    bare = tokenizer()
    bare._tokenizer.post_processor = None
    first = pack(documents(["a cat", "a dog"]), bare, 4)[0]
    assert bare.decode(first.tokens) == "a cat </s> a"


def test_pieces_are_read_by_the_model(llama, tmp_path):
    (tmp_path / "t.txt").write_text("a cat and a dog\nyes\nno\n" * 5)
    data = load_data(tmp_path / "t.txt", model=llama, context=12)
    batch = prepare(llama.model, llama.processor, list(data))
    assert batch.attention.sum(1).tolist() == [12, 12, 12, 12, 7]
    assert batch.response.sum(1).tolist() == [11, 11, 11, 11, 6]
    assert len(load_data(tmp_path / "t.txt", model=llama, context=12, n=2)) == 2
    assert data[0].asked().tokens == data[0].tokens[:6]


def test_what_cannot_be_packed(llama, tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("a cat")
    (tmp_path / "t.jsonl").write_text('{"prompt": "a cat"}')
    with pytest.raises(UserError, match="t.txt: packing needs the model's tokenizer; give model="):
        load_data(tmp_path / "t.txt", context=8)
    with pytest.raises(UserError, match="t.jsonl: holds prompts, not running text, so --context cannot pack it"):
        load_data(tmp_path / "t.jsonl", model=llama, context=8)
    with pytest.raises(UserError, match="--context is 1; choose at least 2"):
        load_data(tmp_path / "t.txt", model=llama, context=1)
    with pytest.raises(UserError, match="no tokenizer with an end token"):
        pack(documents(["a cat"]), None, 8)
