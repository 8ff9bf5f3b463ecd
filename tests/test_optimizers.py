"""Optimisers: their steps against definitions, and a state that goes on bit for bit."""

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

from crosslayer import Adam, Adam8bit, AdamW, Muon, UserError
from crosslayer.training.optimizers import (
    OPTIMIZERS,
    OptimizerSettings,
    optimizer_state,
    read_optimizer,
    restore_optimizer,
    set_rate,
    write_optimizer,
)
from making import array

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
warns = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch
KINDS = [Adam(), AdamW(), Muon(), pytest.param(Adam8bit(), marks=(needs_torchao, warns))]
SHAPES = [(12,), (16, 9), (7, 3, 5), (16, 512)]
"""A bias, a matrix, write vectors for three targets, and one that is large enough for moments of 8 bits."""
IDLE, WOKEN = 1, 6
"""A parameter that has no gradient before this step."""

kinds = pytest.mark.parametrize("settings", KINDS, ids=lambda s: type(s).__name__)


def random(number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(tensor) for tensor in random(0)]


def step(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    set_rate(optimizers, rate)
    for optimizer in optimizers:
        optimizer.step()


def run(optimizers: list[torch.optim.Optimizer], weights: list[nn.Parameter], numbers: range) -> None:
    """Steps whose gradients and rates follow from their numbers."""
    for number in numbers:
        for i, (weight, gradient) in enumerate(zip(weights, random(number + 1), strict=True)):
            weight.grad = None if i == IDLE and number < WOKEN else gradient
        step(optimizers, 0.01 * (1 + number % 3))


def after(settings: OptimizerSettings, weight: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """A parameter after a step of 0.1 with each gradient; a bias is there beside it."""
    parameter = nn.Parameter(weight.clone())
    optimizers = settings.build([parameter, nn.Parameter(torch.zeros(1))])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        step(optimizers, 0.1)
    return parameter.detach()


# A state that goes on.


@pytest.mark.parametrize("done", [0, 1, 5, 7])
@kinds
def test_a_restored_optimiser_goes_on_bit_for_bit(settings, done):
    whole, first, second = parameters(), parameters(), parameters()
    run(settings.build(whole), whole, range(9))
    stopped, fresh = settings.build(first), settings.build(second)
    run(stopped, first, range(done))
    restore_optimizer(fresh, second, {name: tensor.clone() for name, tensor in optimizer_state(stopped).items()})
    for ours, theirs in zip(second, first, strict=True):
        ours.data.copy_(theirs)
    run(fresh, second, range(done, 9))
    assert all(torch.equal(a, b) for a, b in zip(second, whole, strict=True))


@kinds
def test_what_is_restored_is_the_state_and_nothing_else(settings):
    first, second = parameters(), parameters()
    stopped, fresh = settings.build(first), settings.build(second)
    run(stopped, first, range(3))
    restore_optimizer(fresh, second, optimizer_state(stopped))
    ours, theirs = optimizer_state(fresh), optimizer_state(stopped)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert all(torch.equal(parameter, start) for parameter, start in zip(second, random(0), strict=True))
    assert all(parameter.grad is None for parameter in second)


def test_a_parameter_without_gradients_has_no_state():
    weights = parameters()
    optimizers = Adam().build(weights)
    run(optimizers, weights, range(3))
    assert {name.split(".")[1] for name in optimizer_state(optimizers)} == {"0", "2", "3"}
    assert torch.equal(weights[IDLE], random(0)[IDLE])


# The steps.


@pytest.mark.parametrize("settings", [Adam(), Adam(0.5, 0.9), AdamW(), AdamW(0.8, 0.95, 0.5)], ids=str)
def test_adam_and_adamw_are_their_definitions(settings):
    wanted, mean, square, decay = array(random(0)[2]), 0.0, 0.0, getattr(settings, "weight_decay", 0.0)
    gradients = [random(number)[2] for number in (1, 2, 3)]
    for number, gradient in enumerate(map(array, gradients), 1):
        mean = settings.beta1 * mean + (1 - settings.beta1) * gradient
        square = settings.beta2 * square + (1 - settings.beta2) * gradient**2
        steps = (mean / (1 - settings.beta1**number)) / (np.sqrt(square / (1 - settings.beta2**number)) + 1e-8)
        wanted = wanted - 0.1 * decay * wanted - 0.1 * steps
    assert array(after(settings, random(0)[2], gradients)) == pytest.approx(wanted, abs=1e-5)


def test_adamw_decays_what_has_no_gradient_to_follow():
    weight = random(0)[1]
    still = [torch.zeros_like(weight)] * 3
    assert torch.equal(after(Adam(), weight, still), weight)
    torch.testing.assert_close(after(AdamW(weight_decay=0.5), weight, still), weight * 0.95**3)
    assert torch.equal(after(Muon(), weight, still), weight)


@pytest.mark.parametrize("shape", [(7, 3, 5), (16, 9), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("momentum", [0.95, 0.5])
def test_muon_sees_write_vectors_for_all_targets_as_one_row(shape, momentum):
    weight, *gradients = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    matrix = nn.Parameter(weight.flatten(1).clone())
    adjusted = {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0}
    optimizer = torch.optim.Muon([matrix], lr=0.1, momentum=momentum, **adjusted)
    for gradient in gradients:
        matrix.grad = gradient.flatten(1)
        optimizer.step()
    assert torch.equal(after(Muon(momentum), weight, gradients), matrix.detach().view(shape))


def test_a_step_of_muon_is_about_orthogonal_and_as_long_as_adams():
    gradient = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(1))
    moved = array(-after(Muon(), torch.zeros(7, 3, 5), [gradient])).reshape(7, 15)
    left, _, right = np.linalg.svd(array(gradient).reshape(7, 15), full_matrices=False)
    in_its_axes = left.T @ moved @ right.T / (0.1 * 0.2 * 15**0.5)
    assert np.diag(in_its_axes) == pytest.approx(np.ones(7), abs=0.4)
    assert in_its_axes - np.diag(np.diag(in_its_axes)) == pytest.approx(np.zeros((7, 7)), abs=0.1)


def test_muon_leaves_vectors_to_adam():
    bias, gradient = random(0)[0], random(1)[0]
    muon, adam = nn.Parameter(bias.clone()), nn.Parameter(bias.clone())
    for parameter, settings in ((muon, Muon()), (adam, Adam())):
        optimizers = settings.build([parameter, nn.Parameter(torch.zeros(2, 2))])
        parameter.grad = gradient.clone()
        step(optimizers, 0.1)
    assert torch.equal(muon, adam)
    assert not torch.equal(muon, bias)


# Rates and settings.


def test_the_rate_reaches_every_group_as_a_number_or_a_tensor():
    one, two, three = parameters()[:3]
    groups = torch.optim.SGD([{"params": [one]}, {"params": [two], "lr": torch.tensor(0.5)}], lr=0.25)
    rate = groups.param_groups[1]["lr"]
    optimizers = [groups, *Adam().build([three])]
    set_rate(optimizers, 0.125)
    assert [float(group["lr"]) for o in optimizers for group in o.param_groups] == [0.125] * 3
    assert groups.param_groups[1]["lr"] is rate  # a compiled step reads this very tensor


@pytest.mark.parametrize("settings", [Adam(0.5, 0.6), AdamW(0.1, 0.2, 0.3), Adam8bit(0.7, 0.8), Muon(0.4)], ids=str)
def test_settings_survive_json(settings):
    assert read_optimizer(write_optimizer(settings)) == settings


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"kind": "sgd"}, f"optimizer is 'sgd'; choose one of {', '.join(OPTIMIZERS)}"),
        ({}, "optimizer is None; choose one of adam, "),
        ({"kind": "muon", "beta1": 0.9}, "optimizer muon has no setting beta1; its settings are momentum"),
    ],
)
def test_unknown_kinds_and_settings_are_named(record, message):
    with pytest.raises(UserError, match=message):
        read_optimizer(record)


def test_a_missing_torchao_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"adam-8bit needs torchao; pip install .* or choose adam"):
        Adam8bit().build(parameters())
