"""The transcoder against its definition in numpy, and the identities between its variants."""

from copy import deepcopy

import pytest
import torch

from crosslayer import CrossLayerTranscoder, JointTopK, JumpReLU, ReLU, TopK, UserError, Wiring
from making import array, dense_acts, dense_writes, random_coder

WIRINGS = [Wiring.full(4), Wiring(4, 2), Wiring.per_layer(4), Wiring.full(4, first_target=1), Wiring(4, 2, 1)]
SPARSITIES = [JointTopK(8), TopK(3), ReLU(), JumpReLU()]
N, L, D, F = 17, 4, 6, 10


def inputs(n: int = N) -> torch.Tensor:
    return torch.randn(n, L, D, dtype=torch.double, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("sparsity", SPARSITIES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_forward_is_the_definition(wiring, sparsity):
    coder = random_coder(wiring, sparsity).double()
    acts = dense_acts(coder, array(inputs()))
    assert [array(codes.dense()) for codes in coder.encode(inputs())] == [pytest.approx(a, abs=1e-12) for a in acts]
    assert array(coder(inputs())) == pytest.approx(dense_writes(coder, acts), abs=1e-12)


@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_finished_jumprelu_is_the_definition_layer_by_layer(wiring):
    coder = random_coder(wiring).double()
    coder.with_thresholds(torch.rand(len(coder.sources), F, dtype=torch.double))
    acts = dense_acts(coder, array(inputs()))
    assert sum((a > 0).sum() for a in acts) > N
    assert array(coder(inputs())) == pytest.approx(dense_writes(coder, acts), abs=1e-12)
    for i, s in enumerate(coder.sources):
        assert array(coder.encode_layer(s, inputs()[:, s]).dense()) == pytest.approx(acts[i], abs=1e-12)


@pytest.mark.parametrize("sparsity", SPARSITIES, ids=lambda s: type(s).__name__)
def test_gradients_are_those_of_the_dense_masked_products(sparsity):
    coder, x = random_coder(Wiring(4, 3), sparsity).double(), inputs()
    masks = [codes.dense() > 0 for codes in coder.encode(x)]
    coder(x).square().sum().backward()
    found = [coder.b_dec.grad, *(p.grad for group in (coder.W_enc, coder.b_enc, coder.W_dec) for p in group)]
    y = coder.b_dec.expand(N, -1, -1)
    for i, mask in enumerate(masks):
        acts = (x[:, i] @ coder.W_enc[i].T + coder.b_enc[i]) * mask
        writes = torch.einsum("nf,ftd->ntd", acts, coder.W_dec[i])
        y = y + torch.nn.functional.pad(writes, (0, 0, i, L - i - writes.shape[1]))
    parameters = [coder.b_dec, *coder.W_enc, *coder.b_enc, *coder.W_dec]
    torch.testing.assert_close(found, list(torch.autograd.grad(y.square().sum(), parameters)))


def test_span_1_is_a_per_layer_transcoder():
    coder, x = random_coder(Wiring.per_layer(L), TopK(3)).double(), inputs()
    for t in range(L):
        acts = (x[:, t] @ coder.W_enc[t].T + coder.b_enc[t]).relu()
        kept = acts.topk(3).indices
        masked = torch.zeros_like(acts).scatter(1, kept, acts.gather(1, kept))
        torch.testing.assert_close(coder(x)[:, t], masked @ coder.W_dec[t][:, 0] + coder.b_dec[t])


def test_a_wider_clt_with_silent_far_decoders_is_the_narrower_one():
    wide, narrow = random_coder(Wiring.full(L), ReLU()), random_coder(Wiring.per_layer(L), ReLU())
    for i in range(L):
        wide.W_dec[i].data.zero_()
        wide.W_dec[i].data[:, :1] = narrow.W_dec[i].data
        wide.W_enc[i].data, wide.b_enc[i].data = narrow.W_enc[i].data, narrow.b_enc[i].data
    wide.b_dec.data = narrow.b_dec.data
    torch.testing.assert_close(wide(inputs().float()), narrow(inputs().float()))


def test_layer_0_keeps_its_bias_when_the_own_layer_is_left_out():
    coder = random_coder(Wiring.full(L, first_target=1)).double()
    torch.testing.assert_close(coder(inputs())[:, 0], coder.b_dec[0].expand(N, -1))
    assert len(coder.W_enc) == L - 1


@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_folding_absorbs_the_scales(wiring):
    coder = random_coder(wiring).double()
    coder.with_thresholds(torch.rand(len(coder.sources), F, dtype=torch.double))
    input_scale, output_scale = torch.rand(2, L, dtype=torch.double) * 3 + 0.5
    wanted = output_scale[:, None] * coder(inputs() / input_scale[:, None])
    scaled = deepcopy(coder)
    scaled.input_scale, scaled.output_scale = input_scale, output_scale
    torch.testing.assert_close(scaled(inputs()), wanted)
    torch.testing.assert_close(scaled.fold()(inputs()), wanted)
    assert scaled.input_scale is None
    torch.testing.assert_close(scaled.unfold(2 * input_scale, 3 * output_scale)(inputs()), wanted)
    torch.testing.assert_close(scaled.b_dec, coder.b_dec / 3)


@pytest.mark.parametrize("sparsity", SPARSITIES, ids=lambda s: type(s).__name__)
def test_all_zero_decoders_give_finite_gradients(sparsity):
    coder = random_coder(Wiring.full(L), sparsity).double()
    for W in coder.W_dec:
        W.data.zero_()
    encoded = coder.encode_for_training(inputs(), 1.0)
    penalty = sparsity.penalty(coder, encoded, 1.0)
    (coder.decoder_norms().sum() + coder.decode(encoded.codes, inputs()).sum() + penalty).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in coder.parameters())
    assert coder.W_dec[0].grad is not None


def test_decoder_norms_span_all_targets():
    coder = random_coder(Wiring.full(L)).double()
    wanted = [sum(W[:, t].square().sum(1) for t in range(W.shape[1])).sqrt() for W in coder.W_dec]
    torch.testing.assert_close(coder.decoder_norms(), torch.stack(wanted))


def test_initialisation_is_seeded_and_in_its_range():
    first, again, other = (
        CrossLayerTranscoder(Wiring.full(L), D, F, JumpReLU(initial_threshold=0.2)).initialise(seed)
        for seed in (4, 4, 5)
    )
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c) == (a.std() == 0)  # biases and thresholds start alike
    assert all(0.9 * F**-0.5 < W.abs().max() <= F**-0.5 for W in first.W_enc)
    assert all(0.9 * (L * D) ** -0.5 < W.abs().max() <= (L * D) ** -0.5 for W in first.W_dec)
    torch.testing.assert_close(torch.stack(list(first.log_threshold)).exp(), torch.full((L, F), 0.2))


def test_one_layer_of_a_joint_transcoder_cannot_be_encoded_alone():
    with pytest.raises(UserError, match="calibrate"):
        random_coder(Wiring.full(L)).encode_layer(0, inputs()[:, 0].float())


def test_a_width_of_0_is_refused():
    with pytest.raises(UserError, match="d_transcoder is 0"):
        CrossLayerTranscoder(Wiring.full(L), D, 0, JointTopK(1))
