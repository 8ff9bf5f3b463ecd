"""Classifiers that tell hallucination beforehand: AUC, folds and fits against other ways to the same figures."""

import numpy as np
import pytest
import scipy.optimize
from scipy.stats import mannwhitneyu

from crosslayer import UserError
from crosslayer.hallucination.circuits.foresight import Block, auc_within, foresee
from crosslayer.hallucination.circuits.logistic import fit, folds


def toy(n=160, columns=6, seed=0):
    """Random columns, labels, and images with one to three rows each."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, columns)), rng.random(n) < 0.5, rng.integers(n // 2, size=n)


def test_auc_is_mann_whitneys_with_ties():
    x, yes, _ = toy()
    score, one, ones = x[:, 0].round(0), np.zeros(len(yes), int), np.ones((1, len(yes)))
    expected = mannwhitneyu(score[yes], score[~yes]).statistic / (yes.sum() * (~yes).sum())
    assert auc_within(score, yes, one, ones) == pytest.approx(expected)
    assert np.isnan(auc_within(score, np.ones_like(yes), one, ones)).all()
    counts = np.random.default_rng(2).integers(3, size=len(yes))
    again = np.repeat(np.arange(len(yes)), counts)
    drawn, of = score[again], yes[again]
    expected = mannwhitneyu(drawn[of], drawn[~of]).statistic / (of.sum() * (~of).sum())
    assert auc_within(score, yes, one, counts[None].astype(float)) == pytest.approx(expected)


def test_pairs_of_different_folds_are_not_compared():
    x, yes, image = toy()
    parts, ones = folds(image, 5, 0), np.ones((1, len(yes)))
    pairs = [(i, j) for i in np.flatnonzero(yes) for j in np.flatnonzero(~yes) if parts[i] == parts[j]]
    expected = np.mean([x[i, 0] > x[j, 0] for i, j in pairs])
    assert auc_within(x[:, 0], yes, parts, ones) == pytest.approx(expected)
    assert auc_within(x[:, 0] - 9.0 * parts, yes, parts, ones) == pytest.approx(expected)


def test_an_image_is_in_one_fold_and_folds_are_of_a_size():
    _, _, image = toy()
    parts = folds(image, 5, 3)
    assert all(len(set(parts[image == number])) == 1 for number in set(image))
    sizes = [len(set(image[parts == part])) for part in range(5)]
    assert max(sizes) - min(sizes) <= 1
    assert (folds(image, 5, 3) == parts).all()
    assert (folds(image, 5, 4) != parts).any()


@pytest.mark.parametrize("columns", [4, 90])
def test_a_fit_minimises_the_penalised_loss_of_standard_columns(columns):
    x, yes, _ = toy(40, columns)
    x[:, 1] *= 30
    x[:, 2] = 7
    found = fit(x, yes, 0.1)
    z = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)

    def loss(at):
        odds = z @ at[1:] + at[0]
        return np.log1p(np.exp(np.where(yes, -odds, odds))).mean() + 0.05 * at[1:] @ at[1:]

    best = scipy.optimize.minimize(loss, np.zeros(columns + 1)).x
    assert found.log_odds(x) == pytest.approx(z @ best[1:] + best[0], abs=2e-3)
    assert found.weight[2] == 0


def test_what_is_planted_is_found_and_what_is_shuffled_is_not():
    x, yes, image = toy(240)
    x[:, 3] += 6 * yes
    shuffled = np.random.default_rng(1).permutation(yes)
    sets = {"one": [Block(x[:, :1])], "all": [Block(x)]}
    one, everything = foresee(sets, yes, image, 0)
    assert everything.auc.value > 0.99
    assert everything.gain.low > 0.2
    assert everything.gain.value == pytest.approx(everything.auc.value - one.auc.value)
    _, nothing = foresee(sets, shuffled, image, 0)
    assert nothing.auc.low < 0.5 < nothing.auc.high
    assert abs(nothing.auc.value - 0.5) < 0.1


def test_columns_are_chosen_by_the_rows_seen_without_their_labels():
    x, _, _ = toy(20)
    x[10:, 5], x[:10, 5] = 1e6, 0
    seen = np.arange(20) < 10
    chosen = Block(x, 2).chosen(seen)
    largest = np.sort(np.argsort(np.abs(x[:10]).mean(0))[-2:])
    assert 5 not in largest
    assert (chosen == x[:, largest]).all()


def test_too_few_images_are_refused_with_how_many_are_needed():
    x, yes, image = toy(60)
    image[yes] = 0
    with pytest.raises(UserError, match="1 images with hallucinated answers are too few .* at least 10 are needed"):
        foresee({"x": [Block(x)]}, yes, image, 0)
