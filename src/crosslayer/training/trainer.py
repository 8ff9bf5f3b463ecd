"""The training step: batches of activations in, a better transcoder out. It has never seen a language model."""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from crosslayer.activations.record import Activations
from crosslayer.coders.calibration import calibrate
from crosslayer.coders.sparsity import JointTopK, JumpReLU, TopK
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.training.config import TrainConfig
from crosslayer.training.objective import layer_fvu
from crosslayer.training.scales import Scales

COUNTERS = ("step_number", "tokens", "first_left_out", "outliers_left_out")
"""What a trainer counts: steps, tokens trained on, and tokens left out as first positions or norm outliers."""


@dataclass(frozen=True)
class StepMetrics:
    """What one step measured, on its own batch."""

    step: int
    tokens: int
    loss: float
    fvu: float
    """Mean over layers."""
    l0: float
    """Active features a token, summed over layers."""
    dead_fraction: float
    learning_rate: float


class Trainer:
    """Trains one transcoder on batches of activations.

    Inputs and targets are divided by `scales` on the way in; `finish` folds the scales into the weights.
    """

    def __init__(self, config: TrainConfig, scales: Scales):
        L, D = scales.output_mean.shape
        if config.wiring.n_layers != L:
            raise UserError(f"the wiring is for {config.wiring.n_layers} layers, the activations have {L}")
        self.config, self.scales = config, scales
        device = scales.input.device
        coder = CrossLayerTranscoder(config.wiring, D, config.width(D), config.sparsity)
        self.coder = coder.initialise(config.seed).to(device)
        with torch.no_grad():
            self.coder.b_dec.copy_(scales.output_mean / scales.output[:, None])
        self.variance = scales.output_variance / scales.output.square()
        self.optimizer = torch.optim.Adam(self.coder.parameters(), lr=0.0, fused=True)
        S, F = len(self.coder.sources), self.coder.d_transcoder
        self.density = torch.full((S, F), 2 * config.dead_density, device=device)
        self.step_number, self.tokens = 0, 0
        self.first_left_out, self.outliers_left_out = 0, 0

    @property
    def progress(self) -> float:
        """Share of the training done, 0 to 1."""
        return min(1.0, self.tokens / self.config.tokens)

    @property
    def finished(self) -> bool:
        """Whether all tokens were seen."""
        return self.tokens >= self.config.tokens

    def step(self, batch: Activations) -> StepMetrics:
        """One optimiser step.

        Raises:
            UserError: when an activation, the loss or a gradient is not a finite number, naming the layer or tensor;
                the weights stay as they were.
        """
        x = batch.x / self.scales.input[:, None]
        y = batch.y / self.scales.output[:, None]
        encoded = self.coder.encode_for_training(x, self.progress)
        y_hat = self.coder.decode(encoded.codes, len(batch))
        fvu = layer_fvu(y, y_hat, self.variance)
        penalty = self.config.sparsity.penalty(self.coder, encoded, self.progress)
        auxiliary = self.config.auxk.loss(self.coder, x, encoded.pre, y - y_hat, self._dead())
        loss = fvu.mean() + penalty + auxiliary
        if not (loss.isfinite() and x.sum().isfinite()):  # TopK passes over inputs that are not a number
            raise UserError(self._diagnosis(x, y, fvu))
        rate = self._update(loss)
        counts = torch.stack([codes.counts() for codes in encoded.codes])
        self._count(counts, len(batch))
        return StepMetrics(
            step=self.step_number,
            tokens=self.tokens,
            loss=loss.item(),
            fvu=fvu.mean().item(),
            l0=counts.sum().item() / len(batch),
            dead_fraction=self._dead().float().mean().item(),
            learning_rate=rate,
        )

    def leave_out(self, n_first: int, n_outliers: int) -> None:
        """Count tokens that the stream kept from training."""
        self.first_left_out += n_first
        self.outliers_left_out += n_outliers

    def counters(self) -> dict[str, int]:
        """What was counted so far, by name."""
        return {name: getattr(self, name) for name in COUNTERS}

    def finish(self, activations: Activations) -> CrossLayerTranscoder:
        """A finished copy of the transcoder, for raw activations: thresholds fixed, scales folded in.

        Args:
            activations: usable tokens on which TopK is converted to JumpReLU.
        """
        coder = deepcopy(self.coder).requires_grad_(False).eval()
        x = activations.x[: self.config.calibration_tokens] / self.scales.input[:, None]
        if isinstance(self.config.sparsity, JointTopK | TopK):
            calibrate(coder, x)
        elif isinstance(self.config.sparsity, JumpReLU):
            coder.with_thresholds(torch.stack(list(coder.log_threshold)).exp())
        coder.fold(self.scales.input, self.scales.output)
        coder.first_write.copy_(self.scales.first_write)
        return coder

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Everything that the next step depends on: named tensors, and counters."""
        tensors = {f"coder.{name}": p.detach() for name, p in self.coder.named_parameters()}
        for name, parameter in self.coder.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        tensors |= {f"scales.{name}": value for name, value in vars(self.scales).items()}
        return tensors | {"density": self.density}, self.counters()

    @classmethod
    def resume(cls, config: TrainConfig, tensors: dict[str, Tensor], counters: dict[str, int]) -> "Trainer":
        """A trainer that goes on from `state`, bit for bit."""
        names = Scales.__dataclass_fields__
        trainer = cls(config, Scales(**{name: tensors[f"scales.{name}"] for name in names}))
        for name in COUNTERS:
            setattr(trainer, name, counters[name])
        trainer.density = tensors["density"]
        for name, parameter in trainer.coder.named_parameters():
            parameter.data.copy_(tensors[f"coder.{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            if f"optimizer.step.{name}" in tensors:
                trainer.optimizer.state[parameter] = {key: tensors[f"optimizer.{key}.{name}"] for key in keys}
        return trainer

    def _update(self, loss: Tensor) -> float:
        rate = self.config.peak_rate(self.coder.d_transcoder) * self.config.schedule(self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._check_gradients()
        self.optimizer.step()
        return rate

    def _check_gradients(self) -> None:
        gradients = [p.grad for p in self.coder.parameters() if p.grad is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            bad = [n for n, p in self.coder.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            name = bad[0] if bad else "all parameters together"
            raise UserError(
                f"step {self.step_number + 1}: the gradient of {name} is not a finite number; lower the learning rate"
            )

    def _count(self, counts: Tensor, n_tokens: int) -> None:
        keep = 0.5 ** (n_tokens / self.config.density_tokens)
        self.density.mul_(keep).add_(counts / n_tokens, alpha=1 - keep)
        self.tokens += n_tokens
        self.step_number += 1

    def _dead(self) -> Tensor:
        return self.density < self.config.dead_density

    def _diagnosis(self, x: Tensor, y: Tensor, fvu: Tensor) -> str:
        for what, per_layer in (("input", x.sum((0, 2))), ("target", y.sum((0, 2))), ("reconstruction", fvu)):
            if not per_layer.isfinite().all():
                layer = int((~per_layer.isfinite()).nonzero()[0])
                return f"step {self.step_number + 1}: layer {layer}'s {what} is not a finite number; training stopped"
        return f"step {self.step_number + 1}: the penalty is not a finite number; lower its coefficient"
