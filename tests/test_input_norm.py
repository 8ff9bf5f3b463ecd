"""A norm of the coder's own: it is what the encoders read through, and nothing else sees it."""

from copy import deepcopy

import pytest
import torch

from crosslayer import CrossLayerTranscoder, JointTopK, JumpReLU, ReLU, TopK, UserError, Wiring
from crosslayer.coders.calibration import calibrate
from crosslayer.coders.input_norm import LayerNorm, read_norm, write_norm
from making import random_coder

L, D = 4, 6


def inputs(n: int = 40) -> torch.Tensor:
    return 3 * torch.randn(n, L, D, dtype=torch.double, generator=torch.Generator().manual_seed(5)) + 1


def both(sparsity):
    """A coder with a norm, and the same without."""
    plain = random_coder(Wiring.full(L), sparsity).double()
    normed = deepcopy(plain)
    normed.input_norm = LayerNorm(1e-3)
    return normed, plain


def test_it_is_torchs_without_gain_and_bias():
    wanted = torch.nn.LayerNorm(D, eps=0.1, elementwise_affine=False)
    torch.testing.assert_close(LayerNorm(0.1)(inputs()), wanted(inputs()))


@pytest.mark.parametrize("sparsity", [JointTopK(8), TopK(3), ReLU(), JumpReLU()], ids=lambda s: type(s).__name__)
def test_the_codes_are_those_of_normalised_inputs(sparsity):
    normed, plain = both(sparsity)
    x = LayerNorm(1e-3)(inputs())
    torch.testing.assert_close(normed(inputs()), plain(x))
    if not isinstance(sparsity, JointTopK):
        found, wanted = (c.encode_layer(2, y[:, 2]).dense() for c, y in ((normed, inputs()), (plain, x)))
        torch.testing.assert_close(found, wanted)


def test_a_skip_connection_passes_on_what_was_read():
    coder = CrossLayerTranscoder(Wiring.full(L), D, 10, ReLU(), skip=Wiring.per_layer(L), input_norm=LayerNorm())
    for W in coder.W_skip:
        W.data[:] = torch.eye(D)
    torch.testing.assert_close(coder(inputs().float()), inputs().float())


def test_calibration_and_scales_keep_it():
    normed, plain = both(TopK(3))
    x = LayerNorm(1e-3)(inputs())
    for coder, read in ((normed, inputs()), (plain, x)):
        calibrate(coder, read)
    torch.testing.assert_close(normed.thresholds, plain.thresholds)
    wanted = normed(inputs())
    normed.unfold(torch.rand(L).double() + 1, torch.rand(L).double() + 1)
    torch.testing.assert_close(normed(inputs()), wanted)
    torch.testing.assert_close(normed.fold()(inputs()), wanted)


def test_json_names_it_and_nothing_unknown():
    assert write_norm(None) is None is read_norm(None)
    assert read_norm(write_norm(LayerNorm(1e-6))) == LayerNorm(1e-6)
    with pytest.raises(UserError, match="input_norm is 'rms-norm'; choose one of layer-norm"):
        read_norm({"kind": "rms-norm"})
    with pytest.raises(UserError, match="eps is -1.0"):
        read_norm({"kind": "layer-norm", "eps": -1.0})
