"""Scales: the statistics of the usable tokens, and layers that nothing can be trained on."""

import pytest
import torch

from crosslayer import UserError
from crosslayer.training.scales import estimate_scales
from making import array, random_activations


def test_scales_are_the_statistics_of_usable_tokens():
    activations = random_activations(200, 3, 8)
    kept = array(activations.position) > 0
    x, y = array(activations.x)[kept], array(activations.y)[kept]
    scales = estimate_scales(activations)
    assert array(scales.input) == pytest.approx(((x**2).sum(2) ** 0.5).mean(0) / 8**0.5, rel=1e-5)
    assert array(scales.output) == pytest.approx(((y**2).sum(2) ** 0.5).mean(0) / 8**0.5, rel=1e-5)
    assert array(scales.output_mean) == pytest.approx(y.mean(0), rel=1e-4)
    assert array(scales.output_variance) == pytest.approx(((y - y.mean(0)) ** 2).sum(2).mean(0), rel=1e-4)
    assert array(scales.first_write) == pytest.approx(array(activations.y)[~kept].mean(0), rel=1e-4)


def test_scaled_activations_have_norm_sqrt_d():
    activations = random_activations(200, 3, 8)
    scales, kept = estimate_scales(activations), activations.position > 0
    x, y = activations.x[kept] / scales.input[:, None], activations.y[kept] / scales.output[:, None]
    torch.testing.assert_close(x.norm(dim=2).mean(0), torch.full((3,), 8**0.5))
    torch.testing.assert_close(y.norm(dim=2).mean(0), torch.full((3,), 8**0.5))


def test_outliers_and_first_positions_do_not_count():
    activations, spoiled = random_activations(200, 3, 8), random_activations(200, 3, 8)
    spoiled.x[activations.position == 0] *= 1e4
    wanted, found = estimate_scales(activations), estimate_scales(spoiled)
    assert torch.equal(found.input, wanted.input)
    assert torch.equal(found.output_mean, wanted.output_mean)


def test_half_precision_activations_have_scales_in_full_precision():
    activations = random_activations(2000, 3, 8)
    halves = {name: getattr(activations, name).bfloat16() for name in ("x", "y")}
    scales = estimate_scales(type(activations)(**{**vars(activations), **halves}))
    assert {value.dtype for value in vars(scales).values()} == {torch.float32}
    torch.testing.assert_close(scales.output_mean, estimate_scales(activations).output_mean, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda a: a.x[:, 1].zero_(), r"layer 1's MLP reads 0\.0 on average"),
        (lambda a: a.y[:, 2].zero_(), r"layer 2's MLP writes 0\.0 on average"),
        (lambda a: a.y[:, 2].fill_(1.0), r"layer 2's MLP varies by 0\.0 on average"),
        (lambda a: a.y[3, 0].fill_(torch.nan), "layer 0's MLP writes nan on average"),
        (lambda a: a.x[3, 2].fill_(torch.nan), "layer 2's MLP reads nan on average"),
        (lambda a: a.position.zero_(), "no token is left to train on"),
    ],
)
def test_activations_that_nothing_can_be_trained_on_are_named(spoil, named):
    activations = random_activations(64, 3, 8)
    spoil(activations)
    with pytest.raises(UserError, match=named):
        estimate_scales(activations)
