"""Metrics against cases worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosslayer import metrics


def logits_of(*probabilities: list[float]) -> torch.Tensor:
    """Logits [1, P, V] of next-token distributions."""
    return torch.tensor([probabilities]).log()


def test_top1_is_the_most_likely_token():
    assert metrics.top1(logits_of([0.2, 0.7, 0.1], [0.5, 0.3, 0.2])).tolist() == [[1, 0]]


def test_cross_entropy_is_the_surprise_at_what_follows():
    found = metrics.cross_entropy(logits_of([0.25, 0.75], [0.5, 0.5]), torch.tensor([[0, 1]]))
    assert found[0].tolist() == pytest.approx([math.log(4), math.log(2)])


def test_kl_is_that_of_the_two_distributions():
    p, q = [0.5, 0.25, 0.25], [0.1, 0.6, 0.3]
    wanted = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert metrics.kl(logits_of(p), logits_of(q)).item() == pytest.approx(wanted, rel=1e-5)


@given(st.integers(0, 1000))
def test_kl_is_never_negative_and_zero_of_a_thing_with_itself(seed):
    p, q = torch.randn(2, 1, 4, 7, generator=torch.Generator().manual_seed(seed))
    assert (metrics.kl(p, q) > -1e-6).all()
    assert torch.equal(metrics.kl(p, p), torch.zeros(1, 4))
    torch.testing.assert_close(metrics.kl(p, p + 3.0), torch.zeros(1, 4), atol=1e-5, rtol=0)


def test_hesitant_is_right_with_less_than_80_percent():
    logits = logits_of([0.79, 0.21], [0.81, 0.19], [0.4, 0.6], [0.6, 0.4])
    assert metrics.hesitant(logits, torch.tensor([[0, 0, 0, 0]])).tolist() == [[True, False, False, True]]


@pytest.mark.parametrize(
    ("original", "replacement", "matched"),
    [([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 3, 3, 3], 2), ([1, 2, 3], [1], 1), ([1, 2, 3], [], 0), ([], [1], 0)],
)
def test_generation_match_counts_positions_of_the_original(original, replacement, matched):
    assert metrics.generation_match(original, replacement) == (matched, len(original))


@pytest.mark.parametrize(
    ("tokens", "repeated"),
    [
        ([7] * 20, (16, 17)),
        ([1, 2] * 10, (15, 17)),
        (list(range(20)), (0, 17)),
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], (1, 6)),
        ([7] * 3, (0, 0)),
        ([], (0, 0)),
    ],
)
def test_repetition_counts_4_grams_that_were_there_before(tokens, repeated):
    assert metrics.repetition(tokens) == repeated


@given(st.lists(st.integers(0, 3), max_size=40))
def test_repetition_is_a_share(tokens):
    repeated, grams = metrics.repetition(tokens)
    assert 0 <= repeated <= max(0, grams - 1)


def test_a_ratio_is_that_of_the_sums_with_its_interval_around_it():
    numerators, denominators = torch.tensor([1.0, 0.0, 3.0, 2.0]), torch.tensor([2.0, 1.0, 3.0, 4.0])
    figure = metrics.ratio(numerators, denominators)
    assert figure.value == pytest.approx(0.6)
    assert 0 <= figure.low < 0.6 < figure.high <= 1
    assert metrics.ratio(numerators, denominators) == figure


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=2, max_size=20))
def test_the_interval_holds_the_value(pairs):
    numerators, denominators = torch.tensor(pairs).T
    figure = metrics.ratio(numerators, denominators, resamples=200)
    assert figure.value == pytest.approx(sum(a for a, _ in pairs) / sum(b for _, b in pairs))
    assert figure.low - 1e-9 <= figure.value <= figure.high + 1e-9


def test_the_interval_is_that_of_a_bootstrap_by_hand():
    rng = np.random.default_rng(3)
    numerators, denominators = rng.normal(1, 0.5, 60), rng.uniform(1, 3, 60)
    rows = rng.integers(60, size=(20_000, 60))
    low, high = np.quantile(numerators[rows].sum(1) / denominators[rows].sum(1), [0.025, 0.975])
    figure = metrics.ratio(torch.from_numpy(numerators), torch.from_numpy(denominators))
    assert (figure.low, figure.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_prompts_with_nothing_to_measure_do_not_count():
    some = metrics.ratio(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([2.0, 0.0, 4.0]))
    assert some == metrics.ratio(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 4.0]))
    one = metrics.ratio(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]))
    assert one.value == 0.5
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert math.isnan(metrics.ratio(torch.zeros(2), torch.zeros(2)).value)
    assert math.isnan(metrics.ratio(torch.tensor([1.0, torch.nan]), torch.ones(2)).value)
