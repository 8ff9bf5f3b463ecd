"""The rows of an attribution graph: what every earlier thing contributes to each target.

An edge is what its source adds to the stream, times the frozen Jacobian down to the target's read, times the target's
own direction: a_s W_dec[s -> l] . J(l -> t) . W_enc[t], summed over the layers l that the source writes to and that
lie before the target. Source: "Circuit Tracing" (Anthropic 2025), section "Constructing an attribution graph".

Axes: P positions, R rows, L layers, D d_model, A active pairs of position and feature of one source, T targets of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.replacement.local import LocalReplacement, Sources


@dataclass(frozen=True)
class Active:
    """The active features of one source layer on one prompt, sorted by position."""

    layer: int
    positions: Int[Tensor, " A"]
    features: Int[Tensor, " A"]
    activations: Float[Tensor, " A"]
    preactivations: Float[Tensor, " A"]
    """Without the encoder's bias: what the stream alone gives."""
    bias: Float[Tensor, " A"]
    """The encoder's bias."""
    directions: Float[Tensor, "A D"]
    """Encoder rows."""
    writes: Float[Tensor, "A T D"]
    """What each adds to the stream, at each of its targets."""

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Parts:
    """What the stream of one prompt is a sum of, beside what enters it: features, biases of decoders, and errors."""

    active: tuple[Active, ...]
    first_target: tuple[int, ...]
    """Of each source: the first layer that it writes to."""
    constants: Float[Tensor, "L P D"]
    """Decoder biases; at a prompt's first position, which has no features, the mean write."""
    errors: Float[Tensor, "L P D"]
    """What is left of each MLP's write."""

    @property
    def n_features(self) -> int:
        """Active features, over all layers and positions."""
        return sum(map(len, self.active))

    def below(self, layer: int) -> "Parts":
        """Without the features that no read of this layer can see."""
        n = sum(start < layer for start in self.first_target)
        return replace(self, active=self.active[:n], first_target=self.first_target[:n])


@torch.no_grad()
def split(local: LocalReplacement, coder: CrossLayerTranscoder, first: Bool[Tensor, " P"]) -> Parts:
    """Split every MLP's write into what features write, constants and an error.

    Args:
        local: the prompt.
        coder: the transcoder.
        first: the positions that begin a prompt.

    Raises:
        UserError: for a transcoder whose targets choose among features.
    """
    if getattr(coder.decoder.settings, "topk_coalesced", None) is not None:
        raise UserError(
            "with topk_coalesced targets choose among features, so a feature has no write of its own to trace"
        )
    active = tuple(_active(local, coder, i, first) for i in range(len(coder.sources)))
    constants = torch.where(first[:, None], coder.first_write[:, None], coder.b_dec[:, None])
    constants[list(coder.kept_layers)] = 0.0
    constants = constants.to(local.stream)
    errors = torch.stack([write[0].to(local.stream) for write in local.writes]) - constants
    starts = tuple(coder.wiring.targets(s).start for s in coder.sources)
    for start, found in zip(starts, active, strict=True):
        for place in range(found.writes.shape[1]):
            errors[start + place].index_add_(0, found.positions, found.writes[:, place], alpha=-1)
    return Parts(active, starts, constants, errors)


def active_pairs(
    local: LocalReplacement, coder: CrossLayerTranscoder, i: int, first: Bool[Tensor, " P"]
) -> tuple[Int[Tensor, " A"], Int[Tensor, " A"], Float[Tensor, " A"]]:
    """Positions, features and activations of what is active of one source, sorted by position; none at `first`."""
    read = local.reads[coder.sources[i]][0].detach().to(coder.b_dec)
    positions, features, activations = coder.sparsity_at(1.0).encode_layer(coder, i, read)[1].pairs()
    keep = ~first[positions]
    return positions[keep], features[keep], activations[keep]


def _active(local: LocalReplacement, coder: CrossLayerTranscoder, i: int, first: Tensor) -> Active:
    layer, like = coder.sources[i], local.stream
    positions, features, activations = active_pairs(local, coder, i, first)
    writes = activations[:, None, None] * coder.decoder.vectors(i, features)
    constants = coder.decoder.constants(i, features)
    directions = coder.W_enc[i][features].to(like)
    return Active(
        layer,
        positions,
        features,
        activations.to(like),
        (directions * local.reads[layer][0].detach()[positions]).sum(1),
        coder.b_enc[i][features].to(like),
        directions,
        (writes if constants is None else writes + constants).to(like),
    )


@dataclass(frozen=True)
class Rows:
    """What flows into R targets, in absolute numbers; the columns of all parts add up to the pre-activations."""

    stream: Float[Tensor, "R P"]
    between: dict[int, Float[Tensor, "R P"]]
    biases: Float[Tensor, "R L_plus_1"]
    features: tuple[Float[Tensor, "R _"], ...]
    """By source, as in `Parts.active`; of those that can reach the targets."""
    errors: Float[Tensor, "R M P"]

    def total(self) -> Float[Tensor, " R"]:
        """The sum of each row."""
        parts = [self.stream, *self.between.values(), self.biases, *self.features, self.errors.flatten(1)]
        return torch.stack([part.sum(1) for part in parts]).sum(0)


@torch.no_grad()
def rows_of(local: LocalReplacement, parts: Parts, sources: Sources) -> Rows:
    """The contributions to targets whose `sources` are known."""
    back = sources.writes
    M = back.shape[2]
    others = torch.stack([parts.constants[:M], parts.errors[:M]], 3)
    constants, errors = torch.einsum("prmd,mpdk->kprm", back, others)
    biases = sources.biases.clone()
    biases[:, :M] += constants.sum(0)
    return Rows(
        torch.einsum("rpd,pd->rp", sources.stream, local.stream[0]),
        {at: torch.einsum("rpd,pd->rp", grad, local.between[at][0]) for at, grad in sources.between.items()},
        biases,
        tuple(
            _from_features(back, found, start)
            for found, start in zip(parts.active, parts.first_target, strict=True)
            if start < M
        ),
        errors.permute(1, 2, 0),
    )


def _from_features(back: Float[Tensor, "P R M D"], found: Active, start: int) -> Float[Tensor, "R A"]:
    """One product a position: no gradient is copied for each feature."""
    n = min(found.writes.shape[1], back.shape[2] - start)
    out = back.new_zeros(back.shape[1], len(found))
    counts = torch.bincount(found.positions, minlength=len(back)).tolist()
    for p, (end, count) in enumerate(zip(accumulate(counts), counts, strict=True)):
        if count:
            mine = slice(end - count, end)
            out[:, mine] = back[p, :, start : start + n].flatten(1) @ found.writes[mine, :n].flatten(1).T
    return out


def feature_rows(
    local: LocalReplacement,
    parts: Parts,
    i: int,
    chosen: Int[Tensor, " C"],
    batch: int,
    row: Int[Tensor, " C"] | None = None,
) -> Iterator[tuple[Tensor, Rows]]:
    """The rows of some active features of one source, in batches, each with the features that it is of.

    Args:
        local: the prompt.
        parts: what it is a sum of.
        i: which source.
        chosen: which of its active features.
        batch: rows at once.
        row: which row each is part of, from 0 on; a row is the sum of its features' own. By default each has its own.
    """
    found = parts.active[i]
    row = torch.arange(len(chosen)) if row is None else row
    for start in range(0, int(row.max()) + 1 if len(row) else 0, batch):
        inside = (row >= start) & (row < start + batch)
        some, place = chosen[inside], row[inside] - start
        sources = local.into_reads(found.layer, found.positions[some], found.directions[some], place)
        sources.biases[:, found.layer].index_add_(0, place.to(found.bias.device), found.bias[some])
        yield some, rows_of(local, parts, sources)
