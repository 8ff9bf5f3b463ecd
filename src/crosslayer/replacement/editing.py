"""Delta edits: the model as it is, its MLPs running, plus what a change of features changes of the writes.

To each target t of a source s is added strength x (w(a') - w(a)), where a are the features' activations on the live
stream, a' what the interventions make of them, and w what features write: the error of the reconstruction is kept, so
that without a change the model is what it was, bit by bit. Source: "Circuit Tracing" (Anthropic 2025), section
"Validating attribution graph hypotheses with interventions".

Axes: B prompts, P positions of the pass, D d_model, C all that changes of the features of all layers, K that of one
layer, in its columns of C.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.models.hooks import adding, before_forward, changing, reading
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch
from crosslayer.replacement.changes import DirectionEdits, FeatureEdits
from crosslayer.replacement.interventions import Edit, Intervention, Steer, check_all
from crosslayer.replacement.model import check_match
from crosslayer.replacement.passes import Passes


@contextmanager
def edited(
    model: LoadedModel,
    coder: CrossLayerTranscoder,
    edits: Sequence[Edit],
    *,
    strength: float = 1.0,
    batch: Batch | None = None,
) -> Iterator[None]:
    """Inside, `model.model` runs with delta edits, in forward passes and `generate` alike; afterwards it is as before.

    Only the layers concerned are touched. Where a feature's activity depends on its own pre-activation alone, only
    the encoder rows of the features named are computed.

    Args:
        model: the language model.
        coder: its transcoder.
        edits: what to change; several of one feature act one after the other.
        strength: share of the change that is made; 0 is the model itself.
        batch: the prompts that will be run, for edits at given answers.

    Raises:
        UserError: for edits that the model and the transcoder do not have, naming them.
    """
    with Deltas(model, coder, [edits], strength, batch).applied():
        yield


class Deltas:
    """What edits add to the writes of one forward pass.

    Args:
        model: the language model.
        coder: its transcoder.
        sets: one set of edits for all rows, or one for each row of the batch.
        strength: share of the change.
        batch: the prompts that will be run, where their answers are given.

    Raises:
        UserError: for edits that do not fit, or a transcoder of another model.
    """

    def __init__(
        self,
        model: LoadedModel,
        coder: CrossLayerTranscoder,
        sets: Sequence[Sequence[Edit]],
        strength: float,
        batch: Batch | None,
    ):
        check_match(coder, model.id, model.n_layers, model.d_model, model.sites.read)
        self.model, self.strength, self.passes = model, strength, Passes(model, batch)
        rows = [slice(row, row + 1) for row in range(len(sets))] if len(sets) > 1 else [slice(None)]
        placed = [(edit, row) for edits, row in zip(sets, rows, strict=True) for edit in edits]
        check_all([edit for edit, _ in placed], coder)
        coder.place(model.device)
        self.features: dict[int, FeatureEdits] = {}
        self.directions: dict[tuple[str, int], DirectionEdits] = {}
        thresholds = coder.thresholds if coder.thresholds is not None else coder.sparsity.thresholds(coder)
        for layer in sorted({e.layer for e, _ in placed if isinstance(e, Intervention)}):
            own = [(e, row) for e, row in placed if isinstance(e, Intervention) and e.layer == layer]
            self.features[layer] = FeatureEdits(coder, layer, own, thresholds)
        for edit, row in placed:
            if isinstance(edit, Steer):
                self.directions.setdefault((edit.site, edit.layer), DirectionEdits([])).steps.append((edit, row))
        ends = list(accumulate((len(own.vectors) for own in self.features.values()), initial=0))
        self.columns = {layer: slice(*ends[i : i + 2]) for i, layer in enumerate(self.features)}
        self.written = self._written()
        self.changed: Tensor | None = None
        self.steered: dict[int, Tensor] = {}

    @property
    def read_layers(self) -> list[int]:
        """Layers whose stream is steered as their MLP reads it."""
        return [layer for site, layer in self.directions if site == "read"]

    @property
    def targets(self) -> list[int]:
        """Layers whose writes change."""
        return sorted({target for _, targets in self.reach() for target in targets})

    def reach(self) -> Iterator[tuple[int, Sequence[int]]]:
        """Each layer that is edited, and the layers whose writes that changes."""
        yield from ((layer, own.targets) for layer, own in self.features.items())
        yield from ((layer, [layer]) for _, layer in self.directions)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model runs with the edits."""
        sites, read_layers = self.model.sites, self.read_layers
        readers = [sites.layers[layer].reader for layer in read_layers]
        with (
            self.followed(),
            changing(readers, lambda i, x: x + self.steer(read_layers[i], x)),
            reading(sites, self.read, self.features),
            adding(sites, self.added, self.targets),
        ):
            yield

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Inside, every forward pass is followed, and begins with nothing to add."""
        with self.passes.followed(), before_forward(self.model.speaker, self._start):
            yield

    def _start(self, _: dict[str, Any]) -> None:
        self.changed, self.steered = None, {}

    def steer(self, layer: int, x: Float[Tensor, "B P D"]) -> Float[Tensor, "B P D"]:
        """What is added to the stream that a layer's MLP reads; its write takes it on to what follows."""
        self.steered[layer] = self.strength * self.directions["read", layer].change(x, self.passes)
        return self.steered[layer].to(x)

    def read(self, layer: int, x: Float[Tensor, "B P D"]) -> None:
        """Note what changes of the layer's features."""
        change = self.features[layer].change(x, self.passes)
        if self.changed is None:
            self.changed = change.new_empty(*change.shape[:2], max(columns.stop for columns in self.columns.values()))
        self.changed[..., self.columns[layer]] = change

    def added(self, layer: int, write: Float[Tensor, "B P D"]) -> Float[Tensor, "B P D"]:
        """What is added to the write of a layer, once all its sources have been read."""
        more: Any = 0.0
        if layer in self.written and self.changed is not None:
            columns, vectors = self.written[layer]
            more = (self.changed[..., columns] @ vectors).to(write)
        if layer in self.steered:
            more = more + self.steered[layer].to(write)
        if ("write", layer) in self.directions:
            more = more + self.strength * self.directions["write", layer].change(write + more, self.passes)
        return more

    def _written(self) -> dict[int, tuple[slice, Float[Tensor, "K D"]]]:
        """Of each layer that features write to: the columns of its sources, and what each writes at this strength."""
        found = {}
        for target in sorted({target for own in self.features.values() for target in own.targets}):
            sources = [layer for layer, own in self.features.items() if target in own.targets]  # neighbours in C
            owned = [self.features[layer] for layer in sources]
            vectors = torch.cat([own.vectors[:, target - own.targets[0]] for own in owned])
            columns = slice(self.columns[sources[0]].start, self.columns[sources[-1]].stop)
            found[target] = columns, self.strength * vectors
        return found
