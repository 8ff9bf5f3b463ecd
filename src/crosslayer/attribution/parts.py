"""What the stream of one prompt is a sum of, beside what enters it: what features write, constants, and errors.

Axes: P positions, L layers, S sources, D d_model, A active pairs of position and feature, T targets of a source.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosslayer.coders.far import fetch_rows
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.mapped import give_back
from crosslayer.replacement.local import LocalReplacement


@dataclass(frozen=True)
class Active:
    """The active features of one prompt, sorted by layer, then by position."""

    layers: Int[Tensor, " A"]
    positions: Int[Tensor, " A"]
    features: Int[Tensor, " A"]
    activations: Float[Tensor, " A"]
    preactivations: Float[Tensor, " A"]
    """Without the encoder's bias: what the stream alone gives."""
    bias: Float[Tensor, " A"]
    """The encoder's bias."""
    directions: Float[Tensor, "A D"]
    """Encoder rows."""

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Written:
    """All that one layer's write is a sum of, sorted by position, so that a position is one product."""

    terms: Float[Tensor, "K D"]
    """At each position: what features write there, then the error, then the constant."""
    starts: tuple[int, ...]
    """Of each position: where its features begin in the order of `Parts.by_position`."""
    counts: tuple[int, ...]
    """Of each position: how many features write to this layer there."""


@dataclass(frozen=True)
class Parts:
    """What the stream of one prompt is a sum of, beside what enters it."""

    active: Active
    first_targets: Int[Tensor, " A"]
    """Of each active feature: the first layer that it writes to."""
    by_position: Int[Tensor, " A"]
    """The active features' numbers, sorted by position, then by layer."""
    written: dict[int, Written]
    """By layer; those that no row needs any more may be taken out."""
    constants: Float[Tensor, "L P D"]
    """Decoder biases; at a prompt's first position, which has no features, the mean write."""
    errors: Float[Tensor, "L P D"]
    """What is left of each MLP's write."""

    @property
    def n_features(self) -> int:
        """Active features, over all layers and positions."""
        return len(self.active)

    def below(self, layer: int) -> int:
        """How many of the active features a read of this layer can see; they come first."""
        return int((self.first_targets < layer).sum())


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
    constants = torch.where(first[:, None], coder.first_write[:, None], coder.b_dec[:, None])
    constants[list(coder.kept_layers)] = 0.0
    constants = constants.to(local.stream)
    found = [_active(local, coder, i, first) for i in range(len(coder.sources))]
    active = Active(*(torch.cat([getattr(part, name) for part in found]) for name in Active.__annotations__))
    counts = torch.stack([part.positions.bincount(minlength=len(first)) for part in found]).cpu()
    tables = [_Table(coder, layer, counts, active.positions, constants) for layer in range(local.n_layers)]
    for i, part in enumerate(found):
        for layer, write in zip(coder.wiring.targets(coder.sources[i]), _writes(coder, i, part), strict=True):
            tables[layer].add(i, part.positions, write)
        give_back(weights for name, weights in coder.named_parameters() if name.endswith(f".{i}"))
    written = {t: table.closed(write[0]) for t, (table, write) in enumerate(zip(tables, local.writes, strict=True))}
    errors = torch.stack([table.error for table in tables])
    starts = torch.tensor([coder.wiring.targets(s).start for s in coder.sources])
    first_targets = starts.repeat_interleave(counts.sum(1))
    return Parts(active, first_targets, active.positions.argsort(stable=True), written, constants, errors)


def active_pairs(
    local: LocalReplacement, coder: CrossLayerTranscoder, i: int, first: Bool[Tensor, " P"]
) -> tuple[Int[Tensor, " A"], Int[Tensor, " A"], Float[Tensor, " A"]]:
    """Positions, features and activations of what is active of one source, sorted by position; none at `first`."""
    read = local.reads[coder.sources[i]][0].to(coder.b_dec)
    positions, features, activations = coder.sparsity_at(1.0).encode_layer(coder, i, read)[1].pairs()
    keep = ~first[positions]
    return positions[keep], features[keep], activations[keep]


def _active(local: LocalReplacement, coder: CrossLayerTranscoder, i: int, first: Tensor) -> Active:
    layer, like = coder.sources[i], local.stream
    positions, features, activations = active_pairs(local, coder, i, first)
    directions = fetch_rows(coder.W_enc[i], features).to(like)
    return Active(
        torch.full_like(features, layer),
        positions,
        features,
        activations.to(like),
        (directions * local.reads[layer][0][positions]).sum(1),
        coder.b_enc[i][features].to(like),
        directions,
    )


def _writes(coder: CrossLayerTranscoder, i: int, found: Active) -> tuple[Float[Tensor, "A D"], ...]:
    """What each feature of a source adds to the stream, by target."""
    writes = found.activations.to(coder.b_dec)[:, None, None] * coder.decoder.vectors(i, found.features)
    constants = coder.decoder.constants(i, found.features)
    return (writes if constants is None else writes + constants).unbind(1)


class _Table:
    """One layer's `Written`, as sources fill it in."""

    def __init__(
        self,
        coder: CrossLayerTranscoder,
        layer: int,
        counts: Int[Tensor, "S P"],
        positions: Int[Tensor, " A"],
        constants: Float[Tensor, "L P D"],
    ):
        mine = [i for i, s in enumerate(coder.sources) if layer in coder.wiring.targets(s)]
        self.first, low = (mine[0], mine[0]) if mine else (0, 0)
        high = low + len(mine)
        sizes = counts.sum(1)
        begin, end = int(sizes[:low].sum()), int(sizes[:high].sum())
        own = positions[begin:end]
        places = own.argsort(stable=True).argsort() + 2 * own
        self.places = places.split(sizes[low:high].tolist())
        self.counts = counts[low:high].sum(0)
        self.starts = counts.sum(0).cumsum(0) - counts[low:].sum(0)
        self.constant, self.error = constants[layer], torch.zeros_like(constants[layer])
        self.terms = constants.new_empty(len(own) + 2 * len(self.constant), constants.shape[2])

    def add(self, source: int, positions: Int[Tensor, " A"], write: Float[Tensor, "A D"]) -> None:
        """Fill in what a source writes."""
        write = write.to(self.terms)
        self.terms[self.places[source - self.first]] = write
        self.error.index_add_(0, positions, write, alpha=-1)

    def closed(self, write: Float[Tensor, "P D"]) -> Written:
        """With what is left of the layer's write as the error."""
        self.error += write.to(self.terms) - self.constant
        ends = (self.counts + 2).cumsum(0).to(self.terms.device)
        self.terms[ends - 2], self.terms[ends - 1] = self.error, self.constant
        return Written(self.terms, tuple(self.starts.tolist()), tuple(self.counts.tolist()))
