"""The objective: fvu by layer, and the auxiliary loss that revives dead features."""

import pytest
import torch

from crosslayer import AuxK, JointTopK, Wiring
from crosslayer.coders.codes import DenseCodes
from crosslayer.training.objective import layer_fvu
from making import array, auxk_loss, random_coder

N, L, D, F = 12, 3, 6, 10


def inputs() -> torch.Tensor:
    return torch.randn(N, L, D, generator=torch.Generator().manual_seed(8))


def dead_mask(*features: tuple[int, int]) -> torch.Tensor:
    mask = torch.zeros(L, F, dtype=torch.bool)
    for source, feature in features:
        mask[source, feature] = True
    return mask


def auxiliary(auxk: AuxK, dead: torch.Tensor):
    coder, x = random_coder(Wiring.full(L), JointTopK(4)), inputs()
    residual = torch.randn(N, L, D, generator=torch.Generator().manual_seed(9))
    return coder, residual, auxk_loss(auxk, coder, coder.encode_for_training(x, 1.0), residual, dead)


def test_fvu_is_the_unexplained_share_of_the_variance():
    y, y_hat = inputs(), inputs() + 0.3
    variance = (y - y.mean(0)).square().sum(2).mean(0)
    by_hand = ((array(y) - array(y_hat)) ** 2).sum((0, 2)) / ((array(y) - array(y).mean(0)) ** 2).sum((0, 2))
    assert array(layer_fvu(y, y_hat, variance)) == pytest.approx(by_hand, rel=1e-5)
    torch.testing.assert_close(layer_fvu(y, y.mean(0).expand_as(y), variance), torch.ones(L))
    assert torch.equal(layer_fvu(y, y, variance), torch.zeros(L))


@pytest.mark.parametrize(
    "auxk", [AuxK(token_share=1.0), AuxK(k=2, coefficient=0.5), AuxK(k=1, token_share=0.5), AuxK(token_share=0.01)]
)
def test_auxiliary_loss_is_the_dead_features_error_on_the_residual(auxk):
    dead = dead_mask((0, 3), (1, 7), (2, 0), (2, 5))
    coder, residual, loss = auxiliary(auxk, dead)
    n = max(1, round(N * auxk.token_share))
    pre = torch.where(dead, coder.preactivations(inputs()), -torch.inf).flatten(1)[:n]
    top = pre.topk(min(auxk.k, 4)).indices
    acts = torch.zeros_like(pre).scatter(1, top, pre.gather(1, top).clamp(min=0)).view(n, L, F)
    explained = coder.decode([DenseCodes(a) for a in acts.unbind(1)], inputs()[:n]) - coder.b_dec
    error = (explained - residual[:n]).square().sum((0, 2)) / residual[:n].square().sum((0, 2))
    assert torch.as_tensor(loss).item() == pytest.approx(auxk.coefficient * error.mean().item(), rel=1e-5)


def test_only_dead_features_are_moved():
    dead = dead_mask((0, 3), (1, 7))
    coder, _, loss = auxiliary(AuxK(token_share=1.0), dead)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    moved = torch.stack([W.grad.abs().sum((1, 2)) > 0 for W in coder.W_dec])
    assert torch.equal(moved, dead)
    assert torch.equal(torch.stack([W.grad.abs().sum(1) > 0 for W in coder.W_enc]), dead)
    assert coder.b_dec.grad is None or coder.b_dec.grad.abs().max() < 1e-6


def test_there_is_no_auxiliary_loss_without_dead_features_or_coefficient():
    assert auxiliary(AuxK(), dead_mask())[-1] == 0.0
    assert auxiliary(AuxK(coefficient=0.0), dead_mask((0, 3)))[-1] == 0.0


def test_a_layer_without_residual_gives_a_finite_loss():
    coder, x = random_coder(Wiring.full(L), JointTopK(4)), inputs()
    loss = auxk_loss(AuxK(), coder, coder.encode_for_training(x, 1.0), torch.zeros(N, L, D), dead_mask((0, 3)))
    assert torch.as_tensor(loss).isfinite()
