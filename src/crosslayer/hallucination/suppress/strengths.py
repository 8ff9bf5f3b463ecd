"""All features of all layers turned down at once, each by a strength of its own: differentiable in every strength.

To each write is added minus strength x what the feature writes, on the live stream, as `crosslayer.replacement.editing`
does for features that are ablated; a strength of 0 leaves the model as it is, bit by bit. What this costs is what the
active features cost, so one backward pass tells what each feature of the transcoder would change.

Axes: B prompts, P positions, N positions that are edited, L layers, D d_model, S sources, F features, A active pairs.
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
from crosslayer.replacement.actions import Ablate, Action, Scale
from crosslayer.replacement.interventions import Intervention
from crosslayer.replacement.passes import Passes, Places
from crosslayer.replacement.where import Where


@contextmanager
def turned_down(
    model: LoadedModel,
    coder: CrossLayerTranscoder,
    strengths: Float[Tensor, "S F"],
    where: Where,
    batch: Batch | None = None,
) -> "Iterator[_Deltas]":
    """Inside, `model.model` runs with each feature turned down by its strength: 0 not at all, 1 wholly.

    Args:
        model: the language model.
        coder: its transcoder; each layer's features must be decided by that layer alone.
        strengths: by position in the transcoder's `sources`, and feature; may require a gradient.
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


def as_edits(coder: CrossLayerTranscoder, strengths: Float[Tensor, "S F"], where: Where) -> tuple[Intervention, ...]:
    """Each feature that has a strength turned down by it, to the hundredth.

    What a feature with an offset writes whenever it is active goes with a strength of 1 alone.
    """
    hundredths = (100 * strengths).round().int()
    return tuple(
        Intervention(layer=coder.sources[s], feature=f, action=_turned_down(int(hundredths[s, f])), where=where)
        for s, f in hundredths.nonzero().tolist()
    )


def as_strengths(coder: CrossLayerTranscoder, edits: Sequence[Intervention]) -> Float[Tensor, "S F"]:
    """By how much each feature is turned down by edits that ablate or scale."""
    strengths = coder.b_dec.new_zeros(len(coder.sources), coder.d_transcoder)
    for edit in edits:
        left = edit.action.factor if isinstance(edit.action, Scale) else 0.0
        strengths[coder.sources.index(edit.layer), edit.feature] = 1 - left
    return strengths


@torch.no_grad()
def removed(
    model: LoadedModel,
    coder: CrossLayerTranscoder,
    strengths: Float[Tensor, "S F"],
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


def _turned_down(hundredths: int) -> Action:
    return Ablate() if hundredths == 100 else Scale((100 - hundredths) / 100)


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
        codes, strength = active_at(self.coder, layer, x.flatten(0, 1)[self.rows]), -self.strengths[i]
        self.writes.add_linear(self.coder.wiring.targets(layer).start, self._weighted(i, codes, strength))

    def _weighted(self, i: int, codes: SparseCodes, weight: Float[Tensor, " F"]) -> Float[Tensor, "N K"]:
        """What the active features write, each by its weight."""
        weights, bank = weight[codes.pattern.features], self.coder.decoder
        out = SparseCodes(codes.pattern, codes.values * weights).decode(bank.vectors(i).flatten(1))
        constants = bank.constants(i)
        if constants is not None:
            out = out + SparseCodes(codes.pattern, weights).decode(constants.flatten(1))
        return out

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
