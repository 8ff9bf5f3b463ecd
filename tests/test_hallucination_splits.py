"""Splits by image: disjoint, of about the right sizes, stable when data is added, and refused when too small."""

from collections import Counter

import pytest

from crosslayer import UserError
from crosslayer.hallucination.responses import Mention, Response
from crosslayer.hallucination.splits import SPLITS, split_of, split_responses


def response(number, hallucinated=True):
    mention = Mention(object="bone", chars=(2, 6), hallucinated=hallucinated)
    asked = {"prompt": "describe", "kind": "caption", "truth": (), "image": None}
    return Response(id=str(number), image_id=str(number // 2), **asked, response="a bone", mentions=(mention,))


def test_an_image_is_in_one_split_whatever_else_there_is():
    few, many = ([response(i) for i in range(n)] for n in (100, 4000))
    parts = split_responses(many)
    places = {r.image_id: name for name, part in parts.items() for r in part}
    assert all(places[r.image_id] == name for name, part in split_responses(few).items() for r in part)
    assert sum(map(len, parts.values())) == len(many)
    for name, n in Counter(places.values()).items():
        assert n / 2000 == pytest.approx(SPLITS[name], abs=0.04)
    assert any(split_of(str(i), 0) != split_of(str(i), 1) for i in range(20))


def test_too_few_hallucinations_are_refused_with_how_many_it_takes():
    with pytest.raises(UserError, match=r"of 0 responses .* select, 5 are needed; about 50 in all would do"):
        split_responses([response(i, hallucinated=False) for i in range(50)], at_least=5)
