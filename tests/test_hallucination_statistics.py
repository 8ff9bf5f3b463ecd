"""Statistics of features against definitions spelled out one feature, one pair and one permutation at a time."""

from itertools import combinations

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.stats import mannwhitneyu, norm

from crosslayer.hallucination import statistics as st


def drawn(N=30, F=8, seed=0):
    """Activations with many zeros and ties, in float32 as a model gives them; groups and strata."""
    rng = np.random.default_rng(seed)
    x = (rng.integers(0, 4, (N, F)) * (rng.random((N, F)) < 0.7)).astype(np.float32)
    return x, rng.random(N) < 0.4, rng.integers(0, 4, N)


def pairs_won(these, those):
    """The share of pairs in which the first is larger, ties counting half."""
    return np.mean([(a > b) + 0.5 * (a == b) for a in these for b in those])


def test_auroc_and_p_are_those_of_each_feature_alone():
    x, h, _ = drawn()
    auroc, p = st.mann_whitney(x, h)
    for f in range(x.shape[1]):
        alone = mannwhitneyu(x[h, f].tolist(), x[~h, f].tolist(), method="asymptotic")
        assert auroc[f] == pytest.approx(pairs_won(x[h, f], x[~h, f]), abs=1e-12)
        assert p[f] == pytest.approx(alone.pvalue, rel=1e-10)


def test_firm_p_values_do_not_vanish():
    h = np.arange(600) < 300
    x = np.where(h, 1.0, 0.0)[:, None].astype(np.float32)
    for p in (st.mann_whitney(x, h)[1], st.van_elteren(x, h, np.arange(600) % 3)[1]):
        assert 0 < p[0] < 1e-100


def test_one_stratum_is_mann_whitney_without_a_continuity_correction():
    x, h, _ = drawn()
    auroc, p = st.van_elteren(x, h, np.zeros(len(x), int))
    plain = mannwhitneyu(x[h].astype(float), x[~h].astype(float), axis=0, method="asymptotic", use_continuity=False)
    assert auroc == pytest.approx(plain.statistic / h.sum() / (~h).sum(), abs=1e-12)
    assert p == pytest.approx(plain.pvalue, rel=1e-9)


def test_strata_are_compared_as_in_all_their_permutations():
    rng = np.random.default_rng(1)
    x, stratum = rng.integers(0, 3, (10, 4)).astype(float), np.array([0] * 4 + [1] * 5 + [2])
    h = np.isin(np.arange(10), (0, 2, 4, 9))  # the last stratum has no true mention

    def statistic(these, f):
        parts = [(these[:2] if s == 0 else these[2:], np.flatnonzero(stratum == s)) for s in (0, 1)]
        won = [pairs_won(x[a, f], x[np.setdiff1d(rows, a), f]) for a, rows in parts]
        weights = [len(a) * (len(rows) - len(a)) / (len(rows) + 1) for a, rows in parts]
        return np.dot(weights, won) / sum(weights)

    auroc, p = st.van_elteren(x, h, stratum)
    for f in range(4):
        every = [statistic([*a, b], f) for a in combinations(range(4), 2) for b in range(4, 9)]
        found = statistic([0, 2, 4], f)
        z = (found - np.mean(every)) / np.std(every)
        assert (auroc[f], p[f]) == pytest.approx((found, 2 * norm.sf(abs(z))), abs=1e-9)


def test_what_is_due_to_the_object_alone_is_no_difference_within_it():
    rng = np.random.default_rng(2)
    stratum = np.repeat([0, 1], 200)
    h = rng.random(400) < np.where(stratum == 0, 0.1, 0.6)
    x = (stratum + rng.normal(0, 0.1, 400))[:, None]
    assert st.mann_whitney(x, h)[1] < 1e-10
    auroc, p = st.van_elteren(x, h, stratum)
    assert p > 0.01
    assert abs(auroc - 0.5) < 0.1


def test_strata_that_tell_nothing_give_no_effect():
    x, h = np.ones((6, 2)), np.array([True] * 3 + [False] * 3)
    for stratum in (np.zeros(6, int), h.astype(int)):
        auroc, p = st.van_elteren(x, h, stratum)
        assert (auroc.tolist(), p.tolist()) == ([0.5, 0.5], [1.0, 1.0])


def test_q_is_the_smallest_rate_at_which_a_feature_would_be_found():
    p = np.random.default_rng(3).random(40) ** 3
    q, order = st.benjamini_hochberg(p), np.sort(p)
    for one, found in zip(p, q, strict=True):
        rates = [order[k - 1] * len(p) / k for k in range(1, len(p) + 1) if order[k - 1] >= one]
        assert found == pytest.approx(min(1.0, *rates), rel=1e-12)


def test_matched_means_weigh_true_mentions_like_the_hallucinated_of_their_stratum():
    x, h, stratum = drawn()
    counts = np.random.default_rng(4).integers(0, 3, (5, len(h))).astype(float)
    these, those = (weights @ x for weights in st.matched_weights(h, stratum, counts))
    for b, c in enumerate(counts.astype(int)):
        groups = [
            (np.repeat(x[k & h], c[k & h], 0), np.repeat(x[k & ~h], c[k & ~h], 0))
            for k in (stratum == s for s in range(4))
        ]
        groups = [(a, t) for a, t in groups if len(a) and len(t)]
        n = sum(len(a) for a, _ in groups)
        assert these[b] == pytest.approx(sum(a.sum(0) for a, _ in groups) / n)
        assert those[b] == pytest.approx(sum(len(a) * t.mean(0) for a, t in groups) / n)
    nothing = st.matched_weights(h, h.astype(int), np.ones((1, len(h))))
    assert np.isnan(nothing[0]).all()


def test_the_top_of_each_resample_is_counted():
    x, h, stratum = drawn()
    weights = st.matched_weights(h, stratum, np.random.default_rng(5).integers(0, 3, (20, len(h))).astype(float))
    preferred = np.arange(8) % 2 == 0
    share = st.top_share(weights, csr_array(x), preferred, 3)
    hits = np.zeros(8)
    for these, those in zip(*weights, strict=True):
        score = {f: these @ x[:, f] - max(those @ x[:, f], 0) for f in (0, 2, 4, 6)}
        hits[sorted(score, key=lambda f: -score[f])[:3]] += 1
    assert share.tolist() == (hits / 20).tolist()


def test_correlations_are_pearsons_and_0_with_a_constant():
    x, _, _ = drawn(F=5)
    y = np.hstack([-x[:, :2], np.full((len(x), 1), 3.0)])
    found = st.correlations(x, y)
    assert found[:, :2] == pytest.approx(np.corrcoef(x.T, y[:, :2].T)[:5, 5:])
    assert found[:, 2].tolist() == [0.0] * 5
