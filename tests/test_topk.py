"""The exact top-k in blocks, against sorting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosslayer.coders.codes import SparseCodes
from crosslayer.coders.sparsity import topk
from crosslayer.coders.sparsity.topk import largest_of_each_token


def kept(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The mask [N, S, F] of what is chosen."""
    patterns = largest_of_each_token(scores.transpose(0, 1), k)
    return torch.stack([SparseCodes(p, torch.ones(len(p.tokens))).dense() > 0 for p in patterns], 1)


def by_sorting(scores: torch.Tensor, k: int) -> torch.Tensor:
    flat = scores.flatten(1)
    kth = flat.sort(1, descending=True).values[:, min(k, flat.shape[1]) - 1]
    return (scores >= kth[:, None, None]) & (scores > 0)


@given(st.integers(1, 4), st.sampled_from([1, 7, 24, 64, 256]), st.integers(1, 300), st.integers(0, 1000))
def test_it_is_what_sorting_finds(n_sources, n_features, k, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(9, n_sources, n_features, generator=generator) + torch.randn(9, 1, 1, generator=generator)
    assert torch.equal(kept(scores, k), by_sorting(scores, k))


@pytest.mark.parametrize("k", [1, 5, 90])
def test_the_way_of_a_gpu_finds_the_same(monkeypatch, k):
    scores = torch.randn(9, 3, 64, generator=torch.Generator().manual_seed(k))
    wanted = kept(scores, k)
    monkeypatch.setattr(topk, "WITH_NUMPY", "nothing")
    assert torch.equal(kept(scores, k), wanted)


@pytest.mark.parametrize("k", [1, 3, 40])
def test_nothing_is_chosen_where_nothing_is_positive(k):
    assert not kept(-torch.rand(5, 2, 64), k).any()
    assert not kept(torch.zeros(5, 2, 64), k).any()


def test_scores_that_tie_at_the_border_are_all_kept():
    assert kept(torch.tensor([[[3.0, 1.0, 2.0, 2.0]]]), 2).tolist() == [[[True, False, True, True]]]


def test_one_strong_block_does_not_hide_the_others():
    scores = torch.full((1, 1, 256), 0.5)
    scores[0, 0, ::8] = 10.0  # 32 large ones, in as few strided blocks as can be
    scores += torch.rand(1, 1, 256) / 100
    assert torch.equal(kept(scores, 40), by_sorting(scores, 40))


def test_chunks_of_tokens_and_weights_change_nothing_but_the_scores(monkeypatch):
    pre, weights = torch.randn(3, 50, 24), torch.rand(3, 24) + 0.5
    monkeypatch.setattr(topk, "CHUNK", 7)
    patterns = largest_of_each_token(pre, 9, weights)
    found = torch.stack([SparseCodes(p, torch.ones(len(p.tokens))).dense() > 0 for p in patterns], 1)
    assert torch.equal(found, by_sorting((pre * weights[:, None]).transpose(0, 1), 9))
    assert all(torch.equal(p.offsets.diff(), torch.bincount(p.tokens, minlength=50)) for p in patterns)
