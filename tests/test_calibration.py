"""Calibration: fixed thresholds that keep every layer's L0 and need no batch."""

import pytest
import torch

from crosslayer import JointTopK, JumpReLU, TopK, Wiring
from crosslayer.coders.calibration import calibrate
from making import random_coder

N, L, D = 2500, 3, 6


def inputs(n: int = N, seed: int = 2) -> torch.Tensor:
    return torch.randn(n, L, D, generator=torch.Generator().manual_seed(seed))


def counts(codes) -> list[int]:
    return [int(c.counts().sum()) for c in codes]


@pytest.mark.parametrize("sparsity", [JointTopK(5), TopK(3)])
@pytest.mark.parametrize("wiring", [Wiring.full(L), Wiring.full(L, first_target=1)], ids=str)
def test_every_layer_keeps_its_l0(wiring, sparsity):
    coder = random_coder(wiring, sparsity)
    wanted = counts(coder.encode(inputs()))
    calibrate(coder, inputs())
    assert isinstance(coder.sparsity, JumpReLU)
    assert counts(coder.encode(inputs())) == pytest.approx(wanted, abs=2)


def test_most_of_the_selection_stays():
    coder = random_coder(Wiring.full(L), JointTopK(5))
    chosen = torch.stack([codes.dense() > 0 for codes in coder.encode(inputs())])
    fixed = torch.stack([codes.dense() > 0 for codes in calibrate(coder, inputs()).encode(inputs())])
    assert (chosen & fixed).sum() > 0.75 * chosen.sum()


def test_l0_holds_on_other_tokens():
    coder = random_coder(Wiring.full(L), JointTopK(5))
    wanted = counts(coder.encode(inputs(seed=9)))
    assert counts(calibrate(coder, inputs()).encode(inputs(seed=9))) == pytest.approx(wanted, rel=0.1)


def test_a_token_alone_is_encoded_as_in_its_batch():
    coder = calibrate(random_coder(Wiring.full(L), JointTopK(5)), inputs())
    together, alone = coder.encode(inputs(40)), [coder.encode(x[None]) for x in inputs(40)]
    for i in range(L):
        found = torch.cat([codes[i].dense() for codes in alone])
        assert torch.equal(found > 0, together[i].dense() > 0)
        torch.testing.assert_close(found, together[i].dense())


def test_a_threshold_lies_between_what_was_dropped_and_what_was_kept():
    """One layer, one feature that must fire on the larger half of the tokens."""
    coder = random_coder(Wiring(1, 1), JointTopK(1), D=1, F=2)
    coder.W_enc[0].data = torch.tensor([[1.0], [-1.0]])
    coder.b_enc[0].data = torch.tensor([0.0, 3.0])
    coder.W_dec[0].data.fill_(1.0)
    x = torch.linspace(0, 3, 301)[:, None, None]  # feature 0 has x, feature 1 has 3 - x: the larger is kept
    assert calibrate(coder, x).thresholds[0].tolist() == pytest.approx([1.5, 1.5], abs=0.02)


def test_features_never_selected_get_the_typical_threshold_of_their_layer():
    coder = random_coder(Wiring.full(L), JointTopK(5))
    coder.b_enc[1].data[3] = -50.0
    weighted = (calibrate(coder, inputs()).thresholds * coder.decoder_norms())[1].tolist()
    others = weighted[:3] + weighted[4:]
    assert weighted[3] == pytest.approx(sorted(others)[len(others) // 2], rel=1e-5)


def test_a_layer_that_is_never_selected_stays_silent():
    coder = random_coder(Wiring.full(L), JointTopK(5))
    coder.b_enc[2].data.fill_(-50.0)
    calibrate(coder, inputs())
    assert counts(coder.encode(inputs() * 100))[2] == 0
    assert coder(inputs()).isfinite().all()
