"""The training step: it learns, stops at numbers that are none, and goes on from its state bit for bit."""

from copy import deepcopy

import pytest
import torch

from crosslayer import AuxK, JointTopK, JumpReLU, ReLU, TopK, TrainConfig, UserError, Wiring
from crosslayer.activations.record import Activations
from crosslayer.training.scales import estimate_scales
from crosslayer.training.trainer import Trainer
from making import array, dense_acts, dense_writes, random_activations

L, D = 3, 8
BATCH = 128


def batch(number: int) -> Activations:
    activations = random_activations(BATCH + BATCH // 7 + 1, L, D, seed=number)
    return activations[activations.position > 0][:BATCH]


def trainer(wiring: Wiring | None = None, **settings) -> Trainer:
    settings = {"sparsity": JointTopK(12), "d_transcoder": 32, "tokens": 40 * BATCH, **settings}
    config = TrainConfig(wiring=wiring or Wiring.full(L), learning_rate=1e-2, **settings)
    return Trainer(config, estimate_scales(random_activations(1000, L, D, seed=99)))


def run(coach: Trainer, steps: range):
    return [coach.step(batch(i)) for i in steps]


def weights(coach: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in coach.coder.parameters()]


def assert_same_weights(one: Trainer, other: Trainer) -> None:
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.mark.parametrize(
    "sparsity", [JointTopK(12), TopK(4), ReLU(1e-3), JumpReLU(1e-3)], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("wiring", [Wiring.full(L), Wiring.per_layer(L), Wiring.full(L, 1)], ids=str)
def test_the_loss_falls(wiring, sparsity):
    coach = trainer(wiring, sparsity=sparsity)
    metrics = run(coach, range(40))
    assert metrics[-1].fvu < 0.75 * metrics[0].fvu
    assert coach.finished
    assert [m.step for m in metrics] == list(range(1, 41))
    assert [m.tokens for m in metrics] == [BATCH * (i + 1) for i in range(40)]


def test_a_steps_fvu_and_l0_are_those_of_the_definition():
    coach = trainer(sparsity=JointTopK(12, anneal_from=1.0))
    run(coach, range(3))
    coder, scales = deepcopy(coach.coder), coach.scales
    metrics, tokens = coach.step(batch(3)), batch(3)
    x, y = array(tokens.x) / array(scales.input)[:, None], array(tokens.y) / array(scales.output)[:, None]
    acts = dense_acts(coder, x)
    errors = ((y - dense_writes(coder, acts)) ** 2).sum(2).mean(0)
    fvu = errors / (array(scales.output_variance) / array(scales.output) ** 2)
    assert metrics.fvu == pytest.approx(fvu.mean(), rel=1e-4)
    assert metrics.l0 == sum((a > 0).sum() for a in acts) / BATCH


def test_the_first_reconstruction_starts_from_the_mean():
    coach = trainer(sparsity=JointTopK(1, anneal_from=1.0))
    bias = coach.coder.b_dec * coach.scales.output[:, None]
    torch.testing.assert_close(bias, coach.scales.output_mean)


def test_k_is_annealed_down_to_k():
    coach = trainer(sparsity=JointTopK(5, anneal_from=6.0, anneal_share=0.5))
    l0 = [m.l0 for m in run(coach, range(40))]
    assert l0[0] > 20
    assert sorted(l0[:20], reverse=True) == l0[:20]
    assert max(l0[20:]) <= 5


def test_the_learning_rate_in_force_is_the_configured_one():
    coach = trainer(warmup_share=0.5, decay_share=0.0)
    before = coach.coder.b_dec.detach().clone()
    assert coach.step(batch(0)).learning_rate == 0
    assert torch.equal(coach.coder.b_dec, before)
    assert coach.step(batch(1)).learning_rate == pytest.approx(0.0005)
    assert (coach.coder.b_dec - before).abs().max().item() == pytest.approx(0.0005, rel=0.1)  # as far as Adam goes


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("side", "named"), [("x", "input"), ("y", "target")])
@pytest.mark.parametrize("sparsity", [JointTopK(12), TopK(4), ReLU(), JumpReLU()], ids=lambda s: type(s).__name__)
def test_what_is_not_a_number_stops_the_training_and_names_the_layer(sparsity, side, named, value):
    coach = trainer(sparsity=sparsity)
    run(coach, range(2))
    before, bad = weights(coach), batch(2)
    getattr(bad, side)[7, 1, 3] = value
    with pytest.raises(UserError, match=f"step 3: layer 1's {named} is not a finite number"):
        coach.step(bad)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(coach), strict=True))
    assert coach.step_number == 2


def test_a_target_that_nobody_writes_to_is_watched_too():
    coach, bad = trainer(Wiring.full(L, first_target=1)), batch(0)
    bad.y[0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="layer 0's target"):
        coach.step(bad)


def test_weights_that_blow_up_are_named_as_the_reconstruction():
    coach = trainer()
    coach.coder.b_dec.data[2] = torch.inf
    with pytest.raises(UserError, match="layer 2's reconstruction"):
        coach.step(batch(0))


@pytest.mark.parametrize(
    ("coefficient", "named"),
    [(1e45, "the penalty is not a finite number"), (1e38, "the gradient of .* is not a finite number")],
)
def test_a_penalty_that_blows_up_is_named_and_leaves_the_weights(coefficient, named):
    coach = trainer(sparsity=ReLU(coefficient))
    coach.step(batch(0))
    before = [parameter.clone() for parameter in coach.coder.parameters()]
    with pytest.raises(UserError, match=named):
        coach.step(batch(1))
    assert all(torch.equal(a, b) for a, b in zip(before, coach.coder.parameters(), strict=True))


@pytest.mark.parametrize("sparsity", [JointTopK(12), JumpReLU(1e-3)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("done", [0, 1, 7])
def test_a_resumed_training_goes_on_bit_for_bit(sparsity, done):
    whole, first = trainer(sparsity=sparsity), trainer(sparsity=sparsity)
    wanted = run(whole, range(12))
    run(first, range(done))
    tensors, counters = first.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    second = trainer(sparsity=sparsity).restore(tensors, counters)
    assert run(second, range(done, 12)) == wanted[done:]
    assert_same_weights(second, whole)
    assert torch.equal(second.density, whole.density)


def test_seeds_give_different_weights_and_the_same_seed_the_same():
    assert_same_weights(trainer(seed=3), trainer(seed=3))
    assert not torch.equal(trainer(seed=3).coder.W_enc[0], trainer(seed=4).coder.W_enc[0])


def sleeper(auxk: AuxK) -> Trainer:
    """Feature 5 of layer 0 has a decoder so short that it is never chosen, and is counted as dead."""
    coach = trainer(auxk=auxk, sparsity=JointTopK(4, anneal_from=1.0), warmup_share=0.0)
    coach.coder.W_dec[0].data[5] *= 1e-4
    coach.density[0, 5] = 0
    return coach


def test_dead_features_are_revived():
    still, revived = sleeper(AuxK(coefficient=0.0)), sleeper(AuxK())
    before = still.coder.W_dec[0][5].clone()
    for coach in (still, revived):
        coach.step(batch(0))
    assert torch.equal(still.coder.W_dec[0][5], before)
    assert revived.coder.W_dec[0][5].norm() > 10 * before.norm()


def test_features_that_do_not_fire_are_counted_as_dead():
    coach = trainer(density_tokens=BATCH, auxk=AuxK(coefficient=0.0))
    coach.coder.b_enc[1].data[:8] = -100.0
    fractions = [m.dead_fraction for m in run(coach, range(12))]
    assert fractions[0] == 0
    assert fractions[-1] >= 8 / 96
    assert coach.density[1, :8].max() < 1e-4


@pytest.mark.parametrize("sparsity", [JointTopK(6), ReLU(), JumpReLU()], ids=lambda s: type(s).__name__)
def test_the_finished_transcoder_works_on_raw_activations(sparsity):
    coach, tokens = trainer(sparsity=sparsity), batch(50)
    run(coach, range(10))
    before = weights(coach)
    finished = coach.finish(tokens)
    acts = [codes.dense() for codes in coach.coder.encode(tokens.x)]
    folded = [codes.dense() for codes in finished.encode(tokens.x)]
    y_hat = coach.coder.decode(finished.encode(tokens.x), tokens.x)
    torch.testing.assert_close(finished(tokens.x), y_hat, atol=1e-4, rtol=1e-4)
    assert sum((a > 0).sum() for a in folded) == pytest.approx(sum(int((a > 0).sum()) for a in acts), abs=4)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(coach), strict=True))
    assert not any(p.requires_grad for p in finished.parameters())
    assert torch.equal(finished.first_write, coach.scales.first_write)


def test_half_precision_activations_are_trained_on_in_full_precision():
    tokens = random_activations(500, L, D)
    halves = Activations(**{**vars(tokens), "x": tokens.x.bfloat16(), "y": tokens.y.bfloat16()})
    coach = trainer()
    coach = Trainer(coach.config, estimate_scales(halves))
    metrics = coach.step(halves[halves.position > 0])
    assert metrics.fvu == pytest.approx(trainer().step(tokens[tokens.position > 0]).fvu, rel=0.05)
    assert coach.finish(halves).b_dec.dtype == torch.float32


def test_a_wiring_for_another_depth_is_refused():
    with pytest.raises(UserError, match="wiring is for 5 layers, the activations have 3"):
        trainer(Wiring.full(5))


def test_a_k_above_the_features_is_refused():
    with pytest.raises(UserError, match="k is 97, but 3 layers of 32 features are only 96"):
        trainer(sparsity=JointTopK(97))
