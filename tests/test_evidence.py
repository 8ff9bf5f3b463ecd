"""Evidence that an edit changed something: against brute force, closed forms and worked examples."""

from math import comb

import numpy as np
import pytest
from scipy.stats import norm

from crosslayer import UserError
from crosslayer.hallucination.evidence import change, empirical_p, holm, images_needed, mcnemar
from crosslayer.hallucination.measures import Measure
from crosslayer.hallucination.responses import Mention, Response

NAMED = Measure("named", lambda r: float(r.hallucinates), lambda _: 1.0)


def responses(flags, images):
    """A response for each flag, hallucinated or not, on the image of the same place."""
    mention = Mention(object="bone", chars=(2, 6), hallucinated=True)
    asked = {"image": None, "prompt": "describe", "kind": "caption", "truth": (), "response": "a bone"}
    return [
        Response(id=str(i), image_id=str(image), mentions=(mention,) * bool(flag), **asked)
        for i, (flag, image) in enumerate(zip(flags, images, strict=True))
    ]


def test_a_change_is_that_of_a_bootstrap_over_images_by_hand():
    rng = np.random.default_rng(0)
    images = np.arange(120) // 2
    before, after = rng.random(120) < 0.7, rng.random(120) < 0.4
    found = change(NAMED, responses(before, images), responses(after, images), resamples=4000)
    gaps = after.astype(float) - before
    by_image = gaps.reshape(60, 2).sum(1)
    drawn = np.sort(by_image[rng.integers(60, size=(4000, 60))].sum(1) / 120)
    assert found.difference.value == pytest.approx(gaps.mean())
    assert found.relative == pytest.approx(gaps.mean() / before.mean())
    assert [found.difference.low, found.difference.high] == pytest.approx([drawn[100], drawn[3899]], abs=0.02)
    assert (found.gained, found.lost) == ((by_image > 0).sum(), (by_image < 0).sum())
    assert (found.n_images, found.clear) == (60, True)


def test_mcnemar_is_the_binomial_tail_counted_out():
    for gained, lost in ((0, 6), (3, 11), (5, 5)):
        n, few = gained + lost, min(gained, lost)
        tail = 2 * sum(comb(n, i) for i in range(few + 1)) / 2**n
        assert mcnemar(gained, lost) == pytest.approx(min(1.0, tail))
    assert mcnemar(0, 0) == 1.0


def test_holm_by_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_chance_is_never_less_than_one_in_the_draws():
    assert empirical_p(0.1, [0.5] * 20) == 1 / 21
    assert empirical_p(0.5, [0.1, 0.5, 0.9]) == 3 / 4


def test_with_the_images_needed_the_stated_power_is_reached():
    n = images_needed(0.05, 0.04, 100)
    assert n is not None
    shift = 0.05 / (0.04 * (100 / n) ** 0.5)
    assert norm.sf(norm.ppf(0.975) - shift) == pytest.approx(0.8, abs=0.01)
    assert images_needed(0.0, 0.04, 100) is None


def test_nothing_changed_and_nothing_to_compare():
    one = responses([1, 0, 1], [0, 1, 2])
    same = change(NAMED, one, one)
    assert (same.difference.value, same.p_value, same.clear, same.images_needed) == (0.0, 1.0, False, None)
    with pytest.raises(UserError, match="response 1 before the edit stands beside 0"):
        change(NAMED, one[1:], one[:2])
    with pytest.raises(UserError, match="3 responses before the edit and 2 after"):
        change(NAMED, one, one[:2])
