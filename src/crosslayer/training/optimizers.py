"""Optimisers: settings objects that are passed in, and their state as plain named tensors."""

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from crosslayer.errors import UserError
from crosslayer.variants import read_variant, write_variant


@runtime_checkable
class OptimizerSettings(Protocol):
    """Settings that build torch optimisers; the learning rate is set at every step."""

    def build(self, parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        """Optimisers that share these parameters out among them."""
        ...


@dataclass(frozen=True)
class Adam:
    """Adam, fused, with fp32 moments. Kingma and Ba 2015."""

    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.999
    """Decay of the mean of squared gradients."""

    def build(self, parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        """See `OptimizerSettings.build`."""
        return [torch.optim.Adam(parameters, lr=0.0, betas=(self.beta1, self.beta2), fused=True)]


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay, fused. Loshchilov and Hutter 2019."""

    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.999
    """Decay of the mean of squared gradients."""
    weight_decay: float = 0.01
    """Share of the weights lost a step, times the learning rate."""

    def build(self, parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        """See `OptimizerSettings.build`."""
        betas = (self.beta1, self.beta2)
        return [torch.optim.AdamW(parameters, lr=0.0, betas=betas, weight_decay=self.weight_decay, fused=True)]


@dataclass(frozen=True)
class Adam8bit:
    """Adam whose moments take a byte each. Dettmers et al. 2022, in torchao's implementation."""

    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.999
    """Decay of the mean of squared gradients."""

    def build(self, parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        """See `OptimizerSettings.build`.

        Raises:
            UserError: when torchao is not installed.
        """
        if importlib.util.find_spec("torchao") is None:
            raise UserError("optimizer adam-8bit needs torchao; pip install 'crosslayer[adam8bit]' or choose adam")
        torchao: Any = importlib.import_module("torchao.optim")  # takes seconds, so not before it is asked for
        return [torchao.Adam8bit(parameters, lr=torch.tensor(0.0), betas=(self.beta1, self.beta2))]


@dataclass(frozen=True)
class Muon:
    """Muon on matrices, in steps of the size that Adam would take, and Adam on the rest. Jordan et al. 2024.

    A feature's write vectors for all its targets are one row of a matrix [F, T x D].
    """

    momentum: float = 0.95
    """Decay of the mean of gradients."""

    def build(self, parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        """See `OptimizerSettings.build`."""
        matrices = [p for p in parameters if p.ndim > 1]
        muon = _FlatMuon(matrices, lr=0.0, weight_decay=0.0, momentum=self.momentum, adjust_lr_fn="match_rms_adamw")
        return [muon, *Adam().build([p for p in parameters if p.ndim < 2])]


class _FlatMuon(torch.optim.Muon):
    """Muon for parameters of more than two axes, each seen as a matrix of its rows."""

    def __init__(self, parameters: list[nn.Parameter], **settings: Any):
        self.originals = parameters
        super().__init__([nn.Parameter(p.data.view(len(p), -1)) for p in parameters], **settings)

    def step(self, closure: Any = None) -> None:
        for original, matrix in zip(self.originals, self.param_groups[0]["params"], strict=True):
            matrix.grad = None if original.grad is None else original.grad.flatten(1)
        super().step(closure)


OPTIMIZERS: dict[str, type] = {"adam": Adam, "adamw": AdamW, "adam-8bit": Adam8bit, "muon": Muon}


def write_optimizer(optimizer: OptimizerSettings) -> dict[str, Any]:
    """The JSON form of an optimiser's settings."""
    return write_variant(OPTIMIZERS, optimizer)


def read_optimizer(record: dict[str, Any]) -> OptimizerSettings:
    """The settings that a JSON form describes; unknown kinds and settings are errors."""
    return read_variant("optimizer", OPTIMIZERS, record)


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate of the next step."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def optimizer_state(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All moments and counters, those packed in tensor subclasses by their parts."""
    return {
        f"{place}.{key}": tensor
        for place, state in _states(optimizers)
        for name, value in state.items()
        for key, tensor in _plain(name, value)
    }


@torch.no_grad()
def restore_optimizer(
    optimizers: list[torch.optim.Optimizer], parameters: list[nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Bring fresh optimisers of these parameters to a state that `optimizer_state` gave.

    A step of length 0 makes the places that the tensors are then copied to.
    """
    if not tensors:
        return
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    for place, state in _states(optimizers):
        for name, value in list(state.items()):
            for key, tensor in _plain(name, value):
                if f"{place}.{key}" in tensors:
                    tensor.copy_(tensors[f"{place}.{key}"])
                else:  # a parameter that never had a gradient
                    del state[name]


def _states(optimizers: list[torch.optim.Optimizer]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The state of every parameter, with a name for its place."""
    for number, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            yield f"{number}.{index}", optimizer.state.get(parameter, {})


def _plain(name: str, value: Any) -> list[tuple[str, Tensor]]:
    """A state tensor under its name, or the tensors that it is made of."""
    if type(value) is Tensor or type(value) is nn.Parameter:
        return [(name, value)]
    parts, _ = value.__tensor_flatten__()
    return [(f"{name}.{part}", getattr(value, part)) for part in parts]
