"""The training step: batches in, a better transcoder out. It has never seen a language model."""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crosslayer.activations.record import Activations
from crosslayer.coders.calibration import calibrate
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.team import ALONE, Team, together
from crosslayer.training.config import TrainConfig
from crosslayer.training.objective import Objective, Outcome, Reconstruction
from crosslayer.training.optimizers import optimizer_state, restore_optimizer, set_rate
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
    terms: dict[str, float]
    """The parts of the loss, by name."""


class Trainer:
    """Trains one transcoder on batches.

    The transcoder works in units in which inputs and targets have norm sqrt(D), by `scales`; `finish` folds the scales
    into the weights.

    Args:
        config: the settings.
        scales: statistics of the tokens to train on.
        objective: what turns transcoder and batch into a loss; reconstruction by default.
        start: a finished transcoder to go on from, instead of random weights; it is changed in place.
        team: the processes that train it together, each on its part of every batch.

    Raises:
        UserError: for settings that do not go together, or with `start`.
    """

    def __init__(
        self,
        config: TrainConfig,
        scales: Scales,
        objective: Objective | None = None,
        start: CrossLayerTranscoder | None = None,
        team: Team = ALONE,
    ):
        n_layers = len(scales.input)
        if config.wiring.n_layers != n_layers:
            raise UserError(f"the wiring is for {config.wiring.n_layers} layers, the activations have {n_layers}")
        self.config, self.scales, self.team = config, scales, team
        self.objective = objective or Reconstruction(scales.output_variance, config.auxk, config.dead_penalty)
        self.coder = _fresh(config, scales, team) if start is None else _from_start(config, scales, start)
        self.optimizers = config.optimizer.build(list(self.coder.parameters()))
        held = (len(self.coder.sources), len(self.coder.held))
        self.density = torch.full(held, 2 * config.dead_density, device=scales.input.device)
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

    def step(self, batch: Any) -> StepMetrics:
        """One optimiser step.

        Raises:
            UserError: when an activation, the loss or a gradient is not a finite number, naming the layer or tensor;
                the state stays as it was.
        """
        self.coder.zero_grad(set_to_none=True)
        dead = self._dead()
        parts = self.objective.split(batch, self.config.micro_batches)
        n_tokens = sum(self.objective.n_tokens(part) for part in parts)
        cut = self.coder.cut.clone()
        try:
            outcomes = [self._accumulate(part, n_tokens, dead) for part in parts]
            self._sum_gradients()
            with together(self.team.everyone):
                self._check_gradients()
        except UserError as error:
            self.coder.cut.copy_(cut)  # which a BatchTopK moves when it encodes
            raise UserError(f"step {self.step_number + 1}: {error}") from None
        rate = self.config.peak_rate(self.coder.d_transcoder) * self.config.schedule(self.progress)
        set_rate(self.optimizers, rate)
        for optimizer in self.optimizers:
            optimizer.step()
        counts = self.team.tokens.sum(torch.stack([outcome.counts for outcome in outcomes]).sum(0))
        self._count(counts, n_tokens)
        n_active, n_dead = self.team.features.sum(torch.stack([counts.sum(), self._dead().sum()])).tolist()
        loss, fvu, *terms = self.team.tokens.sum(_means(outcomes)).tolist()
        return StepMetrics(
            step=self.step_number,
            tokens=self.tokens,
            loss=loss,
            fvu=fvu,
            l0=n_active / n_tokens,
            dead_fraction=n_dead / (len(self.coder.sources) * self.coder.d_transcoder),
            learning_rate=rate,
            terms=dict(zip(outcomes[0].terms, terms, strict=True)),
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
            activations: usable tokens on which TopK is converted to JumpReLU, the same for the whole team.
        """
        coder = deepcopy(self.coder).requires_grad_(False).eval()
        coder.team = self.team.on_the_same_tokens()
        if self.config.calibrate:
            calibrate(coder, activations.x[: self.config.calibration_tokens])
        return coder.fold()

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Everything that the next step depends on: named tensors, and counters."""
        tensors = {f"coder.{name}": tensor.detach() for name, tensor in self.coder.state_dict().items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer_state(self.optimizers).items()}
        tensors |= {f"scales.{name}": value for name, value in vars(self.scales).items()}
        return tensors | {"density": self.density}, self.counters()

    def restore(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> "Trainer":
        """Bring a new trainer of the same settings, in place, to a kept `state`, bit for bit."""
        for name in COUNTERS:
            setattr(self, name, counters[name])
        self.density.copy_(tensors["density"])
        moments = _under("optimizer.", tensors)
        restore_optimizer(self.optimizers, list(self.coder.parameters()), moments)
        self.coder.load_state_dict(_under("coder.", tensors))
        return self

    def _accumulate(self, part: Any, n_tokens: int, dead: Tensor) -> Outcome:
        """Add a part's gradients, by its share of the tokens."""
        with torch.autocast(self.density.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            outcome = self.objective(self.coder, part, self.progress, dead)
        (outcome.loss * (outcome.n_tokens / n_tokens)).backward()
        return outcome.detached()

    def _sum_gradients(self) -> None:
        """What the tokens of all say about a parameter, and, of one that all hold, what all features say."""
        shared = self.coder.held_by_all()
        own = [p for p in self.coder.parameters() if not any(p is other for other in shared)]
        self.team.tokens.sum_gradients(own)
        self.team.everyone.sum_gradients(shared)

    def _check_gradients(self) -> None:
        gradients = [p.grad for p in self.coder.parameters() if p.grad is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            bad = [n for n, p in self.coder.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            name = bad[0] if bad else "all parameters together"
            raise UserError(f"the gradient of {name} is not a finite number; lower the learning rate")

    def _count(self, counts: Tensor, n_tokens: int) -> None:
        keep = 0.5 ** (n_tokens / self.config.density_tokens)
        self.density.mul_(keep).add_(counts / n_tokens, alpha=1 - keep)
        self.tokens += n_tokens
        self.step_number += 1

    def _dead(self) -> Tensor:
        return self.density < self.config.dead_density


def _fresh(config: TrainConfig, scales: Scales, team: Team) -> CrossLayerTranscoder:
    if config.sparsity is None:
        raise UserError("sparsity is None, which keeps that of a start, but there is no start; name a sparsity")
    D = scales.output_mean.shape[1]
    coder = CrossLayerTranscoder(
        config.wiring, D, config.width(D), config.sparsity, config.decoder, config.skip, team=team
    )
    coder = coder.initialise(config.seed).to(scales.input.device)
    coder.input_scale, coder.output_scale = scales.input.clone(), scales.output.clone()
    coder.first_write.copy_(scales.first_write)
    with torch.no_grad():
        columns = coder.sharing.columns
        coder.b_dec.copy_(scales.output_mean.narrow(1, columns.start, len(columns)) / scales.output[:, None])
    return coder


def _from_start(config: TrainConfig, scales: Scales, coder: CrossLayerTranscoder) -> CrossLayerTranscoder:
    wanted = {"wiring": config.wiring, "d_transcoder": config.width(coder.d_model), "skip": config.skip}
    found = {"wiring": coder.wiring, "d_transcoder": coder.d_transcoder, "skip": coder.skip}
    for name, value in wanted.items():
        if found[name] != value:
            raise UserError(f"the start has {name} {found[name]}, the settings {value}; finetuning keeps the start's")
    asked: Any = config.decoder  # of any settings class
    if replace(asked, scale=False) != replace(coder.decoder.settings, scale=False):
        raise UserError(f"the start's decoder is {coder.decoder.settings}, the settings' {asked}; finetuning keeps it")
    if config.sparsity is not None:
        config.sparsity.check(len(coder.sources), coder.d_transcoder)
        coder.sparsity = config.sparsity
        coder.learn_thresholds().thresholds = None
    coder = coder.to(scales.input.device).requires_grad_(True).train()
    coder.first_write.copy_(scales.first_write)
    return coder.unfold(scales.input, scales.output)


def _means(outcomes: list[Outcome]) -> Tensor:
    """The means over tokens of what the parts of a batch measured: loss, fvu, and each term of the first part."""
    total, zero = sum(outcome.n_tokens for outcome in outcomes), torch.zeros(())
    measured = [[o.loss, o.fvu, *(o.terms.get(name, zero) for name in outcomes[0].terms)] for o in outcomes]
    rows = [
        torch.stack([value.double().to(o.loss.device) for value in row]) * (o.n_tokens / total)
        for row, o in zip(measured, outcomes, strict=True)
    ]
    return torch.stack(rows).sum(0)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
