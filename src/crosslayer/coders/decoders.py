"""Decoder banks: how the write vectors of the [source -> target] pairs are stored and shared.

Every bank gives the same thing, a write vector for each feature and target. A frozen settings object is passed in
(`Full`, `SourceTied`, ...); it builds the module that owns the parameters.

Axes: F features a layer, T targets of a source, D d_model, K = T x D, U features asked for, R rank. `i` counts source
layers, as in `CrossLayerTranscoder`.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.linalg import vector_norm

from crosslayer.coders.codes import Codes
from crosslayer.coders.draw import Draw
from crosslayer.coders.far import fetch_rows
from crosslayer.errors import UserError
from crosslayer.variants import read_variant, write_variant
from crosslayer.wiring import Wiring


@runtime_checkable
class Decoder(Protocol):
    """Settings of a decoder bank."""

    @property
    def scale(self) -> bool:
        """Whether each feature has a factor for each target."""
        ...

    @property
    def offset(self) -> bool:
        """Whether each active feature has a constant for each target."""
        ...

    def build(self, wiring: Wiring, d_model: int, d_transcoder: int) -> "Bank":
        """The module that owns the parameters, still zero."""
        ...


class Bank(nn.Module):
    """Write vectors of all features, with an optional scale and offset for each feature and target.

    A feature with activation z > 0 writes `(z + offset) * scale * vector`. Scales start at 1 and offsets at 0.
    """

    def __init__(self, settings: Any, wiring: Wiring, d_model: int, d_transcoder: int):
        super().__init__()
        self.settings, self.wiring, self.d_model, self.d_transcoder = settings, wiring, d_model, d_transcoder
        shapes = [(d_transcoder, wiring.n_targets(s)) for s in wiring.source_layers]
        self.scale = nn.ParameterList(torch.ones(shape) for shape in shapes if settings.scale)
        self.offset = nn.ParameterList(torch.zeros(shape) for shape in shapes if settings.offset)

    def base(self, i: int, features: Tensor | None) -> Float[Tensor, "U T D"]:
        """Write vectors before the scale, of some features or of all."""
        raise NotImplementedError

    def base_norms(self, i: int) -> Float[Tensor, "F T"]:
        """Lengths of all `base` vectors."""
        raise NotImplementedError

    def initialise(self, draw: Draw, bound: float) -> None:
        """Draw the write vectors from U(+-bound)."""
        for name, parameter in self.named_parameters():
            if name.startswith("W_"):
                draw(parameter, bound)

    def vectors(self, i: int, features: Tensor | None = None) -> Float[Tensor, "U T D"]:
        """What a feature writes to each of its targets per unit of activation."""
        base = self.base(i, features)
        return base * _rows(self.scale[i], features)[:, :, None] if len(self.scale) else base

    def constants(self, i: int, features: Tensor | None = None) -> Float[Tensor, "U T D"] | None:
        """What a feature writes beside, whenever it is active; None without offsets."""
        if not len(self.offset):
            return None
        return self.vectors(i, features) * _rows(self.offset[i], features)[:, :, None]

    def write(self, i: int, codes: Codes) -> Float[Tensor, "N K"]:
        """What a source writes to its targets, side by side; costs what is active."""
        features, codes = codes.compact()
        vectors = self.vectors(i, features)
        out = codes.decode(vectors.flatten(1))
        if len(self.offset):
            constants = vectors * _rows(self.offset[i], features)[:, :, None]
            out = out + codes.indicator().decode(constants.flatten(1))
        return out

    def norms(self) -> Float[Tensor, "S F"]:
        """Length of each feature's write vectors over all its targets."""
        lengths = [self.base_norms(i) for i in range(len(self.wiring.source_layers))]
        if len(self.scale):
            lengths = [length * scale for length, scale in zip(lengths, self.scale, strict=True)]
        return torch.stack([vector_norm(length, dim=1) for length in lengths])

    @torch.no_grad()
    def fold(self, output_scale: Float[Tensor, " L"]) -> None:
        """Multiply what is written to each target, in place.

        Shared vectors cannot absorb a factor per target, so the scales do; they are made where there were none.
        """
        if not len(self.scale):
            self.settings = replace(self.settings, scale=True)
            shapes = [(self.d_transcoder, self.wiring.n_targets(s)) for s in self.wiring.source_layers]
            learned = next(self.parameters()).requires_grad
            self.scale = nn.ParameterList(nn.Parameter(output_scale.new_ones(shape), learned) for shape in shapes)
        for i, s in enumerate(self.wiring.source_layers):
            self.scale[i].mul_(output_scale[list(self.wiring.targets(s))])

    def names(self) -> dict[str, str]:
        """Of every parameter: its name in a run file, by layer number: `W_dec.{s}`, `scale.{s}`, ..."""
        named = {}
        for name, _ in self.named_parameters():
            kind, number = name.split(".")
            layers = range(self.wiring.n_layers) if kind == "W_target" else self.wiring.source_layers
            named[name] = f"{kind}.{layers[int(number)]}"
        return named

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter under its name in a run file."""
        names = self.names()
        return {names[name]: parameter for name, parameter in self.named_parameters()}


@dataclass(frozen=True, kw_only=True)
class _Pairwise:
    """What all banks can have: a scale and an offset of each feature for each target."""

    scale: bool = False
    """Learn a factor on each feature's write to each target. EleutherAI's post_encoder_scale."""
    offset: bool = False
    """Learn a constant added to each active feature's activation, per target. EleutherAI's train_post_encoder."""


@dataclass(frozen=True)
class Full(_Pairwise):
    """A write vector of its own for every feature and target: the CLT of "Circuit Tracing" (Anthropic, 2025).

    `W_dec[i]` [F, T, D], source-major: a feature's writes are contiguous. EleutherAI's `coalesce_topk=none`.
    """

    def build(self, wiring: Wiring, d_model: int, d_transcoder: int) -> Bank:
        """See `Decoder.build`."""
        return _Full(self, wiring, d_model, d_transcoder)


@dataclass(frozen=True)
class SourceTied(_Pairwise):
    """One write vector a feature for all its targets. EleutherAI's `per_source_tied`. `W_dec[i]` [F, D]."""

    def build(self, wiring: Wiring, d_model: int, d_transcoder: int) -> Bank:
        """See `Decoder.build`."""
        return _SourceTied(self, wiring, d_model, d_transcoder)


@dataclass(frozen=True)
class TargetTied(_Pairwise):
    """One dictionary of write vectors a target, shared by feature f of all its sources. `W_target[t]` [F, D].

    EleutherAI's `coalesce_topk=concat`.
    """

    topk_coalesced: int | None = None
    """A target keeps this many of all its sources' active features a token, the largest; all when left out."""

    def __post_init__(self):
        if self.topk_coalesced is not None and self.topk_coalesced < 1:
            raise UserError(f"topk_coalesced is {self.topk_coalesced}; choose at least 1")

    def build(self, wiring: Wiring, d_model: int, d_transcoder: int) -> Bank:
        """See `Decoder.build`."""
        return _TargetTied(self, wiring, d_model, d_transcoder)


@dataclass(frozen=True)
class SourceAndTargetTied(_Pairwise):
    """The sum of a vector of the source and one of the target. EleutherAI's `secondary_target_tied`."""

    def build(self, wiring: Wiring, d_model: int, d_transcoder: int) -> Bank:
        """See `Decoder.build`."""
        return _SourceAndTargetTied(self, wiring, d_model, d_transcoder)


@dataclass(frozen=True)
class LowRank(_Pairwise):
    """R write directions a feature, mixed per target: `W_dec[i]` [F, R, D] and `mix[i]` [F, T, R].

    Rank 1 is `SourceTied` with scales. The mix is a scale already, so none can be added.
    """

    rank: int = 1
    """Write directions a feature, R."""

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"rank is {self.rank}; choose at least 1 write direction a feature")
        if self.scale:
            raise UserError("scale is set for a low-rank decoder, whose mix is a scale already; leave it out")

    def build(self, wiring: Wiring, d_model: int, d_transcoder: int) -> Bank:
        """See `Decoder.build`."""
        return _LowRank(self, wiring, d_model, d_transcoder)


class _Full(Bank):
    def __init__(self, settings: Full, wiring: Wiring, d_model: int, d_transcoder: int):
        super().__init__(settings, wiring, d_model, d_transcoder)
        self.W_dec = nn.ParameterList(
            torch.zeros(d_transcoder, wiring.n_targets(s), d_model) for s in wiring.source_layers
        )

    def base(self, i: int, features: Tensor | None) -> Tensor:
        return _rows(self.W_dec[i], features)

    def base_norms(self, i: int) -> Tensor:
        return vector_norm(self.W_dec[i], dim=2)

    def norms(self) -> Tensor:
        if len(self.scale):
            return super().norms()
        return torch.stack([vector_norm(W.flatten(1), dim=1) for W in self.W_dec])

    def write(self, i: int, codes: Codes) -> Tensor:
        if len(self.scale) or len(self.offset):
            return super().write(i, codes)
        return codes.decode(self.W_dec[i].flatten(1))

    @torch.no_grad()
    def fold(self, output_scale: Tensor) -> None:
        for W, s in zip(self.W_dec, self.wiring.source_layers, strict=True):
            W.mul_(output_scale[list(self.wiring.targets(s))].view(1, -1, 1))


class _SourceTied(Bank):
    def __init__(self, settings: SourceTied, wiring: Wiring, d_model: int, d_transcoder: int):
        super().__init__(settings, wiring, d_model, d_transcoder)
        self.W_dec = nn.ParameterList(torch.zeros(d_transcoder, d_model) for _ in wiring.source_layers)

    def base(self, i: int, features: Tensor | None) -> Tensor:
        n_targets = self.wiring.n_targets(self.wiring.source_layers[i])
        return _rows(self.W_dec[i], features)[:, None].expand(-1, n_targets, -1)

    def base_norms(self, i: int) -> Tensor:
        n_targets = self.wiring.n_targets(self.wiring.source_layers[i])
        return vector_norm(self.W_dec[i], dim=1, keepdim=True).expand(-1, n_targets)

    def write(self, i: int, codes: Codes) -> Tensor:
        if len(self.scale) or len(self.offset):
            return super().write(i, codes)
        return codes.decode(self.W_dec[i]).repeat(1, self.wiring.n_targets(self.wiring.source_layers[i]))


class _TargetTied(Bank):
    def __init__(self, settings: "TargetTied | SourceAndTargetTied", wiring: Wiring, d_model: int, d_transcoder: int):
        super().__init__(settings, wiring, d_model, d_transcoder)
        self.W_target = nn.ParameterList(torch.zeros(d_transcoder, d_model) for _ in range(wiring.n_layers))

    def base(self, i: int, features: Tensor | None) -> Tensor:
        return torch.stack([_rows(self.W_target[t], features) for t in self._targets(i)], 1)

    def base_norms(self, i: int) -> Tensor:
        return torch.stack([vector_norm(self.W_target[t], dim=1) for t in self._targets(i)], 1)

    @torch.no_grad()
    def fold(self, output_scale: Tensor) -> None:
        for W, scale in zip(self.W_target, output_scale, strict=True):
            W.mul_(scale)

    def _targets(self, i: int) -> range:
        return self.wiring.targets(self.wiring.source_layers[i])


class _SourceAndTargetTied(_TargetTied):
    def __init__(self, settings: SourceAndTargetTied, wiring: Wiring, d_model: int, d_transcoder: int):
        super().__init__(settings, wiring, d_model, d_transcoder)
        self.W_dec = nn.ParameterList(torch.zeros(d_transcoder, d_model) for _ in wiring.source_layers)

    def base(self, i: int, features: Tensor | None) -> Tensor:
        return super().base(i, features) + _rows(self.W_dec[i], features)[:, None]

    def base_norms(self, i: int) -> Tensor:
        return vector_norm(self.base(i, None), dim=2)

    def fold(self, output_scale: Tensor) -> None:
        Bank.fold(self, output_scale)


class _LowRank(Bank):
    def __init__(self, settings: LowRank, wiring: Wiring, d_model: int, d_transcoder: int):
        super().__init__(settings, wiring, d_model, d_transcoder)
        F, R, sources = d_transcoder, settings.rank, wiring.source_layers
        self.W_dec = nn.ParameterList(torch.zeros(F, R, d_model) for _ in sources)
        self.mix = nn.ParameterList(torch.full((F, wiring.n_targets(s), R), R**-0.5) for s in sources)

    def base(self, i: int, features: Tensor | None) -> Tensor:
        return _rows(self.mix[i], features) @ _rows(self.W_dec[i], features)

    def base_norms(self, i: int) -> Tensor:
        W, mix = self.W_dec[i], self.mix[i]
        return ((mix @ (W @ W.mT)) * mix).sum(2).clamp_min(1e-12).sqrt()  # by way of the R x R products, which is less

    @torch.no_grad()
    def fold(self, output_scale: Tensor) -> None:
        for mix, s in zip(self.mix, self.wiring.source_layers, strict=True):
            mix.mul_(output_scale[list(self.wiring.targets(s))].view(1, -1, 1))


DECODERS: dict[str, type] = {
    "full": Full,
    "source-tied": SourceTied,
    "target-tied": TargetTied,
    "source-and-target-tied": SourceAndTargetTied,
    "low-rank": LowRank,
}


def write_decoder(decoder: Decoder) -> dict[str, Any]:
    """The JSON form of a bank's settings."""
    return write_variant(DECODERS, decoder)


def read_decoder(record: dict[str, Any]) -> Decoder:
    """The settings that a JSON form describes; unknown kinds and settings are errors."""
    return read_variant("decoder", DECODERS, record)


def _rows(parameter: Tensor, features: Tensor | None) -> Tensor:
    return parameter if features is None else fetch_rows(parameter, features)
