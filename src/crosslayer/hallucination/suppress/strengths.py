"""All writes of all features turned down at once, each by a strength of its own: differentiable in every strength.

A CLT's feature writes to several layers, and each of these writes has a strength: an edge of the circuit can go, and
the others stay. To each write is added minus strength x what the feature writes, on the live stream, as
`crosslayer.replacement.editing` does for features that are ablated; a strength of 0 leaves the model as it is, bit by
bit. What this costs is what the active features cost, so one backward pass tells what each of them would change.

Axes: B prompts, P positions, N positions that are edited, L layers, D d_model, S sources, F features, T a source's
targets, from the first one on (none beyond them); 1 where all writes of a feature have the same strength.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosslayer.coders.codes import Codes, SparseCodes
from crosslayer.coders.pattern import Pattern
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.coders.writes import RunningWrites
from crosslayer.models.hooks import adding, reading
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch
from crosslayer.replacement.actions import Ablate, Scale
from crosslayer.replacement.interventions import Intervention
from crosslayer.replacement.passes import Passes, Places
from crosslayer.replacement.where import Where


@contextmanager
def turned_down(
    model: LoadedModel,
    coder: CrossLayerTranscoder,
    strengths: Float[Tensor, "S F T"],
    where: Where,
    batch: Batch | None = None,
) -> "Iterator[_Deltas]":
    """Inside, `model.model` runs with each write turned down by its strength: 0 not at all, 1 wholly.

    Args:
        model: the language model.
        coder: its transcoder; each layer's features must be decided by that layer alone.
        strengths: by position in the transcoder's `sources`, feature and target; may require a gradient.
        where: at which positions; never where a prompt begins.
        batch: the prompts that will be run, where `where` asks for given answers.
    """
    deltas = _Deltas(model, coder, strengths, where, batch)
    targets = sorted({target for source in coder.sources for target in coder.wiring.targets(source)})
    with (
        deltas.passes.followed(),
        reading(model.sites, deltas.read, coder.sources),
        adding(model.sites, deltas.added, targets),
    ):
        yield deltas


def no_strengths(coder: CrossLayerTranscoder) -> Float[Tensor, "S F T"]:
    """Zeros for all writes."""
    most = max(len(coder.wiring.targets(source)) for source in coder.sources)
    return coder.b_dec.new_zeros(len(coder.sources), coder.d_transcoder, most)


def as_edits(coder: CrossLayerTranscoder, strengths: Float[Tensor, "S F T"], where: Where) -> tuple[Intervention, ...]:
    """Each feature that has a strength ablated, with its strengths as shares of its writes, to the hundredth."""
    hundredths = (100 * strengths).round().int()
    return tuple(
        Intervention(
            layer=(layer := coder.sources[s]),
            feature=f,
            action=Ablate(),
            where=where,
            writes=_shares(coder.wiring.targets(layer), hundredths[s, f].tolist()),
        )
        for s, f in hundredths.any(2).nonzero().tolist()
    )


def as_strengths(coder: CrossLayerTranscoder, edits: Sequence[Intervention]) -> Float[Tensor, "S F T"]:
    """By how much each write is turned down by edits that ablate or scale."""
    strengths = no_strengths(coder)
    for edit in edits:
        targets, left = coder.wiring.targets(edit.layer), edit.action.factor if isinstance(edit.action, Scale) else 0.0
        shares = dict.fromkeys(targets, 1.0) if edit.writes is None else dict(edit.writes)
        for target, share in shares.items():
            strengths[coder.sources.index(edit.layer), edit.feature, target - targets.start] = share * (1 - left)
    return strengths


@torch.no_grad()
def removed(
    model: LoadedModel,
    coder: CrossLayerTranscoder,
    strengths: Float[Tensor, "S F T"],
    where: Where,
    batch: Batch,
) -> Float[Tensor, "N L D"]:
    """What is added to each layer's write at the positions that are edited, row by row, in one pass over a batch."""
    with turned_down(model, coder, strengths, where, batch) as deltas:
        model.model(**batch.inputs, use_cache=False)
    return deltas.writes.everything()


def active_at(coder: CrossLayerTranscoder, layer: int, x: Float[Tensor, "N D"]) -> SparseCodes:
    """The active features of one source layer, as pairs of token and feature, with gradients."""
    codes: Codes = coder.encode_layer(layer, x.to(coder.b_dec))
    if isinstance(codes, SparseCodes):
        return codes
    tokens, features, values = codes.pairs()
    return SparseCodes(Pattern.from_pairs(tokens, features, codes.n_tokens, coder.d_transcoder), values)


def _shares(targets: range, hundredths: Sequence[int]) -> tuple[tuple[int, float], ...] | None:
    """By target, without those that have none; None where each has all."""
    own = [hundredths[min(place, len(hundredths) - 1)] for place in range(len(targets))]
    return None if set(own) == {100} else tuple((t, h / 100) for t, h in zip(targets, own, strict=True) if h)


class _Deltas:
    """What is added to the writes of one forward pass."""

    def __init__(
        self, model: LoadedModel, coder: CrossLayerTranscoder, strengths: Tensor, where: Where, batch: Batch | None
    ):
        self.coder, self.strengths, self.where = coder, strengths, where
        self.passes = Passes(model, batch)
        self.rows, self.writes = torch.empty(0), RunningWrites(coder.decoder, torch.empty(0))

    def read(self, layer: int, x: Float[Tensor, "B P D"]) -> None:
        """Take from the running sum what the layer's features, by their strengths, no longer write."""
        if layer == self.coder.sources[0]:
            self.rows = _rows(self.where, self.passes.places(x), x)
            width = self.coder.b_dec.numel()
            self.writes = RunningWrites(self.coder.decoder, self.coder.b_dec.new_zeros(int(self.rows.sum()), width))
        i = self.coder.sources.index(layer)
        codes, targets = active_at(self.coder, layer, x.flatten(0, 1)[self.rows]), self.coder.wiring.targets(layer)
        self.writes.add_linear(targets.start, self._weighted(i, codes, -self.strengths[i, :, : len(targets)]))

    def _weighted(self, i: int, codes: SparseCodes, weights: Float[Tensor, "F T"]) -> Float[Tensor, "N K"]:
        """What the active features write, each write by its weight."""
        features, codes = codes.compact()
        weight, bank = weights[features][:, :, None], self.coder.decoder
        out = codes.decode((bank.vectors(i, features) * weight).flatten(1))
        constants = bank.constants(i, features)
        return out if constants is None else out + codes.indicator().decode((constants * weight).flatten(1))

    def added(self, layer: int, write: Float[Tensor, "B P D"]) -> Float[Tensor, "B P D"]:
        """What is added to the write of a layer, once all its sources have been read."""
        delta = self.writes.write(layer)
        flat = delta.new_zeros(len(self.rows), delta.shape[1])
        return flat.index_put((self.rows.nonzero()[:, 0],), delta).view_as(write)


class Fired:
    """Counts on how many of the positions that are edited each feature is active, and sums its activations."""

    def __init__(self, model: LoadedModel, coder: CrossLayerTranscoder, where: Where):
        self.model, self.coder, self.where = model, coder, where
        self.counts = coder.b_dec.new_zeros(len(coder.sources), coder.d_transcoder)
        self.sums, self.n = torch.zeros_like(self.counts), 0

    @contextmanager
    def counted(self, batch: Batch) -> Iterator[None]:
        """Inside, the passes over a batch are counted."""
        passes, coder = Passes(self.model, batch), self.coder

        def read(layer: int, x: Tensor) -> None:
            rows, i = _rows(self.where, passes.places(x), x), coder.sources.index(layer)
            codes = active_at(coder, layer, x.flatten(0, 1)[rows])
            self.n += len(rows.nonzero()) if i == 0 else 0
            self.counts[i] += codes.counts()
            self.sums[i].index_add_(0, codes.pattern.features, codes.values)

        with passes.followed(), reading(self.model.sites, read, coder.sources):
            yield


def _rows(where: Where, places: Places, x: Float[Tensor, "B P D"]) -> Bool[Tensor, " N"]:
    """The positions of a pass, prompt after prompt, at which to edit: no padding, and never where a prompt begins."""
    return (where.mask(places).to(x.device) & (places.position > 0).to(x.device)).flatten()
