"""Constrained patching: edits act, but within a range of layers they do not cause each other.

Source: "Circuit Tracing" (Anthropic 2025), appendix on constrained patching and iterative patching.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.models.hooks import entering, recording, replacing
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch
from crosslayer.replacement.editing import Deltas
from crosslayer.replacement.interventions import Edit


@torch.no_grad()
def patched(
    model: LoadedModel,
    coder: CrossLayerTranscoder,
    edits: Sequence[Edit],
    batch: Batch,
    *,
    first: int,
    last: int,
    strength: float = 1.0,
) -> Float[Tensor, "B P V"]:
    """Logits of a teacher-forced batch under edits whose effects on each other are cut in layers `first` to `last`.

    There, every MLP's write is held at what it is without edits, plus what the edits add to it: a feature's write to
    layer 2 does not also cause its write to layer 3. Attention and norms are live; later layers run free, and are
    written nothing beside.

    Args:
        model: the language model.
        coder: its transcoder.
        edits: what to change, in one set.
        batch: the prompts.
        first: first layer of the range.
        last: last layer of it.
        strength: share of the change that is made.

    Raises:
        UserError: for edits that do not fit, a range that is none, or an edit that changes no write in it.
    """
    held = range(first, last + 1)
    if not held or held[0] < 0 or held[-1] >= model.n_layers:
        raise UserError(f"layers {first} to {last} are to be held; the model has 0 to {model.n_layers - 1}")
    deltas = Deltas(model, coder, [edits], strength, batch)
    for layer, targets in deltas.reach():
        if not set(targets) & set(held):
            raise UserError(f"an edit at layer {layer} changes no write of layers {first} to {last}; move the range")
    plain = _writes(model, deltas, batch)
    totals = {t: plain[t] + (deltas.added(t, plain[t]) if t in deltas.targets else 0.0) for t in held}
    others = [layer for layer in range(model.n_layers) if layer not in held]
    with replacing(model.sites, totals.__getitem__, others):
        return model.model(**batch.inputs, use_cache=False).logits


def _writes(model: LoadedModel, deltas: Deltas, batch: Batch) -> dict[int, Tensor]:
    """Every MLP's write without edits; `deltas` takes note of what it would change."""
    writes: dict[int, Tensor] = {}
    readers = [model.sites.layers[layer].reader for layer in deltas.read_layers]

    def read(layer: int, x: Tensor) -> None:
        if layer in deltas.features:
            deltas.read(layer, x)

    with (
        deltas.followed(),
        entering(readers, lambda i, x: deltas.steer(deltas.read_layers[i], x)),
        recording(model.sites, read, lambda layer, y: writes.__setitem__(layer, y.clone())),
    ):
        model.model(**batch.inputs, use_cache=False)
    return writes
