"""Descent in the strengths of all writes of all features at once: how much of each is taken away, from nothing to all.

Axes: S sources, F features, T targets.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.hallucination.suppress.objective import Objective
from crosslayer.hallucination.suppress.selection import Chosen, Step, measured
from crosslayer.hallucination.suppress.strengths import as_edits, no_strengths
from crosslayer.replacement.where import Part, Where

BETAS = (0.8, 0.95)
"""Of Adam: shorter memories than usual, as there are few steps."""


@dataclass(frozen=True, kw_only=True)
class Descent:
    """Adam on the objective and a penalty on the sum of all strengths, which stay within 0 and 1.

    Each feature has a strength for each layer that it writes to. Every step sees hallucinated mentions and clean
    responses that are drawn for it. After half of the steps those features stay that have lowered the objective most,
    to first order, step by step and over all their writes; the others are let go.

    Raises:
        UserError: for numbers below what they can be.
    """

    where: Where = Part("text")  # noqa: RUF009
    steps: int = 100
    rate: float = 0.1
    """Of the first step; it falls linearly towards 0."""
    penalty: float = 0.001
    """Of a write that is taken away wholly, beside a logit of margin."""
    at_most: int = 300
    """Features in the end."""
    drawn: int = 1
    """Batches of hallucinated captions, of hallucinated answers and of clean responses that a step sees."""
    seed: int = 0
    """Of which these are."""

    def __post_init__(self):
        if min(self.steps, self.at_most, self.drawn) < 1 or min(self.rate, self.penalty) < 0:
            raise UserError(
                f"steps, at_most and drawn are {self.steps}, {self.at_most}, {self.drawn}, rate and penalty "
                f"{self.rate}, {self.penalty}; choose at least 1 of each of the former, and the latter from 0 on"
            )

    def choose(self, objective: Objective, coder: CrossLayerTranscoder) -> Chosen:
        """See `Strategy.choose`."""
        strengths = no_strengths(coder)
        lowered, stay = torch.zeros_like(strengths[..., :1]), torch.ones_like(strengths[..., :1])
        optimizer = torch.optim.Adam([strengths], lr=self.rate, betas=BETAS)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.steps)
        generator, path = torch.Generator().manual_seed(self.seed), []
        bar = tqdm(range(self.steps), unit="step", desc="choose strengths", disable=None, leave=False)
        for step in bar:
            terms, gradient = objective.gradient(coder, strengths, self.where, objective.drawn(self.drawn, generator))
            path.append(Step(tried=_told(strengths), terms=terms, kept=False))
            bar.set_postfix(objective=f"{terms.value:.3f}")
            before, strengths.grad = strengths.clone(), gradient + self.penalty
            optimizer.step()
            schedule.step()
            strengths.clamp_(0, 1).mul_(stay)
            lowered -= (gradient * (strengths - before)).sum(2, keepdim=True)
            if step == self.steps // 2:
                stay = _largest(lowered, self.at_most)
                strengths.mul_(stay)
        edits = as_edits(coder, strengths, self.where)
        path.append(Step(tried=_told(strengths), terms=measured(objective, coder, edits), kept=True))
        return Chosen(edits=edits, path=tuple(path))


def _largest(values: Float[Tensor, "S F 1"], n: int) -> Float[Tensor, "S F 1"]:
    """1 for each of the n largest, 0 for the others."""
    found = values.flatten().topk(min(n, values.numel())).indices
    return torch.zeros_like(values).flatten().index_fill(0, found, 1.0).view_as(values)


def _told(strengths: Float[Tensor, "S F T"]) -> str:
    writes = strengths > 0
    return f"{int(writes.sum())} writes of {int(writes.any(2).sum())} features, {float(strengths.sum()):.1f} in all"
