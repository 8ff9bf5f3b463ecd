"""Sparse codes: values and gradients are those of dense masked products, whatever is active."""

import pytest
import torch
from torch.autograd import gradcheck

from crosslayer.coders import kernels
from crosslayer.coders.codes import DenseCodes, SparseCodes, encode_active
from crosslayer.coders.pattern import Pattern

F, D, K = 7, 5, 6

ACTIVE = {
    "every token": [[0, 3], [6], [1, 2, 3]],
    "silent tokens between": [[], [0, 3], [], [], [6, 0]],
    "a silent last token": [[2], [5, 4], []],
    "nothing at all": [[], []],
    "one token": [[4, 1]],
    "one silent token": [[]],
}


@pytest.fixture(params=ACTIVE)
def pattern(request) -> Pattern:
    return make_pattern(ACTIVE[request.param])


def make_pattern(rows: list[list[int]]) -> Pattern:
    tokens = torch.tensor([n for n, row in enumerate(rows) for _ in row], dtype=torch.long)
    features = torch.tensor([f for row in rows for f in row], dtype=torch.long)
    return Pattern.from_pairs(tokens, features, len(rows), F)


def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.double, requires_grad=True)


def mask_of(pattern: Pattern) -> torch.Tensor:
    mask = torch.zeros(pattern.n_tokens, F, dtype=torch.double)
    mask[pattern.tokens, pattern.features] = 1
    return mask


def test_decode_is_the_dense_product(pattern):
    values, W = doubles(len(pattern.tokens)), doubles(F, K)
    codes = SparseCodes(pattern, values)
    torch.testing.assert_close(codes.decode(W), codes.dense() @ W)
    torch.testing.assert_close(codes.decode(W), DenseCodes(codes.dense()).decode(W))


def test_decode_has_the_gradients_of_the_dense_product(pattern):
    values, W, ahead = doubles(len(pattern.tokens)), doubles(F, K), doubles(pattern.n_tokens, K).detach()
    codes = SparseCodes(pattern, values)
    ours = torch.autograd.grad((codes.decode(W) * ahead).sum(), (values, W))
    dense = torch.autograd.grad(((codes.dense() @ W) * ahead).sum(), (values, W))
    torch.testing.assert_close(ours, dense)


def test_decode_passes_gradcheck(pattern):
    values, W = doubles(len(pattern.tokens)), doubles(F, K)
    assert gradcheck(lambda v, W: SparseCodes(pattern, v).decode(W), (values, W))


def test_encode_active_has_the_gradients_of_the_masked_dense_encoder(pattern):
    x, W, b, ahead = doubles(pattern.n_tokens, D), doubles(F, D), doubles(F), doubles(pattern.n_tokens, F).detach()
    pre = x @ W.T + b
    values = pre.detach()[pattern.tokens, pattern.features]
    codes = encode_active(x, W, b, pattern, values)
    torch.testing.assert_close(codes.dense(), pre * mask_of(pattern))
    ours = torch.autograd.grad((codes.dense() * ahead).sum(), (x, W, b))
    dense = torch.autograd.grad((pre * mask_of(pattern) * ahead).sum(), (x, W, b))
    torch.testing.assert_close(ours, dense)


def test_encode_active_passes_gradcheck(pattern):
    def values(x, W, b):
        pre = (x @ W.T + b).detach()[pattern.tokens, pattern.features]
        return encode_active(x, W, b, pattern, pre).values

    assert gradcheck(values, (doubles(pattern.n_tokens, D), doubles(F, D), doubles(F)))


def test_encode_then_decode_has_the_gradients_of_the_dense_transcoder(pattern):
    x, W, b, W_dec = doubles(pattern.n_tokens, D), doubles(F, D), doubles(F), doubles(F, K)
    pre = x @ W.T + b
    codes = encode_active(x, W, b, pattern, pre.detach()[pattern.tokens, pattern.features])
    ours = torch.autograd.grad(codes.decode(W_dec).square().sum(), (x, W, b, W_dec))
    dense = torch.autograd.grad(((pre * mask_of(pattern)) @ W_dec).square().sum(), (x, W, b, W_dec))
    torch.testing.assert_close(ours, dense)


def test_counts_are_those_of_the_dense_codes(pattern):
    codes = SparseCodes(pattern, torch.rand(len(pattern.tokens)) + 0.1)
    assert torch.equal(codes.counts(), mask_of(pattern).sum(0).float())
    assert torch.equal(codes.counts(), DenseCodes(codes.dense()).counts())


def test_compact_codes_write_the_same_through_the_rows_of_the_active_features(pattern):
    codes, W = SparseCodes(pattern, torch.rand(len(pattern.tokens)) + 0.1), torch.randn(pattern.n_features, 5)
    features, compact = codes.compact()
    assert features.tolist() == sorted(set(pattern.features.tolist()))
    torch.testing.assert_close(compact.decode(W[features]), codes.decode(W))
    assert DenseCodes(codes.dense()).compact()[0] is None


def test_indicators_and_pairs_are_those_of_the_dense_codes(pattern):
    codes = SparseCodes(pattern, torch.rand(len(pattern.tokens)) + 0.1)
    for kind in (codes, DenseCodes(codes.dense())):
        assert torch.equal(kind.indicator().dense(), (codes.dense() > 0).float())
        tokens, features, values = kind.pairs()
        assert torch.equal(torch.zeros_like(codes.dense()).index_put((tokens, features), values), codes.dense())


def test_selected_codes_keep_some_pairs_with_new_values(pattern):
    keep = torch.arange(len(pattern.tokens)) % 2 == 0
    values = torch.rand(len(pattern.tokens)) + 0.1
    chosen = SparseCodes(pattern, values).select(keep, 2 * values)
    torch.testing.assert_close(chosen.dense(), 2 * SparseCodes(pattern, values * keep).dense())


@pytest.mark.parametrize("sums", [kernels.sums_by_bags, kernels.sums_by_csr])
@pytest.mark.parametrize("dots", [kernels.dots_by_bags, kernels.dots_by_csr])
@pytest.mark.parametrize("dense_from", [-1.0, 2.0])
def test_all_kernels_give_the_same_values_and_gradients(pattern, sums, dots, dense_from, monkeypatch):
    monkeypatch.setitem(kernels.DENSE_FROM, "cpu", dense_from)
    monkeypatch.setitem(kernels.SUMS, "cpu", sums)
    monkeypatch.setitem(kernels.DOTS, "cpu", dots)
    values, W, ahead = doubles(len(pattern)), doubles(F, K), torch.randn(pattern.n_tokens, K).double()
    acts = torch.zeros(pattern.n_tokens, F).double().index_put((pattern.tokens, pattern.features), values)
    ours = SparseCodes(pattern, values).decode(W)
    torch.testing.assert_close(ours, acts @ W)
    wanted = torch.autograd.grad(((acts @ W) * ahead).sum(), (values, W))
    torch.testing.assert_close(torch.autograd.grad((ours * ahead).sum(), (values, W)), wanted)


@pytest.mark.parametrize(
    "form", [lambda codes: codes, lambda codes: DenseCodes(codes.dense())], ids=["sparse", "dense"]
)
def test_codes_that_follow_others_are_the_tokens_of_both(pattern, form):
    first = SparseCodes(pattern, torch.rand(len(pattern)))
    second = SparseCodes(make_pattern([[], [1, 5], []]), torch.rand(2))
    both = form(first).followed_by(second)
    assert both.n_tokens == pattern.n_tokens + 3
    assert torch.equal(both.dense(), torch.cat([first.dense(), second.dense()]))
