"""Reviving dead features: penalty and auxiliary loss against direct evaluations, for every bank, with scales."""

import numpy as np
import pytest
import torch
from torch import Tensor

from crosslayer import (
    AuxK,
    CrossLayerTranscoder,
    DeadPenalty,
    Full,
    JointTopK,
    JumpReLU,
    LowRank,
    ReLU,
    SourceAndTargetTied,
    SourceTied,
    TargetTied,
    TopK,
    Wiring,
)
from crosslayer.coders.sparsity import Sparsity
from making import array, auxk_loss, dense_acts

N, L, D, F = 24, 3, 6, 10
BANKS = [
    Full(),
    Full(scale=True, offset=True),
    SourceTied(scale=True),
    TargetTied(),
    TargetTied(topk_coalesced=3),
    SourceAndTargetTied(offset=True),
    LowRank(rank=2),
]
SPARSITIES: list[Sparsity] = [JointTopK(4), TopK(2), ReLU(), JumpReLU()]
WIRINGS = [Wiring.full(L), Wiring(L, 2, first_target=1)]

banks = pytest.mark.parametrize("decoder", BANKS, ids=str)
sparsities = pytest.mark.parametrize("sparsity", SPARSITIES, ids=lambda s: type(s).__name__)
wirings = pytest.mark.parametrize("wiring", WIRINGS, ids=str)


def made(decoder=None, sparsity: Sparsity | None = None, wiring: Wiring = WIRINGS[0]) -> CrossLayerTranscoder:
    """A random transcoder in double that is in training, with scales."""
    torch.manual_seed(3)
    coder = CrossLayerTranscoder(wiring, D, F, sparsity or JointTopK(4), decoder).double().learn_thresholds().double()
    for parameter in coder.parameters():
        parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    coder.input_scale, coder.output_scale = torch.rand(2, L, dtype=torch.double) * 3 + 0.5
    return coder


def inputs(n: int = N, seed: int = 8) -> Tensor:
    return torch.randn(n, L, D, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def some_dead(coder: CrossLayerTranscoder) -> Tensor:
    """Every third feature."""
    return (torch.arange(len(coder.sources) * F) % 3 == 0).view(-1, F)


def gradients(coder: CrossLayerTranscoder, loss: Tensor | float) -> dict[str, Tensor]:
    """The gradients that are not zero, by parameter."""
    assert isinstance(loss, Tensor)
    coder.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in coder.named_parameters() if p.grad is not None and p.grad.any()}


# The penalty.


def penalty_by_hand(penalty: DeadPenalty, coder: CrossLayerTranscoder, dead: Tensor) -> float:
    """Mean over its tokens of the sum over dead features of max(0, cut - score), in numpy."""
    x, norms = array(inputs()) / array(coder.input_scale)[:, None], array(coder.decoder_norms())
    encoders = zip(coder.sources, coder.W_enc, coder.b_enc, strict=True)
    pre = np.stack([x[:, s] @ array(W).T + array(b) for s, W, b in encoders], 1)
    active = np.stack(dense_acts(coder, x), 1) * norms
    smallest = np.where(active > 0, active, np.inf).min((1, 2))
    cut = smallest[np.isfinite(smallest)].mean()
    n = max(1, round(penalty.token_share * N))
    return penalty.coefficient * np.maximum(0, cut - pre * norms)[:n, dead.numpy()].sum() / n


@pytest.mark.parametrize("penalty", [DeadPenalty(0.3, 1.0), DeadPenalty(2.0), DeadPenalty(1.0, 0.01)], ids=str)
@sparsities
@wirings
def test_the_penalty_is_the_mean_distance_of_dead_scores_to_the_cut(wiring, sparsity, penalty):
    coder = made(sparsity=sparsity, wiring=wiring)
    found = penalty.loss(coder, coder.encode_for_training(inputs(), 1.0), some_dead(coder))
    assert found.item() == pytest.approx(penalty_by_hand(penalty, coder, some_dead(coder)), rel=1e-9)


@banks
def test_the_penalty_moves_nothing_but_the_encoders_of_dead_features(decoder):
    coder = made(decoder)
    dead = some_dead(coder)
    loss = DeadPenalty(1.0, token_share=1.0).loss(coder, coder.encode_for_training(inputs(), 1.0), dead)
    found = gradients(coder, loss)
    assert found.keys() == {f"{name}.{i}" for name in ("W_enc", "b_enc") for i in range(L)}
    for i in range(L):
        assert torch.equal(found[f"W_enc.{i}"].abs().sum(1) > 0, dead[i])
        assert torch.equal(found[f"b_enc.{i}"] < 0, dead[i])  # down the slope, their scores rise


def test_dead_scores_above_the_cut_are_left_alone():
    coder, dead = made(), torch.zeros(L, F, dtype=torch.bool)
    dead[1, 4] = True
    coder.b_enc[1].data[4] = 100.0
    loss = DeadPenalty(1.0).loss(coder, coder.encode_for_training(inputs(), 1.0), dead)
    assert loss.item() == 0.0
    assert gradients(coder, loss) == {}


def test_tokens_without_active_features_have_no_say_in_the_cut():
    coder, penalty = made(sparsity=ReLU()), DeadPenalty(1.0, token_share=1 / 6)
    silent = coder.encode_for_training(inputs(), 1.0)
    for codes in silent.codes:
        codes.acts[5:9] = 0.0
    heard = np.stack([array(codes.acts) for codes in silent.codes], 1) * array(coder.decoder_norms())
    smallest = np.where(heard > 0, heard, np.inf).min((1, 2))
    scores = array(silent.pre * coder.decoder_norms())[:4, some_dead(coder).numpy()]
    wanted = np.maximum(0, np.delete(smallest, range(5, 9)).mean() - scores).sum() / 4
    assert penalty.loss(coder, silent, some_dead(coder)).item() == pytest.approx(wanted, rel=1e-9)


def test_where_nothing_is_active_the_cut_is_zero():
    coder = made()
    for b in coder.b_enc:
        b.data.fill_(-50.0)
    loss = DeadPenalty(1.0, token_share=1.0).loss(coder, coder.encode_for_training(inputs(), 1.0), some_dead(coder))
    scores = coder.preactivations(coder.scaled(inputs())) * coder.decoder_norms()
    assert loss.item() == pytest.approx(-scores[:, some_dead(coder)].sum().item() / N)


# The auxiliary loss.


def coalesced(acts: Tensor, sources: list[int], k: int | None) -> Tensor:
    """Which activations [N, S, F] a target sees: all of its sources', or the k largest of them."""
    seen = torch.zeros_like(acts)
    seen[:, sources] = acts[:, sources]
    if k is not None and sources:
        chosen = seen.flatten(1).topk(min(k, seen[0].numel())).indices
        seen = seen * torch.zeros_like(seen).flatten(1).scatter(1, chosen, 1.0).view_as(seen)
    return seen > 0


def auxk_by_hand(auxk: AuxK, coder: CrossLayerTranscoder, residual: Tensor, dead: Tensor) -> Tensor:
    """The error of the k largest dead features on the residual, relative to it, from dense masked products."""
    n, x = max(1, round(auxk.token_share * N)), inputs() / coder.input_scale[:, None]
    encoders = zip(coder.sources, coder.W_enc, coder.b_enc, strict=True)
    pre = torch.stack([x[:n, s] @ W.T + b for s, W, b in encoders], 1)
    candidates = torch.where(dead, pre, -torch.inf).flatten(1)
    chosen = torch.zeros_like(candidates).scatter(1, candidates.topk(min(auxk.k, int(dead.sum()))).indices, 1.0)
    active = (chosen.view_as(pre) > 0) & (pre > 0) & dead
    explained = []
    for t in range(L):
        sources = [coder.sources.index(s) for s in coder.wiring.sources(t)]
        seen = coalesced(pre * active, sources, getattr(coder.decoder.settings, "topk_coalesced", None))
        write = torch.zeros(n, D, dtype=torch.double)
        for i in sources:
            place = t - coder.wiring.targets(coder.sources[i]).start
            vectors, constants = coder.decoder.vectors(i), coder.decoder.constants(i)
            write = write + (pre[:, i] * seen[:, i]) @ vectors[:, place]
            if constants is not None:
                write = write + seen[:, i].double() @ constants[:, place]
        explained.append(write)
    y = torch.stack(explained, 1) * coder.output_scale[:, None]
    return auxk.coefficient * ((y - residual[:n]).square().sum((0, 2)) / residual[:n].square().sum((0, 2))).mean()


@pytest.mark.parametrize("auxk", [AuxK(), AuxK(k=2, coefficient=0.7, token_share=1.0)], ids=["default", "k=2"])
@wirings
@banks
def test_the_auxiliary_loss_and_its_gradients_are_those_of_dense_products(decoder, wiring, auxk):
    coder, residual = made(decoder, wiring=wiring), inputs(seed=9)
    dead = some_dead(coder)
    loss = auxk_loss(auxk, coder, coder.encode_for_training(inputs(), 1.0), residual, dead)
    wanted = auxk_by_hand(auxk, coder, residual, dead)
    torch.testing.assert_close(loss, wanted)
    ours, theirs = gradients(coder, loss), gradients(coder, wanted)
    assert ours.keys() == theirs.keys() >= {"W_enc.0", "b_enc.0"}
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name])


@sparsities
def test_the_auxiliary_loss_is_the_same_for_every_sparsity(sparsity):
    coder = made(sparsity=sparsity)
    dead, auxk = some_dead(coder), AuxK(k=3, token_share=0.5)
    loss = auxk_loss(auxk, coder, coder.encode_for_training(inputs(), 1.0), inputs(seed=9), dead)
    torch.testing.assert_close(loss, auxk_by_hand(auxk, coder, inputs(seed=9), dead))


@banks
def test_dead_features_learn_the_residual(decoder):
    coder, auxk = made(decoder), AuxK(coefficient=1.0, token_share=1.0)
    dead, optimizer, losses = some_dead(coder), torch.optim.Adam(coder.parameters(), lr=0.05), []
    for _ in range(30):
        losses.append(auxk_loss(auxk, coder, coder.encode_for_training(inputs(), 1.0), inputs(seed=9), dead))
        gradients(coder, losses[-1])
        optimizer.step()
    assert losses[-1] < 0.9 < losses[0]


# Both.


@pytest.mark.parametrize("decoder", [Full(), LowRank(rank=2)], ids=str)
def test_without_dead_features_or_a_coefficient_there_is_neither(decoder):
    coder = made(decoder)
    encoded, none = coder.encode_for_training(inputs(), 1.0), torch.zeros(L, F, dtype=torch.bool)
    assert DeadPenalty(1.0).loss(coder, encoded, none) == 0.0
    assert DeadPenalty(0.0).loss(coder, encoded, ~none) == 0.0
    assert auxk_loss(AuxK(), coder, encoded, inputs(seed=9), none) == 0.0
    assert auxk_loss(AuxK(coefficient=0.0), coder, encoded, inputs(seed=9), ~none) == 0.0


@sparsities
def test_neither_grows_with_the_batch(sparsity):
    coder = made(sparsity=sparsity)
    dead, auxk, penalty = some_dead(coder), AuxK(token_share=0.5), DeadPenalty(1.0, token_share=0.5)

    def losses(n: int) -> list[Tensor]:
        """With every token n times."""
        encoded = coder.encode_for_training(inputs().repeat_interleave(n, 0), 1.0)
        residual = inputs(seed=9).repeat_interleave(n, 0)
        return [auxk_loss(auxk, coder, encoded, residual, dead), penalty.loss(coder, encoded, dead)]

    torch.testing.assert_close(losses(3), losses(1))
