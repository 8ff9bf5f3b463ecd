"""Decoder banks against their definition in numpy, the identities between them, and skip connections."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from torch.func import functional_call

from crosslayer import (
    AuxK,
    CrossLayerTranscoder,
    Full,
    JointTopK,
    JumpReLU,
    LowRank,
    ReLU,
    SourceAndTargetTied,
    SourceTied,
    TargetTied,
    TopK,
    TrainConfig,
    UserError,
    Wiring,
)
from crosslayer.activations.record import Activations
from crosslayer.coders.decoders import DECODERS, Decoder, read_decoder, write_decoder
from crosslayer.coders.sparsity import Sparsity
from crosslayer.training.scales import estimate_scales
from crosslayer.training.trainer import Trainer
from making import array, random_activations

N, L, D, F = 11, 4, 5, 8
WIRINGS = [Wiring.full(L), Wiring(L, 2), Wiring.per_layer(L), Wiring.full(L, first_target=1)]
SKIPS = [Wiring.per_layer(L), Wiring.full(L), Wiring(L, 2, first_target=1)]
PLAIN = [Full(), SourceTied(), TargetTied(), SourceAndTargetTied(), LowRank(rank=2)]
BANKS: list[Decoder] = [
    *(bank(scale=scale, offset=offset) for bank in (Full, SourceTied, TargetTied, SourceAndTargetTied)
      for scale, offset in product((False, True), repeat=2)),
    *(LowRank(rank=rank, offset=offset) for rank in (1, 2, 3) for offset in (False, True)),
]  # fmt: skip
RICHEST: list[Decoder] = [bank for bank in BANKS if bank.scale and bank.offset] + [LowRank(rank=3, offset=True)]
COALESCED = [TargetTied(3, scale=scale, offset=offset) for scale, offset in product((False, True), repeat=2)]


def named(decoder: Decoder) -> str:
    settings = [f"{name}={value}" for name, value in write_decoder(decoder).items() if name != "kind" and value]
    return f"{type(decoder).__name__}({', '.join(settings)})"


banks = pytest.mark.parametrize("decoder", BANKS, ids=named)
plain_banks = pytest.mark.parametrize("decoder", PLAIN, ids=named)
wirings = pytest.mark.parametrize("wiring", WIRINGS, ids=str)


def inputs(n: int = N) -> torch.Tensor:
    return torch.randn(n, L, D, dtype=torch.double, generator=torch.Generator().manual_seed(5))


def made(
    decoder: Decoder, wiring: Wiring = WIRINGS[0], skip: Wiring | None = None, sparsity: Sparsity | None = None
) -> CrossLayerTranscoder:
    """A transcoder in double whose every parameter is random; thresholds are fixed where no sparsity is given."""
    torch.manual_seed(3)
    coder = CrossLayerTranscoder(wiring, D, F, sparsity or TopK(3), decoder, skip).double().learn_thresholds()
    for parameter in coder.parameters():
        parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    return coder if sparsity else coder.with_thresholds(torch.rand(len(coder.sources), F, dtype=torch.double) / 2)


def by_layers(coder: CrossLayerTranscoder, x: torch.Tensor) -> torch.Tensor:
    """What a replacement model does: encode a layer, add what it writes, and ask for that layer's write at once."""
    writes, y = coder.writes(len(x)), []
    for layer in range(L):
        codes = coder.encode_layer(layer, x[:, layer]) if layer in coder.sources else None
        coder.add_layer(writes, layer, codes, x[:, layer])
        y.append(coder.write(writes, layer).clone())
    return torch.stack(y, 1)


# The definition in numpy, from the raw parameters.


def raw(coder: CrossLayerTranscoder, name: str, i: int) -> np.ndarray:
    return array(getattr(coder.decoder, name)[i])


def vector(coder: CrossLayerTranscoder, s: int, t: int) -> np.ndarray:
    """[F, D] what the features of layer s write to layer t, before the scale."""
    i, place = coder.sources.index(s), t - s - coder.wiring.first_target
    match coder.decoder.settings:
        case Full():
            return raw(coder, "W_dec", i)[:, place]
        case SourceTied():
            return raw(coder, "W_dec", i)
        case TargetTied():
            return raw(coder, "W_target", t)
        case SourceAndTargetTied():
            return raw(coder, "W_dec", i) + raw(coder, "W_target", t)
        case LowRank():
            return np.einsum("fr,frd->fd", raw(coder, "mix", i)[:, place], raw(coder, "W_dec", i))
    raise AssertionError


def factor(coder: CrossLayerTranscoder, name: str, s: int, t: int, default: float) -> np.ndarray | float:
    """[F] the scales or offsets of the pair s -> t."""
    if not getattr(coder.decoder.settings, name):
        return default
    return raw(coder, name, coder.sources.index(s))[:, t - s - coder.wiring.first_target]


def pairs(wiring: Wiring, t: int) -> list[int]:
    """The sources of target t."""
    return [s for s in range(L) if 0 <= t - s - wiring.first_target < wiring.span]


def seen_by(coder: CrossLayerTranscoder, x: np.ndarray, s: int, t: int) -> tuple[np.ndarray, np.ndarray]:
    """[N, F] activations of layer s as layer t sees them, (z + offset) scale where z > 0, and where that is."""
    i = coder.sources.index(s)
    z = x[:, s] @ array(coder.W_enc[i]).T + array(coder.b_enc[i])
    active = z > array(coder.thresholds[i])
    return (z + factor(coder, "offset", s, t, 0.0)) * factor(coder, "scale", s, t, 1.0) * active, active


def definition(coder: CrossLayerTranscoder, x: np.ndarray) -> np.ndarray:
    """y_t = b_t + sum_s (z + offset) [z > 0] scale vector(s, t) + sum_s x_s W_skip[s -> t]^T, [N, L, D]."""
    y = np.repeat(array(coder.b_dec)[None], len(x), 0)
    for t in range(L):
        for s in pairs(coder.wiring, t):
            y[:, t] += seen_by(coder, x, s, t)[0] @ vector(coder, s, t)
        for s in pairs(coder.skip, t) if coder.skip else ():
            W = coder.W_skip[coder.skip.source_layers.index(s)]
            y[:, t] += x[:, s] @ array(W)[t - s - coder.skip.first_target].T
    return y


def coalesced(coder: CrossLayerTranscoder, x: np.ndarray, k: int) -> np.ndarray:
    """The same from the k largest of all sources' activations, token by token and target by target."""
    y = np.repeat(array(coder.b_dec)[None], len(x), 0)
    for n, t in product(range(len(x)), range(L)):
        candidates = []
        for s in pairs(coder.wiring, t):
            values, active = seen_by(coder, x[n : n + 1], s, t)
            candidates += [(values[0, f], s, f) for f in active[0].nonzero()[0]]
        for value, s, f in sorted(candidates, reverse=True)[:k]:
            y[n, t] += value * vector(coder, s, t)[f]
    return y


# The function.


@wirings
@banks
def test_forward_is_the_definition_at_once_and_layer_by_layer(decoder, wiring):
    coder = made(decoder, wiring)
    wanted = definition(coder, array(inputs()))
    assert array(coder(inputs())) == pytest.approx(wanted, abs=1e-12)
    assert array(by_layers(coder, inputs())) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("skip", SKIPS, ids=str)
@pytest.mark.parametrize("wiring", [WIRINGS[1], WIRINGS[3]], ids=str)
@plain_banks
def test_skips_pass_on_what_a_layer_reads_by_a_wiring_of_their_own(decoder, wiring, skip):
    coder = made(decoder, wiring, skip)
    wanted = definition(coder, array(inputs()))
    assert array(coder(inputs())) == pytest.approx(wanted, abs=1e-12)
    assert array(by_layers(coder, inputs())) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("sparsity", [JointTopK(6), TopK(3), ReLU(), JumpReLU()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("decoder", RICHEST, ids=named)
def test_sparse_and_dense_codes_write_alike(decoder, sparsity):
    coder = made(decoder, sparsity=sparsity)
    codes = coder.encode(inputs())
    acts, y = [array(c.dense()) for c in codes], np.repeat(array(coder.b_dec)[None], N, 0)
    for t, s in product(range(L), range(L)):
        if s <= t:
            seen = (acts[s] + factor(coder, "offset", s, t, 0.0)) * factor(coder, "scale", s, t, 1.0) * (acts[s] > 0)
            y[:, t] += seen @ vector(coder, s, t)
    assert array(coder.decode(codes, inputs())) == pytest.approx(y, abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 1000])
@pytest.mark.parametrize("wiring", [WIRINGS[1], WIRINGS[3]], ids=str)
@pytest.mark.parametrize("decoder", COALESCED, ids=named)
def test_coalesced_topk_keeps_the_k_largest_of_all_sources(decoder, wiring, k):
    coder = made(replace(decoder, topk_coalesced=k), wiring)
    wanted = coalesced(coder, array(inputs()), k)
    assert array(coder(inputs())) == pytest.approx(wanted, abs=1e-12)
    assert array(by_layers(coder, inputs())) == pytest.approx(wanted, abs=1e-12)
    assert (k == 1000) == np.allclose(wanted, definition(coder, array(inputs())))


def test_coalesced_topk_leaves_the_skip_alone():
    coder = made(COALESCED[-1], skip=Wiring.full(L))
    without = deepcopy(coder)
    for W in without.W_skip:
        W.data.zero_()
    skip = np.stack([sum(array(inputs())[:, s] @ array(coder.W_skip[s][t - s]).T for s in range(t + 1))
                     for t in range(L)], 1)  # fmt: skip
    assert array(coder(inputs()) - without(inputs())) == pytest.approx(skip, abs=1e-12)


@pytest.mark.parametrize("decoder", [*PLAIN, SourceTied(offset=True), COALESCED[-1]], ids=named)
def test_tokens_without_active_features_get_the_bias(decoder):
    coder = made(decoder).with_thresholds(torch.full((L, F), torch.inf, dtype=torch.double))
    assert torch.equal(coder(inputs()), coder.b_dec.expand(N, -1, -1))
    assert torch.equal(by_layers(coder, inputs()), coder.b_dec.expand(N, -1, -1))


# Gradients, lengths, rows.


class Way(torch.nn.Module):
    """A way of writing, as a function of all parameters in a row."""

    def __init__(self, coder: CrossLayerTranscoder, way: Callable):
        super().__init__()
        self.coder, self.forward = coder, lambda x: way(coder, x)

    def of(self, x: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        parameters, sizes = dict(self.named_parameters()), [p.numel() for p in self.parameters()]
        parts = zip(parameters.items(), flat.split(sizes), strict=True)
        return functional_call(self, {name: part.view_as(p) for (name, p), part in parts}, (x,))


@pytest.mark.parametrize("way", [CrossLayerTranscoder.__call__, by_layers], ids=["at once", "layer by layer"])
@pytest.mark.parametrize("decoder", [Full(), SourceTied(), *RICHEST, COALESCED[-1]], ids=named)
def test_gradients_are_those_of_finite_differences(decoder, way):
    coder = made(decoder, Wiring(L, 2), skip=Wiring(L, 2, first_target=1))
    x, function = inputs(6).requires_grad_(), Way(coder, way).of
    flat = torch.cat([p.detach().flatten() for p in coder.parameters()]).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, flat), fast_mode=True)
    way(coder, x).square().sum().backward()
    assert not [name for name, parameter in coder.named_parameters() if not parameter.grad.any()]
    torch.testing.assert_close(function(x, flat), coder(x))


@pytest.mark.parametrize("decoder", [*BANKS, *COALESCED], ids=named)
def test_norms_are_the_lengths_over_all_targets(decoder):
    for wiring in WIRINGS:
        coder = made(decoder, wiring)
        found = array(coder.decoder_norms())
        for i, s in enumerate(coder.sources):
            all_targets = [
                vector(coder, s, t) * np.reshape(factor(coder, "scale", s, t, 1.0), (-1, 1)) for t in wiring.targets(s)
            ]
            assert found[i] == pytest.approx(np.linalg.norm(np.concatenate(all_targets, 1), axis=1), abs=1e-12)
            assert found[i] == pytest.approx(array(coder.decoder.vectors(i).flatten(1).norm(dim=1)), abs=1e-12)


@banks
def test_some_features_are_rows_of_all(decoder):
    bank, some = made(decoder).decoder, torch.tensor([6, 1, 3])
    for i in range(L):
        assert bank.vectors(i).shape == (F, L - i, D)
        torch.testing.assert_close(bank.vectors(i, some), bank.vectors(i)[some])
        constants = bank.constants(i)
        assert (constants is None) == (not decoder.offset)
        if constants is not None:
            torch.testing.assert_close(constants, bank.vectors(i) * bank.offset[i][:, :, None])
            torch.testing.assert_close(bank.constants(i, some), constants[some])


# Scales, files, training.


@pytest.mark.parametrize("decoder", [*BANKS, *COALESCED], ids=named)
def test_scales_move_into_the_weights_and_out_again(decoder):
    coder = made(decoder, WIRINGS[3], skip=Wiring(L, 2)).requires_grad_(False)
    wanted, halved = coder(inputs()), coder(inputs() / 2)
    into, out = torch.rand(2, L, dtype=torch.double) * 3 + 0.5
    torch.testing.assert_close(coder.unfold(into, out)(inputs()), wanted)
    torch.testing.assert_close(by_layers(coder, inputs()), wanted)
    coder.input_scale, coder.output_scale = 2 * into, 5 * out
    torch.testing.assert_close(coder(inputs()), 5 * halved)
    torch.testing.assert_close(coder.fold()(inputs()), 5 * halved)
    torch.testing.assert_close(by_layers(coder, inputs()), 5 * halved)
    assert coder.input_scale is None
    assert not any(parameter.requires_grad for parameter in coder.parameters())


@pytest.mark.parametrize("decoder", [*BANKS, *COALESCED], ids=named)
def test_a_saved_transcoder_is_loaded_as_it_was(decoder, tmp_path):
    coder = made(decoder, WIRINGS[3], skip=Wiring(L, 2)).float()
    coder.first_write.normal_()
    coder.unfold(torch.rand(L) + 0.5, torch.rand(L) + 0.5).fold().save(tmp_path)
    loaded = CrossLayerTranscoder.load(tmp_path)
    assert (loaded.wiring, loaded.skip) == (coder.wiring, coder.skip)
    assert loaded.decoder.settings == coder.decoder.settings
    assert torch.equal(loaded(inputs().float()), coder(inputs().float()))
    ours, theirs = coder.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name != "cut")


def test_shared_vectors_get_scales_when_they_are_folded_and_others_do_not():
    found = [made(decoder).unfold(torch.ones(L).double(), torch.ones(L).double()).decoder.settings for decoder in PLAIN]
    assert found == [Full(), SourceTied(scale=True), TargetTied(), SourceAndTargetTied(scale=True), LowRank(rank=2)]


@cache
def batch(number: int, n: int = 55) -> Activations:
    activations = random_activations(n, 3, 8, seed=number)
    return activations[activations.position > 0]


@pytest.mark.parametrize(
    "decoder", [*PLAIN, SourceTied(scale=True, offset=True), TargetTied(8, offset=True)], ids=named
)
def test_every_bank_learns(decoder):
    config = TrainConfig(
        wiring=Wiring.full(3), skip=Wiring(3, 2), decoder=decoder, sparsity=TopK(3), d_transcoder=24, tokens=40 * 48,
        learning_rate=1e-2, auxk=AuxK(coefficient=0.0),
    )  # fmt: skip
    coach = Trainer(config, estimate_scales(random_activations(1000, 3, 8, seed=99)))
    before = {name: parameter.detach().clone() for name, parameter in coach.coder.named_parameters()}
    fvu = [coach.step(batch(i)).fvu for i in range(40)]
    assert fvu[-1] < 0.7 * fvu[0]
    assert not [name for name, parameter in coach.coder.named_parameters() if torch.equal(parameter, before[name])]
    finished = coach.finish(batch(50, 300))
    coach.coder.with_thresholds(finished.thresholds)
    torch.testing.assert_close(finished(batch(51).x), coach.coder(batch(51).x), atol=1e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in finished.parameters())


# Identities.


def same_encoder(coder: CrossLayerTranscoder, decoder: Decoder, **parameters) -> CrossLayerTranscoder:
    """A transcoder with the encoder and biases of `coder`, another bank, and these parameters in it."""
    other = made(decoder, coder.wiring).with_thresholds(coder.thresholds)
    for name in ("W_enc", "b_enc"):
        getattr(other, name).load_state_dict(getattr(coder, name).state_dict())
    other.b_dec.data = coder.b_dec.data
    for name, values in parameters.items():
        for parameter, value in zip(getattr(other.decoder, name), values, strict=True):
            parameter.data = value.detach().reshape(parameter.shape).clone()
    return other


def assert_same_function(one: CrossLayerTranscoder, other: CrossLayerTranscoder) -> None:
    torch.testing.assert_close(one(inputs()), other(inputs()))
    torch.testing.assert_close(one.decoder_norms(), other.decoder_norms())


@wirings
@pytest.mark.parametrize("offset", [False, True])
def test_rank_1_is_source_tied_with_scales(wiring, offset):
    coder = made(LowRank(rank=1, offset=offset), wiring)
    bank = coder.decoder
    offsets = {"offset": bank.offset} if offset else {}
    tied = SourceTied(scale=True, offset=offset)
    assert_same_function(coder, same_encoder(coder, tied, W_dec=bank.W_dec, scale=bank.mix, **offsets))


@wirings
def test_a_full_decoder_with_the_same_vector_for_all_targets_is_source_tied(wiring):
    coder = made(SourceTied(), wiring)
    repeated = [W[:, None].repeat(1, wiring.n_targets(s), 1) for s, W in zip(coder.sources, coder.W_dec, strict=True)]
    assert_same_function(coder, same_encoder(coder, Full(), W_dec=repeated))


@wirings
def test_a_full_decoder_with_each_targets_own_vectors_is_target_tied(wiring):
    coder = made(TargetTied(), wiring)
    dictionaries = coder.decoder.W_target
    full = [torch.stack([dictionaries[t] for t in wiring.targets(s)], 1) for s in coder.sources]
    assert_same_function(coder, same_encoder(coder, Full(), W_dec=full))


@wirings
def test_a_low_rank_decoder_of_full_rank_is_full(wiring):
    coder = made(Full(), wiring)
    rank = max(wiring.n_targets(s) for s in coder.sources)
    W = [torch.nn.functional.pad(W, (0, 0, 0, rank - W.shape[1])) for W in coder.W_dec]
    mix = [torch.eye(wiring.n_targets(s), rank, dtype=torch.double).expand(F, -1, -1) for s in coder.sources]
    assert_same_function(coder, same_encoder(coder, LowRank(rank=rank), W_dec=W, mix=mix))


@pytest.mark.parametrize("offset", [False, True])
def test_source_and_target_tied_without_the_source_is_target_tied(offset):
    coder = made(TargetTied(offset=offset))
    bank, zeros = coder.decoder, [torch.zeros(F, D, dtype=torch.double)] * L
    same = {"offset": bank.offset} if offset else {}
    decoder = SourceAndTargetTied(offset=offset)
    assert_same_function(coder, same_encoder(coder, decoder, W_target=bank.W_target, W_dec=zeros, **same))


def test_fresh_scales_and_offsets_change_nothing():
    plain = made(SourceTied())
    fresh = same_encoder(plain, SourceTied(scale=True, offset=True), W_dec=plain.W_dec)
    start = SourceTied(scale=True, offset=True).build(WIRINGS[0], D, F)
    fresh.decoder.scale, fresh.decoder.offset = start.scale.double(), start.offset.double()
    assert_same_function(plain, fresh)


# Settings.


@pytest.mark.parametrize("decoder", [*BANKS, *COALESCED], ids=named)
def test_settings_survive_json(decoder):
    assert read_decoder(write_decoder(decoder)) == decoder


def test_initialisation_is_seeded_and_draws_every_write_vector():
    for decoder in PLAIN:
        one, again, other = (CrossLayerTranscoder(WIRINGS[1], D, F, TopK(3), decoder).initialise(s) for s in (1, 1, 2))
        vectors = [torch.stack([c.decoder.vectors(i)[:, 0] for i in range(L)]) for c in (one, again, other)]
        assert torch.equal(vectors[0], vectors[1])
        assert not (vectors[0] == vectors[2]).any()
        bounds = [W.abs().max().item() for name, W in one.decoder.named_parameters() if name.startswith("W_")]
        assert all(0.8 < bound * (L * D) ** 0.5 <= 1 for bound in bounds)


def test_vectors_of_any_rank_start_as_long_as_full_ones():
    banks = (Full(), LowRank(rank=1), LowRank(rank=4))
    coders = [CrossLayerTranscoder(WIRINGS[0], 64, 64, TopK(3), decoder).initialise(0) for decoder in banks]
    full, *lengths = [coder.decoder_norms().mean().item() for coder in coders]
    assert lengths == pytest.approx([full, full], rel=0.05)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LowRank(rank=0), "rank is 0; choose at least 1"),
        (lambda: LowRank(scale=True), "scale is set for a low-rank decoder"),
        (lambda: TargetTied(topk_coalesced=0), "topk_coalesced is 0; choose at least 1"),
        (lambda: made(Full(), skip=Wiring.full(3)), "the skip connection is for 3 layers, the wiring for 4"),
        (lambda: read_decoder({"kind": "sparse"}), f"decoder is 'sparse'; choose one of {', '.join(DECODERS)}"),
        (lambda: read_decoder({}), "decoder is None; choose one of"),
        (lambda: read_decoder({"kind": "full", "rank": 2}), "decoder full has no setting rank; its settings are"),
        (lambda: read_decoder({"kind": "low-rank", "rank": 0}), "rank is 0"),
        (lambda: read_decoder({"kind": "low-rank", "rank": "two"}), "decoder low-rank: "),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_named(build, message):
    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize("sparsity", [ReLU(), JumpReLU()], ids=lambda s: type(s).__name__)
def test_coalesced_topk_needs_a_sparsity_that_selects(sparsity):
    coder = made(COALESCED[0], sparsity=sparsity)
    with pytest.raises(UserError, match="topk_coalesced .* use it with a topk sparsity"):
        coder(inputs())
