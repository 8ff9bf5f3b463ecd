"""Sparsity: which features of a token count as active. Each variant is an object that is passed in.

Axes: N tokens, S source layers, F features a layer. `norms` are the lengths of a feature's decoder rows over all
its targets, so that a feature is judged by what it writes and not by how its scale is split between encoder and
decoder.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosslayer.coders.codes import Codes, DenseCodes, Pattern, encode_active
from crosslayer.errors import UserError


@runtime_checkable
class Encoder(Protocol):
    """What a sparsity needs of a coder: per-source encoder weights, thresholds and decoder norms."""

    W_enc: torch.nn.ParameterList
    b_enc: torch.nn.ParameterList
    log_threshold: torch.nn.ParameterList
    sources: tuple[int, ...]

    def preactivations(self, x: Tensor) -> Tensor:
        """[N, S, F] encoder outputs before any non-linearity."""
        ...

    def decoder_norms(self) -> Tensor:
        """[S, F] length of a feature's decoder rows over all its targets."""
        ...


@dataclass(frozen=True)
class Encoded:
    """One batch, encoded: the pre-activations [N, S, F] and the codes of each source."""

    pre: Float[Tensor, "N S F"]
    codes: list[Codes]


@runtime_checkable
class Sparsity(Protocol):
    """Decides which features are active, in training and in a replacement model."""

    def check(self, n_sources: int, n_features: int) -> None:
        """Raise UserError where this sparsity cannot work on S layers of F features."""
        ...

    def at(self, progress: float) -> "Sparsity":
        """The sparsity to use at `progress` (0 to 1) of the training."""
        ...

    def encode(self, coder: Encoder, x: Float[Tensor, "N L D"]) -> Encoded:
        """Encode all layers of N tokens, with gradients for training."""
        ...

    def active(self, pre: Float[Tensor, "N F"], threshold: Tensor | None) -> Bool[Tensor, "N F"]:
        """The mask of active features of one layer seen alone, as a replacement model sees it."""
        ...

    def penalty(self, coder: Encoder, encoded: Encoded, progress: float) -> Tensor | float:
        """What is added to the loss; a mean over tokens, never a sum over the batch."""
        ...


@dataclass(frozen=True)
class _LargestK:
    """What the TopK variants share: k, its annealing, and no need of a penalty."""

    k: int
    """Active features a token: over all layers (`JointTopK`) or in each (`TopK`)."""
    anneal_from: float = 6.0
    """K starts at this multiple of k ..."""
    anneal_share: float = 0.2
    """... and falls to k over this share of the training."""

    def __post_init__(self):
        if self.k < 1:
            raise UserError(f"k is {self.k}; choose at least 1")
        if self.anneal_from < 1 or not 0 <= self.anneal_share <= 1:
            raise UserError(
                f"anneal_from is {self.anneal_from} and anneal_share {self.anneal_share}; "
                "choose anneal_from >= 1 and anneal_share from 0 to 1"
            )

    def at(self, progress: float) -> Any:
        """See `Sparsity.at`: k falls geometrically."""
        left = max(0.0, 1 - progress / self.anneal_share) if self.anneal_share else 0.0
        return replace(self, k=round(self.k * self.anneal_from**left))

    def penalty(self, coder: Encoder, encoded: Encoded, progress: float) -> float:
        """None is needed."""
        return 0.0


@dataclass(frozen=True)
class JointTopK(_LargestK):
    """The k largest features of a token over *all* layers together, by activation x decoder norm.

    The number per layer stays free, as use grows with depth. No layer can be encoded alone, so a coder trained with
    it is converted to JumpReLU (`crosslayer.coders.calibration`) before it replaces anything.
    """

    def check(self, n_sources: int, n_features: int) -> None:
        """See `Sparsity.check`."""
        _check_available(self.k, n_sources * n_features, f"{n_sources} layers of {n_features} features")

    def encode(self, coder: Encoder, x: Tensor) -> Encoded:
        """See `Sparsity.encode`."""
        with torch.no_grad():
            pre = coder.preactivations(x)
            scores = (pre * coder.decoder_norms()).flatten(1)
            top = scores.topk(min(self.k, scores.shape[1]), sorted=False)
            patterns = split_by_source(top.indices, top.values > 0, pre.shape[1], pre.shape[2])
        return Encoded(pre, encode_patterns(coder, x, pre, patterns))

    def active(self, pre: Tensor, threshold: Tensor | None) -> Tensor:
        """Refused: a joint choice needs all layers."""
        raise UserError(
            "joint TopK cannot encode one layer alone; calibrate the transcoder to JumpReLU thresholds first"
        )


@dataclass(frozen=True)
class TopK(_LargestK):
    """The k largest features of each layer."""

    def check(self, n_sources: int, n_features: int) -> None:
        """See `Sparsity.check`."""
        _check_available(self.k, n_features, f"a layer of {n_features} features")

    def encode(self, coder: Encoder, x: Tensor) -> Encoded:
        """See `Sparsity.encode`."""
        with torch.no_grad():
            pre = coder.preactivations(x)
            scores = pre * coder.decoder_norms()
            top = scores.topk(min(self.k, scores.shape[2]), sorted=False)
            kept = zip(top.indices.unbind(1), top.values.unbind(1), strict=True)
            patterns = [_pattern(features, scores > 0, pre.shape[2]) for features, scores in kept]
        return Encoded(pre, encode_patterns(coder, x, pre, patterns))

    def active(self, pre: Tensor, threshold: Tensor | None) -> Tensor:
        """See `Sparsity.active`; here the plain activation ranks, as the layer is alone."""
        top = pre.relu().topk(min(self.k, pre.shape[1]), sorted=False)
        return torch.zeros_like(pre, dtype=torch.bool).scatter_(1, top.indices, top.values > 0)


@dataclass(frozen=True)
class ReLU:
    """Every positive pre-activation, held down by an L1 penalty weighted with the decoder norms."""

    coefficient: float = 1e-3
    """Weight of the penalty, ramped linearly over the run."""

    def check(self, n_sources: int, n_features: int) -> None:
        """Any width will do."""

    def at(self, progress: float) -> "ReLU":
        """See `Sparsity.at`."""
        return self

    def encode(self, coder: Encoder, x: Tensor) -> Encoded:
        """See `Sparsity.encode`."""
        pre = coder.preactivations(x)
        return Encoded(pre, [DenseCodes(acts) for acts in pre.relu().unbind(1)])

    def active(self, pre: Tensor, threshold: Tensor | None) -> Tensor:
        """See `Sparsity.active`."""
        return pre > 0

    def penalty(self, coder: Encoder, encoded: Encoded, progress: float) -> Tensor:
        """Mean over tokens of sum ||W_dec|| a."""
        return self.coefficient * progress * (encoded.pre.relu() * coder.decoder_norms()).sum((1, 2)).mean()


@dataclass(frozen=True)
class JumpReLU:
    """Features above a threshold of their own, learned with a straight-through estimator, and a tanh penalty.

    Source: "Circuit Tracing" (Anthropic, 2025), appendix on CLT training, and Rajamanoharan et al. 2024. A trained
    or calibrated coder keeps its thresholds as buffers; `coefficient` then no longer matters.
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

    def __post_init__(self):
        if min(self.bandwidth, self.initial_threshold) <= 0:
            raise UserError(
                f"bandwidth is {self.bandwidth} and initial_threshold {self.initial_threshold}; choose more than 0"
            )

    def check(self, n_sources: int, n_features: int) -> None:
        """Any width will do."""

    def at(self, progress: float) -> "JumpReLU":
        """See `Sparsity.at`."""
        return self

    def encode(self, coder: Encoder, x: Tensor) -> Encoded:
        """See `Sparsity.encode`."""
        pre = coder.preactivations(x)
        thresholds = torch.stack(list(coder.log_threshold)).exp()
        acts = _JumpReLU.apply(pre, thresholds, self.bandwidth)
        return Encoded(pre, [DenseCodes(a) for a in acts.unbind(1)])

    def active(self, pre: Tensor, threshold: Tensor | None) -> Tensor:
        """See `Sparsity.active`: strictly above the threshold, and positive."""
        assert threshold is not None, "a JumpReLU coder without thresholds"
        return pre > threshold.clamp(min=0)

    def penalty(self, coder: Encoder, encoded: Encoded, progress: float) -> Tensor:
        """Mean over tokens of sum tanh(c ||W_dec|| a), plus the pre-activation loss."""
        norms = coder.decoder_norms()
        acts = torch.stack([codes.dense() for codes in encoded.codes], 1)
        tanh = (self.steepness * norms * acts).tanh().sum((1, 2)).mean()
        thresholds = torch.stack(list(coder.log_threshold)).exp()
        below = ((thresholds - encoded.pre).relu() * norms.detach()).sum((1, 2)).mean()
        return self.coefficient * progress * tanh + self.preactivation_coefficient * below


KINDS: dict[str, type] = {"joint-topk": JointTopK, "topk": TopK, "relu": ReLU, "jumprelu": JumpReLU}


def write_sparsity(sparsity: Sparsity) -> dict[str, Any]:
    """The JSON form of a sparsity: its kind and its settings."""
    kind = next(name for name, variant in KINDS.items() if type(sparsity) is variant)
    return {"kind": kind, **vars(sparsity)}


def read_sparsity(record: dict[str, Any]) -> Sparsity:
    """The sparsity that a JSON form describes; unknown kinds and settings are errors."""
    settings = dict(record)
    kind = settings.pop("kind", None)
    if kind not in KINDS:
        raise UserError(f"sparsity is {kind!r}; choose one of {', '.join(KINDS)}")
    try:
        return KINDS[kind](**settings)
    except TypeError as error:
        raise UserError(f"sparsity {kind}: {error}") from None


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


def encode_patterns(coder: Encoder, x: Tensor, pre: Tensor, patterns: list[Pattern]) -> list[Codes]:
    """Codes of each source from its active pairs, with gradients; `pre` was computed without."""
    return [
        encode_active(x[:, s], coder.W_enc[i], coder.b_enc[i], p, pre[:, i][p.tokens, p.features])
        for i, (s, p) in enumerate(zip(coder.sources, patterns, strict=True))
    ]


def split_by_source(flat: Tensor, keep: Tensor, n_sources: int, n_features: int) -> list[Pattern]:
    """Patterns of each source from indices [N, k] into its S x F features."""
    source = flat.div(n_features, rounding_mode="floor")
    return [_pattern(flat - i * n_features, keep & (source == i), n_features) for i in range(n_sources)]


def _pattern(features: Tensor, keep: Tensor, n_features: int) -> Pattern:
    tokens, slots = keep.nonzero(as_tuple=True)
    return Pattern.from_pairs(tokens, features[tokens, slots], features.shape[0], n_features)


def _check_available(k: int, available: int, where: str) -> None:
    if k > available:
        raise UserError(f"k is {k}, but {where} are only {available}; lower k or raise d_transcoder")
