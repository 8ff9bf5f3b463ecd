"""CHAIR and POPE: hand-computed cases, and a brute-force count of random ones."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslayer import UserError
from crosslayer.hallucination.chair import CHAIR
from crosslayer.hallucination.labelling import Said, label
from crosslayer.hallucination.measures import figure, image_sums
from crosslayer.hallucination.pope import POPE, SAMPLINGS, Counts, asked_about
from crosslayer.hallucination.responses import Query, Response
from crosslayer.hallucination.scoring import score
from crosslayer.hallucination.synonyms import load_table

TABLE = load_table("coco")
NAN = float("nan")


def caption(image: str, truth: str, text: str) -> Response:
    query = Query(
        id=f"{image}:caption", image_id=image, image=None, prompt="", kind="caption", truth=tuple(truth.split())
    )
    return label(query, Said(text), TABLE)


def answer(image: str, object: str, there: bool, text: str, *samplings: str) -> Response:
    query = Query(
        id=f"{image}:{object}", image_id=image, image=None, prompt="", kind="question",
        truth=(object,) if there else (), object=object, samplings=samplings,
    )  # fmt: skip
    return label(query, Said(text), TABLE)


CAPTIONS = [
    caption("1", "dog frisbee", "A dog catches a frisbee."),  # 2 mentions, both true; 2 of 2 objects; 5 words
    caption("2", "cat", "A cat and a dog, and another dog."),  # cat, dog, dog: 2 hallucinated; 1 of 1; 8 words
    caption("3", "person bicycle car", "Two men near a hot dog stand."),  # person, hot dog: 1 hallucinated; 1 of 3; 7
    caption("4", "zebra", "It is a sunny day."),  # nothing; 0 of 1; 5 words
    caption("5", "", "A bird."),  # bird: 1 hallucinated; nothing to recall; 2 words
]
ANSWERS = [
    answer("1", "dog", True, "Yes"),  # hit
    answer("1", "cat", False, "Yes, a cat."),  # false alarm
    answer("2", "dog", True, "No"),  # miss
    answer("2", "cat", False, "no."),  # right
    answer("3", "dog", True, "yes"),  # hit
    answer("3", "cat", False, "yes"),  # false alarm
    answer("4", "dog", True, "It could be one"),  # neither: wrong, and no yes
    answer("4", "cat", False, "There is none"),  # neither: wrong
]


def values(measures, responses) -> dict[str, float]:
    return {measure.name: figure(measure, responses).value for measure in measures}


def test_chair_by_hand():
    # mentions 2 + 3 + 2 + 0 + 1 = 8, hallucinated 0 + 2 + 1 + 0 + 1 = 4; captions with one: 2, 3, 5
    # recalled 2 + 1 + 1 + 0 = 4 of 2 + 1 + 3 + 1 + 0 = 7; words 5 + 8 + 7 + 5 + 2 = 27
    assert values(CHAIR, CAPTIONS) == {
        "chair_i": 4 / 8, "chair_s": 3 / 5, "object_recall": 4 / 7, "length_words": 27 / 5
    }  # fmt: skip


def test_pope_by_hand():
    # yes 4 of 8, 2 of them hits; there 4; right 3 of 8; f1 = 2 * 1/2 * 1/2 / (1/2 + 1/2)
    assert values(POPE, ANSWERS) == {
        "accuracy": 3 / 8, "precision": 2 / 4, "recall": 2 / 4, "f1": 1 / 2, "yes_ratio": 4 / 8, "unparseable": 2 / 8
    }  # fmt: skip


def test_a_score_puts_captions_and_questions_apart():
    samplings = [("random",), ("random", "popular"), *[()] * 6]
    asked = [replace(r, samplings=s) for r, s in zip(ANSWERS, samplings, strict=True)]
    result = score([*CAPTIONS, *asked])
    assert (result.images, result.captions, result.questions, result.unparseable) == (5, 5, 8, 2)
    assert result.figure("caption", "chair_s").value == 3 / 5
    assert result.figure("question", "accuracy", "random").value == 1 / 2
    assert result.figure("question", "accuracy", "popular").value == 0
    assert result.figure("question", "accuracy").value == 2 / 6
    assert {(f.kind, f.group) for f in result.figures} == {
        ("caption", "all"), ("question", "all"), ("question", "random"), ("question", "popular")
    }  # fmt: skip
    assert "question,popular,precision,0.0,nan,nan,1" in result.to_csv()
    popular = next(f for f in result.to_dict()["figures"] if (f["group"], f["measure"]) == ("popular", "precision"))
    assert popular["figure"] == {"value": 0.0, "low": None, "high": None}
    with pytest.raises(UserError, match="there are no responses to score"):
        score([])


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.sampled_from(["yes", "no", "maybe"])), min_size=1))
def test_pope_as_counted_one_by_one(rows):
    tp = sum(there and said == "yes" for _, there, said in rows)
    fp = sum(not there and said == "yes" for _, there, said in rows)
    fn = sum(there and said != "yes" for _, there, said in rows)
    tn = sum(not there and said == "no" for _, there, said in rows)
    precision, recall = tp / (tp + fp) if tp + fp else NAN, tp / (tp + fn) if tp + fn else NAN
    f1 = 2 * precision * recall / (precision + recall) if tp else (0.0 if fp + fn else NAN)
    wanted = [(tp + tn) / len(rows), precision, recall, f1, (tp + fp) / len(rows)]
    asked = [answer(str(image), "dog", there, said) for image, there, said in rows]
    found = [figure(measure, asked, resamples=2).value for measure in POPE[:5]]
    np.testing.assert_allclose(found, wanted)


def bootstrapped(responses: Sequence[Response], n: int = 4000) -> np.ndarray:
    """Of chair_i: images drawn with replacement, all their captions with them."""
    rng, images = np.random.default_rng(1), sorted({r.image_id for r in responses})
    shares = []
    for _ in range(n):
        drawn = [r for image in rng.choice(images, len(images)) for r in responses if r.image_id == image]
        mentions = [m for r in drawn for m in r.mentions]
        shares.append(np.mean([m.hallucinated for m in mentions]))
    return np.percentile(shares, [2.5, 97.5])


def test_intervals_draw_whole_images():
    rng = np.random.default_rng(0)
    texts = ["a cat and a dog", "a cat", "two cats, a dog and a bird"]
    images = [caption(str(i), ("cat", "cat dog")[i % 2], texts[rng.integers(3)]) for i in range(12)]
    responses = [r for image in images for r in [image] * 4]  # four captions that say the same are worth one
    found = figure(CHAIR[0], responses)
    np.testing.assert_allclose([found.low, found.high], bootstrapped(responses), atol=0.02)
    alone = figure(CHAIR[0], images)
    assert (found.low, found.high) == (alone.low, alone.high)


def test_what_each_response_adds_can_be_paired():
    counts = CHAIR[0].counts(CAPTIONS)
    assert counts.tolist() == [[0, 2, 1, 0, 1], [2, 3, 2, 0, 1]]
    twice = [*CAPTIONS, *CAPTIONS[:2]]
    assert image_sums(twice, CHAIR[0].counts(twice)).tolist() == [[0, 4, 1, 0, 1], [4, 6, 2, 0, 1]]


SETS = st.lists(st.sets(st.sampled_from("abcdefgh"), max_size=5), min_size=1, max_size=12)


@given(SETS, st.integers(0, 4), st.integers(0, 9))
def test_questions_are_half_absent_and_absent_ones_as_their_sampling_says(truths, n, seed):
    counts, truth = Counts.of(truths), sorted(truths[0])
    asked = asked_about("7", truth, "abcdefgh", counts, n, seed)
    n = min(n, len(truth), 8 - len(truth))
    by_sampling = {s: [o for o, of in asked.items() if s in of] for s in SAMPLINGS}
    for names in by_sampling.values():
        assert (sum(o in truth for o in names), sum(o not in truth for o in names)) == (n, n)
    absent = [o for o in "abcdefgh" if o not in truth]
    alone = {o: sum(o in t for t in truths) for o in absent}
    beside = {o: sum(o in t and b in t for t in truths for b in truth) for o in absent}
    for sampling, frequency in (("popular", alone), ("adversarial", beside)):
        chosen = [o for o in by_sampling[sampling] if o not in truth]
        assert sorted(map(frequency.get, chosen)) == sorted(frequency.values())[len(absent) - n :]


def test_questions_depend_on_nothing_but_the_picture_and_the_seed():
    counts = Counts.of([{"a", "b"}])
    drawn = {seed: asked_about("7", "abc", "abcdefgh", counts, 2, seed) for seed in range(20)}
    assert asked_about("7", "abc", "abcdefgh", counts, 2, 3) == drawn[3]
    chosen = {o for asked in drawn.values() for o, of in asked.items() if of == SAMPLINGS or "random" in of}
    assert chosen == set("abcdefgh")
