"""Measures of fidelity, as pure functions of tensors. Axes: B prompts, P positions, V vocabulary, G generated."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import bootstrap
from torch import Tensor

REPEATED_NGRAM = 4


@dataclass(frozen=True)
class Figure:
    """A measured figure with its 95 % bootstrap interval over prompts; all NaN when it could not be measured."""

    value: float
    low: float
    high: float

    def __str__(self):
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(numerators: Tensor, denominators: Tensor, *, resamples: int = 2000) -> Figure:
    """sum(numerators) / sum(denominators) over prompts [B], with a percentile bootstrap interval over prompts."""
    pairs = np.stack([numerators.double().cpu().numpy(), denominators.double().cpu().numpy()])
    pairs = pairs[:, pairs[1] != 0]
    if pairs.shape[1] == 0 or not np.isfinite(pairs).all():
        return Figure(float("nan"), float("nan"), float("nan"))
    value = float(pairs[0].sum() / pairs[1].sum())
    if pairs.shape[1] == 1:
        return Figure(value, float("nan"), float("nan"))

    def statistic(top, bottom, axis):
        return top.sum(axis) / bottom.sum(axis)

    drawn = bootstrap(pairs, statistic, paired=True, vectorized=True, n_resamples=resamples, method="percentile", rng=0)
    return Figure(value, float(drawn.confidence_interval.low), float(drawn.confidence_interval.high))


def top1(logits: Float[Tensor, "B P V"]) -> Int[Tensor, "B P"]:
    """Most likely next token at each position."""
    return logits.argmax(-1)


def cross_entropy(logits: Float[Tensor, "B P V"], following: Int[Tensor, "B P"]) -> Float[Tensor, "B P"]:
    """Cross-entropy of the following token at each position, in nats."""
    return torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), following, reduction="none")


def kl(original: Float[Tensor, "B P V"], replacement: Float[Tensor, "B P V"]) -> Float[Tensor, "B P"]:
    """KL(original || replacement) of the next-token distributions at each position, in nats."""
    log_p, log_q = original.float().log_softmax(-1), replacement.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def hesitant(logits: Float[Tensor, "B P V"], following: Int[Tensor, "B P"]) -> Bool[Tensor, "B P"]:
    """The filter of "Circuit Tracing" (Anthropic, 2025): the model is right, with less than 80 % confidence."""
    confidence, guess = logits.float().softmax(-1).max(-1)
    return (guess == following) & (confidence < 0.8)


def generation_match(original: Sequence[int], replacement: Sequence[int]) -> tuple[int, int]:
    """Tokens of the original's greedy continuation that the replacement's repeats position by position, and all."""
    return sum(a == b for a, b in zip(original, replacement, strict=False)), len(original)


def repetition(tokens: Sequence[int]) -> tuple[int, int]:
    """Repeated 4-grams of a continuation, and all its 4-grams (seq-rep-4; Welleck et al. 2020, section 6.1)."""
    n = REPEATED_NGRAM
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(grams) - len(set(grams)), len(grams)
