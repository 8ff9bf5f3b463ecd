"""Dense variants, held down by a penalty: gradients reach inactive features too."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crosslayer.coders.codes import Codes, DenseCodes
from crosslayer.coders.sparsity.protocol import Encoded, Encoder
from crosslayer.errors import UserError
from crosslayer.team import Places


class Penalised:
    """Base of the variants whose activation is a function of the pre-activation alone."""

    def check(self, n_sources: int, n_features: int) -> None:
        """See `Sparsity.check`: any width will do."""

    def budget(self, n_sources: int, n_features: int) -> int:
        """See `Sparsity.budget`: all."""
        return n_sources * n_features

    def at(self, progress: float) -> Any:
        """See `Sparsity.at`: the same throughout."""
        return self

    def activation(self, coder: Encoder, i: int, pre: Tensor) -> Tensor:
        """Activations [N, F] of source number i, with gradients."""
        raise NotImplementedError

    def encode(self, coder: Encoder, x: Tensor, places: Places) -> Encoded:
        """See `Sparsity.encode`."""
        pre = coder.preactivations(x)
        codes: list[Codes] = [DenseCodes(self.activation(coder, i, p)) for i, p in enumerate(pre.unbind(1))]
        return Encoded(x, pre, codes, places)

    def encode_layer(self, coder: Encoder, i: int, x: Tensor) -> tuple[Tensor, Codes]:
        """See `Sparsity.encode_layer`."""
        pre = coder.layer_preactivations(i, x)
        return pre, DenseCodes(self.activation(coder, i, pre))


@dataclass(frozen=True)
class ReLU(Penalised):
    """Every positive pre-activation, held down by an L1 penalty weighted with the decoder norms."""

    coefficient: float = 1e-3
    """Weight of the penalty, ramped linearly over the run."""

    def activation(self, coder: Encoder, i: int, pre: Tensor) -> Tensor:
        """See `Penalised.activation`."""
        return pre.relu()

    def penalty(self, coder: Encoder, encoded: Encoded, progress: float) -> Tensor:
        """Mean over tokens of sum ||W_dec|| a."""
        total = (encoded.pre.relu() * coder.decoder_norms()).sum() / encoded.places.total
        return self.coefficient * progress * coder.team.features.sum(total)

    def thresholds(self, coder: Encoder) -> Tensor:
        """See `Sparsity.thresholds`: zero."""
        return torch.zeros_like(torch.stack([b.detach() for b in coder.b_enc]))


@dataclass(frozen=True)
class JumpReLU(Penalised):
    """Features above a threshold of their own, learned with a straight-through estimator, and a tanh penalty.

    Source: "Circuit Tracing" (Anthropic, 2025), appendix on CLT training; Rajamanoharan et al. 2024, "Jumping ahead",
    whose appendix has the quadratic penalty, which pulls towards a wanted L0 instead of towards nothing. A trained or
    calibrated coder keeps its thresholds as a buffer; the settings then no longer matter.
    """

    coefficient: float = 2e-3
    """Weight of the tanh penalty, ramped linearly over the run."""
    steepness: float = 4.0
    """c in tanh(c ||W_dec|| a)."""
    bandwidth: float = 1.0
    """Width of the rectangle kernel of the threshold's gradient, on normalised inputs."""
    initial_threshold: float = 0.03
    """Threshold of every feature at the start."""
    preactivation_coefficient: float = 3e-6
    """Weight of the loss that lifts features which stay below their threshold."""
    quadratic_coefficient: float = 0.0
    """Weight of the quadratic penalty (L0 / target_l0 - 1)^2; 0 leaves it out."""
    target_l0: float = 64.0
    """Active features a token, over all layers, that the quadratic penalty pulls to."""

    def __post_init__(self):
        if min(self.bandwidth, self.initial_threshold, self.target_l0) <= 0:
            raise UserError(
                f"bandwidth is {self.bandwidth}, initial_threshold {self.initial_threshold} and target_l0 "
                f"{self.target_l0}; choose more than 0"
            )

    def activation(self, coder: Encoder, i: int, pre: Tensor) -> Tensor:
        """See `Penalised.activation`."""
        return _JumpReLU.apply(pre, coder.log_threshold[i].exp(), self.bandwidth)

    def penalty(self, coder: Encoder, encoded: Encoded, progress: float) -> Tensor:
        """Mean over tokens of sum tanh(c ||W_dec|| a), the quadratic pull, and the pre-activation loss."""
        norms = coder.decoder_norms()
        acts = torch.stack([codes.dense() for codes in encoded.codes], 1)
        thresholds = torch.stack(list(coder.log_threshold)).exp()
        n, team = encoded.places.total, coder.team
        tanh = (self.steepness * norms * acts).tanh().sum() / n
        below = ((thresholds - encoded.pre).relu() * norms.detach()).sum() / n
        penalty = self.coefficient * progress * tanh + self.preactivation_coefficient * below
        penalty = team.features.sum(penalty)
        if not self.quadratic_coefficient:
            return penalty
        l0 = team.everyone.sum(_Step.apply(encoded.pre, thresholds, self.bandwidth).sum()) / n
        pull = (l0 / self.target_l0 - 1).square()
        here = len(encoded.x) / n  # all look at the same pull: each has its part of the value, and the whole gradient
        return penalty + self.quadratic_coefficient * progress * (pull + (here - 1) * pull.detach())

    def thresholds(self, coder: Encoder) -> Tensor:
        """See `Sparsity.thresholds`: those learned."""
        return torch.stack(list(coder.log_threshold)).exp()


class _JumpReLU(torch.autograd.Function):
    """pre where pre > threshold, else 0; the threshold's gradient through a rectangle kernel."""

    @staticmethod
    def forward(ctx, pre, thresholds, bandwidth):
        ctx.save_for_backward(pre, thresholds)
        ctx.bandwidth = bandwidth
        return pre * (pre > thresholds)

    @staticmethod
    def backward(ctx, *grads):
        pre, thresholds = ctx.saved_tensors
        inside = (pre - thresholds).abs() < ctx.bandwidth / 2
        grad_thresholds = (-thresholds / ctx.bandwidth * inside * grads[0]).sum(0)
        return grads[0] * (pre > thresholds), grad_thresholds, None


class _Step(torch.autograd.Function):
    """1 where pre > threshold, else 0; the gradients of both through the rectangle kernel."""

    @staticmethod
    def forward(ctx, pre, thresholds, bandwidth):
        ctx.save_for_backward(pre, thresholds)
        ctx.bandwidth = bandwidth
        return (pre > thresholds).to(pre.dtype)

    @staticmethod
    def backward(ctx, *grads):
        pre, thresholds = ctx.saved_tensors
        inside = (pre - thresholds).abs() < ctx.bandwidth / 2
        grad_thresholds = -(inside * grads[0]).sum(0) / ctx.bandwidth
        return None, grad_thresholds, None
