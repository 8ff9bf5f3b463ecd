"""Sparsity: what counts as active, what is penalised, and the gradients of JumpReLU's thresholds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosslayer import BatchTopK, GroupMax, JointTopK, JumpReLU, ReLU, TopK, UserError, Wiring
from crosslayer.coders.sparsity import read_sparsity, write_sparsity
from crosslayer.coders.sparsity.batch import largest_of_all
from making import array, dense_acts, random_coder

WIRING = Wiring(3, 2)
N, L, D, F = 20, 3, 6, 10


def inputs() -> torch.Tensor:
    return torch.randn(N, L, D, generator=torch.Generator().manual_seed(3))


def dense(coder, progress=1.0) -> torch.Tensor:
    return torch.stack([codes.dense() for codes in coder.encode_for_training(inputs(), progress).codes], 1)


def test_joint_topk_takes_the_k_largest_of_all_layers_by_what_they_write():
    coder = random_coder(WIRING, JointTopK(7))
    scores = coder.preactivations(inputs()).relu() * coder.decoder_norms()
    smallest_kept = scores.flatten(1).sort(descending=True).values[:, 6]
    assert torch.equal(dense(coder) > 0, scores >= smallest_kept[:, None, None])
    assert len(set((dense(coder) > 0).sum((0, 2)).tolist())) == L  # the number a layer is free


def test_topk_takes_the_k_largest_activations_of_each_layer():
    coder = random_coder(WIRING, TopK(4))
    pre = coder.preactivations(inputs())
    smallest_kept = pre.sort(descending=True).values[:, :, 3:4]
    assert torch.equal(dense(coder) > 0, (pre >= smallest_kept) & (pre > 0))


def test_groupmax_takes_the_largest_of_each_group_of_neighbours():
    coder = random_coder(WIRING, GroupMax(5))
    pairs = coder.preactivations(inputs()).unflatten(2, (5, 2))
    assert torch.equal(dense(coder).unflatten(2, (5, 2)), torch.where(pairs == pairs.amax(3, True), pairs.relu(), 0))


def test_batch_topk_takes_the_k_times_n_largest_of_the_batch_by_what_they_write():
    coder = random_coder(WIRING, BatchTopK(7))
    scores = coder.preactivations(inputs()).relu() * coder.decoder_norms()
    cut = scores.flatten().sort(descending=True).values[7 * N - 1]
    assert torch.equal(dense(coder) > 0, scores >= cut)
    assert coder.cut.item() == cut.item()  # the first is where the average begins
    assert len({int(n) for n in (dense(coder) > 0).sum((1, 2))}) > 1  # the number a token is free


def test_batch_topk_averages_its_cuts_in_training_alone():
    coder = random_coder(WIRING, BatchTopK(7, anneal_share=0.0, cut_decay=0.75))
    dense(coder)
    first = coder.cut.clone()
    coder.b_enc[0].data += 1
    dense(coder.eval())
    assert torch.equal(coder.cut, first)
    coder.train().cut.zero_()
    dense(coder)
    second = coder.cut.clone()
    coder.cut.copy_(first)
    dense(coder)
    torch.testing.assert_close(coder.cut, 0.75 * first + 0.25 * second)


def test_one_layer_of_a_batch_topk_is_cut_at_the_average():
    coder = random_coder(WIRING, BatchTopK(7))
    with pytest.raises(UserError, match="no threshold yet"):
        coder.encode_layer(0, inputs()[:, 0])
    coder.cut.fill_(0.4)
    pre = coder.preactivations(inputs())[:, 1]
    wanted = torch.where(pre * coder.decoder_norms()[1] >= 0.4, pre, 0)
    torch.testing.assert_close(coder.encode_layer(1, inputs()[:, 1]).dense(), wanted)


@given(st.integers(1, 400), st.floats(0, 10), st.integers(0, 1000))
def test_the_threshold_search_finds_the_nth_largest_from_any_guess(n, near, seed):
    scores = torch.randn(200, generator=torch.Generator().manual_seed(seed))
    positive = scores[scores > 0].sort(descending=True).values
    wanted = positive[min(n, len(positive)) - 1]
    places, cut = largest_of_all(scores, n, torch.tensor(near))
    assert cut == wanted
    assert places.tolist() == (scores >= wanted).nonzero().squeeze(1).tolist()


def test_the_threshold_search_takes_nothing_where_nothing_is_positive():
    places, cut = largest_of_all(-torch.rand(10), 3, torch.tensor(1.0))
    assert len(places) == 0
    assert cut == torch.inf


@pytest.mark.parametrize("sparsity", [JointTopK(3 * F), TopK(F)])
def test_no_k_activates_a_feature_below_zero(sparsity):
    coder = random_coder(WIRING, sparsity)
    torch.testing.assert_close(dense(coder), coder.preactivations(inputs()).relu())


@pytest.mark.parametrize("sparsity", [TopK(4), GroupMax(5), ReLU(), JumpReLU()], ids=lambda s: type(s).__name__)
def test_one_layer_alone_is_encoded_as_all_together(sparsity):
    coder = random_coder(WIRING, sparsity)
    for i, s in enumerate(coder.sources):
        assert torch.equal(coder.encode_layer(s, inputs()[:, s]).dense(), dense(coder)[:, i])


@pytest.mark.parametrize("kind", [JointTopK, TopK, BatchTopK])
def test_k_falls_from_its_multiple_to_k_and_stays(kind):
    sparsity = kind(8, anneal_from=4.0, anneal_share=0.5)
    ks = [sparsity.at(progress).k for progress in (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0)]
    assert ks == [32, round(8 * 4**0.75), 16, round(8 * 4**0.25), 8, 8, 8]
    assert kind(8, anneal_share=0.0).at(0.0).k == 8


def test_a_k_above_the_features_while_annealing_means_all_of_them():
    coder = random_coder(WIRING, JointTopK(3 * F, anneal_from=6.0))
    torch.testing.assert_close(dense(coder, progress=0.0), coder.preactivations(inputs()).relu())


def test_relu_penalty_is_the_mean_weighted_l1_ramped_up():
    coder = random_coder(WIRING, ReLU(0.5))
    encoded = coder.encode_for_training(inputs(), 0.25)
    acts = np.stack(dense_acts(coder, array(inputs())), 1)
    penalty = coder.sparsity.penalty(coder, encoded, 0.25)
    wanted = 0.5 * 0.25 * (acts * array(coder.decoder_norms())).sum() / N
    assert penalty.item() == pytest.approx(wanted, rel=1e-5)


def test_jumprelu_penalty_is_a_ramped_tanh_and_a_lift_for_what_stays_below():
    sparsity = JumpReLU(coefficient=0.5, steepness=3.0, preactivation_coefficient=0.1)
    coder = random_coder(WIRING, sparsity)
    encoded, norms = coder.encode_for_training(inputs(), 0.25), coder.decoder_norms()
    thresholds = torch.stack(list(coder.log_threshold)).exp()
    acts = encoded.pre * (encoded.pre > thresholds)
    tanh = (3.0 * norms * acts).tanh().sum() / N
    below = ((thresholds - encoded.pre).clamp(min=0) * norms).sum() / N
    torch.testing.assert_close(sparsity.penalty(coder, encoded, 0.25), 0.5 * 0.25 * tanh + 0.1 * below)


def test_the_quadratic_penalty_pulls_l0_to_its_target():
    plain = JumpReLU(coefficient=0.0, preactivation_coefficient=0.0)
    coder = random_coder(WIRING, plain)
    l0 = (dense(coder) > 0).sum().item() / N
    for target, sign in ((l0 / 2, 1), (2 * l0, -1)):
        sparsity = replace(plain, quadratic_coefficient=0.5, target_l0=target)
        penalty = sparsity.penalty(coder, coder.encode_for_training(inputs(), 0.25), 0.25)
        assert penalty.item() == pytest.approx(0.5 * 0.25 * (l0 / target - 1) ** 2, rel=1e-5)
        coder.zero_grad()
        penalty.backward()
        assert (-sign * torch.stack([t.grad for t in coder.log_threshold])).min() >= 0  # raised where L0 is too high


def test_penalties_do_not_grow_with_the_batch():
    for sparsity in (ReLU(), JumpReLU()):
        coder, twice = random_coder(WIRING, sparsity), torch.cat([inputs(), inputs()])
        once = sparsity.penalty(coder, coder.encode_for_training(inputs(), 1.0), 1.0)
        torch.testing.assert_close(sparsity.penalty(coder, coder.encode_for_training(twice, 1.0), 1.0), once)


def test_jumprelu_thresholds_have_the_rectangle_kernels_gradient():
    coder = random_coder(WIRING, JumpReLU(bandwidth=0.7)).double()
    x, ahead = inputs().double(), torch.randn(N, L, F, dtype=torch.double)
    encoded = coder.encode_for_training(x, 1.0)
    acts = torch.stack([codes.dense() for codes in encoded.codes], 1)
    (acts * ahead).sum().backward()
    pre, thresholds = encoded.pre.detach(), torch.stack(list(coder.log_threshold)).detach().exp()
    kernel = ((pre - thresholds).abs() < 0.35) / 0.7
    by_threshold = (-thresholds * kernel * ahead).sum(0)
    found = torch.stack([t.grad for t in coder.log_threshold])
    torch.testing.assert_close(found, by_threshold * thresholds)  # d threshold / d log_threshold


def test_jumprelu_thresholds_have_the_slope_of_the_mean_over_many_tokens():
    """For pre-activations spread evenly the estimator is exact: it is the derivative of the mean, by differences."""
    pre = torch.linspace(-2, 4, 60_001, dtype=torch.double)[:, None, None]

    def mean_of_squares(threshold: float) -> float:
        return (pre * (pre > threshold)).square().mean().item()

    coder = random_coder(Wiring(1, 1), JumpReLU(bandwidth=0.02), D=1, F=1).double()
    coder.W_enc[0].data.fill_(1.0), coder.b_enc[0].data.zero_(), coder.log_threshold[0].data.zero_()
    acts = coder.encode_for_training(pre, 1.0).codes[0].dense()
    acts.square().mean().backward()
    # Above the jump act^2 has slope 2, below it 0; their mean times the jump in act is the jump in act^2.
    by_differences = (mean_of_squares(1.05) - mean_of_squares(0.95)) / 0.1
    assert coder.log_threshold[0].grad.item() == pytest.approx(by_differences, rel=0.02)


@pytest.mark.parametrize(
    "sparsity", [JointTopK(5, 2.0, 0.1), TopK(3), BatchTopK(3), GroupMax(2), ReLU(0.2), JumpReLU(0.1, bandwidth=2.0)]
)
def test_written_is_read(sparsity):
    assert read_sparsity(write_sparsity(sparsity)) == sparsity


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: JointTopK(0), "k is 0"),
        (lambda: TopK(-2), "k is -2"),
        (lambda: TopK(4, anneal_from=0.5), "anneal_from is 0.5"),
        (lambda: JointTopK(4, anneal_share=1.5), "anneal_share 1.5"),
        (lambda: GroupMax(4, anneal_from=2.0), "anneal_from is 2.0, but groupmax has fixed groups"),
        (lambda: BatchTopK(4, cut_decay=1.0), "cut_decay is 1.0"),
        (lambda: random_coder(WIRING, GroupMax(3)), "k is 3, they are 10"),
        (lambda: JumpReLU(bandwidth=0.0), "bandwidth is 0.0"),
        (lambda: JumpReLU(initial_threshold=-0.1), "initial_threshold -0.1"),
        (
            lambda: read_sparsity({"kind": "maxk"}),
            "'maxk'; choose one of joint-topk, topk, batch-topk, ",
        ),
        (lambda: read_sparsity({}), "sparsity is None"),
        (lambda: read_sparsity({"kind": "topk", "k": 2, "width": 3}), "topk.*width"),
        (lambda: random_coder(Wiring(3, 2, 1), JointTopK(21)), "k is 21, but 2 layers of 10 features are only 20"),
        (lambda: random_coder(WIRING, TopK(11)), "k is 11, but a layer of 10 features are only 10"),
    ],
)
def test_settings_that_cannot_work_are_named(build, named):
    with pytest.raises(UserError, match=named):
        build()
