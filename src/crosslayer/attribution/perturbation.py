"""Whether a replacement model's MLPs answer a change as the model's own do, by how many of them it has passed.

The stream that a layer's MLP reads is moved along the encoder row of one active feature until that feature's
pre-activation is 0: at its position, and of a pooled feature at all positions where it is active, at once. That is done
to the model, and to the replacement model with its errors held at the prompt's values (which without a change is the
model). Attention and norms are live in both. `change` [P, D] is that of what the MLP of a later layer reads, over all
positions; with d MLPs between (that of the moved layer is the first):

* **cosine** of the replacement's change and the model's;
* **error**: |replacement's change - model's|^2 / |model's change|^2;
* the same for MLPs that do not answer at all, held at what they wrote: the change that the stream and attention carry
  by themselves. A replacement is worth something where it does better.

Means over features. Moving the stream, and not a feature's writes, makes the numbers of a cross-layer transcoder and of
a per-layer one comparable. Source: "Circuit Tracing" (Anthropic 2025), section "Evaluating mechanistic faithfulness",
where attention is frozen.

Axes: N features in a batch, P positions, D d_model, L layers.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.attribution.activity import feature_of
from crosslayer.attribution.node import Node
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.models.hooks import adding, reading, recording, replacing
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch
from crosslayer.replacement.editing import Deltas
from crosslayer.replacement.interventions import Steer
from crosslayer.replacement.model import ReplacementModel
from crosslayer.replacement.sweeping import copies

AT_ONCE = 16
"""Features moved in one batch, each in a copy of the prompt."""


@dataclass(frozen=True, kw_only=True)
class Downstream:
    """How changes agree where `mlps` MLPs lie between; means over `n` features."""

    mlps: int
    cosine: float
    error: float
    cosine_held: float
    """With MLPs that do not answer."""
    error_held: float
    n: int


@torch.no_grad()
def downstream(
    model: LoadedModel,
    coder: CrossLayerTranscoder,
    batch: Batch,
    nodes: Sequence[Node],
    activations: Float[Tensor, "n P"],
) -> tuple[Downstream, ...]:
    """How the replacement model answers when features are silenced through what they read.

    Args:
        model: the language model.
        coder: its transcoder.
        batch: one prompt.
        nodes: active features of it.
        activations: of each, at the positions that it stands for; 0 elsewhere.
    """
    replacement, agreements = ReplacementModel(model, coder), dict[int, list[tuple[float, ...]]]()
    reads, writes = _unchanged(model, batch)
    errors = _errors(coder, batch, reads, writes)
    replaced = [layer for layer in errors if layer not in coder.kept_layers]
    for start in range(0, len(nodes), AT_ONCE):
        some = nodes[start : start + AT_ONCE]
        many = copies(batch, len(some))
        moves = [_silencing(coder, node, acts) for node, acts in zip(some, activations[start:], strict=False)]
        with_errors = adding(model.sites, _repeated(errors, len(some)), replaced)
        own = _reads(model, coder, many, moves, [])
        ours = _reads(model, coder, many, moves, [replacement.replaced(), with_errors])
        still = _reads(model, coder, many, moves, [replacing(model.sites, _repeated(writes, len(some)))])
        for row, node in enumerate(some):
            moved, _ = feature_of(node)
            for layer in range(moved + 1, model.n_layers):
                change, *others = ((found[layer][row] - reads[layer][0]).float() for found in (own, ours, still))
                values = [value for other in others for value in _agreement(change, other)]
                agreements.setdefault(layer - moved, []).append(tuple(values))
    return tuple(_mean(mlps, values) for mlps, values in sorted(agreements.items()))


def _repeated(tensors: dict[int, Tensor], n: int) -> Callable[..., Tensor]:
    """Gives, by layer, n copies of a tensor [1, P, D]."""
    return lambda layer, *_: tensors[layer].expand(n, -1, -1)


def _mean(mlps: int, values: list[tuple[float, ...]]) -> Downstream:
    cosine, error, cosine_held, error_held = torch.tensor(values).mean(0).tolist()
    return Downstream(
        mlps=mlps, cosine=cosine, error=error, cosine_held=cosine_held, error_held=error_held, n=len(values)
    )


def _agreement(own: Float[Tensor, "P D"], other: Float[Tensor, "P D"]) -> tuple[float, float]:
    """Cosine, and squared error over the own change's square."""
    cosine = torch.nn.functional.cosine_similarity(own.flatten(), other.flatten(), dim=0)
    return cosine.item(), ((other - own).square().sum() / own.square().sum().clamp_min(1e-30)).item()


def _reads(
    model: LoadedModel,
    coder: CrossLayerTranscoder,
    many: Batch,
    moves: Sequence[Steer],
    contexts: Sequence[AbstractContextManager],
) -> dict[int, Tensor]:
    """What every MLP reads, [N, P, D] by layer, where each copy of the prompt is moved in its own way."""
    reads: dict[int, Tensor] = {}
    deltas = Deltas(model, coder, [[move] for move in moves], 1.0, many)
    with ExitStack() as stack:
        for context in [deltas.applied(), *contexts, reading(model.sites, _copies(reads))]:
            stack.enter_context(context)
        model.model(**many.inputs, use_cache=False)
    return reads


def _silencing(coder: CrossLayerTranscoder, node: Node, activations: Float[Tensor, " P"]) -> Steer:
    """Moves the stream until a feature's pre-activation is 0: by -pre / |row|^2 times its encoder row."""
    layer, feature = feature_of(node)
    row = coder.W_enc[coder.sources.index(layer)][feature].detach().float()
    amounts = activations.float() / row.square().sum()
    return Steer(layer=layer, vector=row, action=lambda acts: acts - amounts.to(acts), site="read")


def _unchanged(model: LoadedModel, batch: Batch) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """What the model's MLPs read and write, [1, P, D] by layer."""
    reads, writes = dict[int, Tensor](), dict[int, Tensor]()
    with recording(model.sites, _copies(reads), _copies(writes)):
        model.model(**batch.inputs, use_cache=False)
    return reads, writes


def _errors(
    coder: CrossLayerTranscoder, batch: Batch, reads: dict[int, Tensor], writes: dict[int, Tensor]
) -> dict[int, Tensor]:
    """What the replacement model, on the model's own stream, lacks of each write."""
    first, found = batch.position[0] == 0, {}
    collected = coder.writes(batch.tokens.shape[1])
    for layer in range(len(reads)):
        x = reads[layer][0].to(coder.b_dec)
        coder.add_layer(collected, layer, coder.encode_layer(layer, x) if layer in coder.sources else None, x)
        rebuilt = torch.where(first[:, None], coder.first_write[layer], coder.write(collected, layer))
        found[layer] = writes[layer] - rebuilt.to(writes[layer])
    return found


def _copies(kept: dict[int, Tensor]) -> Callable[[int, Tensor], None]:
    return lambda layer, tensor: kept.__setitem__(layer, tensor.clone())
