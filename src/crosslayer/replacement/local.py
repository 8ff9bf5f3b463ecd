"""The local replacement model: for one prompt, everything between an MLP's write and a later read is linear.

Attention patterns and norm denominators are held at the prompt's values, and every MLP's write is a number of its own:
what the transcoder reconstructs plus an error. The model's own activations and logits come out, only now each is a sum
over what was written. Source: "Circuit Tracing" (Anthropic 2025), section "The local replacement model".

Axes: P positions, R rows (targets whose sources are asked for), L layers, D d_model, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.models.freezing import Frozen, eager_attention
from crosslayer.models.hooks import changing, entering, reading, recording, replacing, watching
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest relative gap allowed between the local replacement model and the model itself, by the model's dtype.

Models in float64 compute some norms and patterns in float32 all the same.
"""


@dataclass(frozen=True)
class Sources:
    """What flows into R targets, per unit of each thing that the stream is a sum of."""

    stream: Float[Tensor, "R P D"]
    """Per unit of the stream that enters the first layer."""
    writes: Float[Tensor, "P R M D"]
    """Per unit of the writes of layers 0 to M - 1; later ones cannot reach these targets."""
    between: dict[int, Float[Tensor, "R P D"]]
    """Per unit of what is added to the stream as it enters a later layer."""
    biases: Float[Tensor, "R L_plus_1"]
    """From the model's own biases, by layer; the last are those after all layers."""


@dataclass(frozen=True)
class LocalReplacement:
    """One prompt, traced; `trace` makes it."""

    logits: Float[Tensor, "1 P V"]
    """With the graph that `Sources` are found by; so are the reads."""
    reads: tuple[Float[Tensor, "1 P D"], ...]
    """What each layer's encoder reads, after a norm of the transcoder's own."""
    stream: Float[Tensor, "1 P D"]
    """What enters the first layer: embeddings of tokens and image patches, with positions where those are added."""
    writes: tuple[Float[Tensor, "1 P D"], ...]
    """What each MLP writes, but for skip connections, which are part of the paths."""
    between: dict[int, Float[Tensor, "1 P D"]]
    """What is added to the stream as it enters a later layer (DeepStack)."""
    biases: tuple[tuple[int, Tensor], ...]
    """The model's own biases and their layers, L for those after all layers."""
    gap: float
    """|activations and logits - the model's own|, relative, at worst."""
    replay: Callable[[Tensor | float, Mapping[int, Tensor]], tuple[tuple[Tensor, ...], Tensor]]
    """Reads and logits after adding something to the stream that enters, and to writes by layer, all else frozen."""

    @property
    def n_layers(self) -> int:
        """Decoder layers L."""
        return len(self.reads)

    def into_reads(
        self,
        layer: int,
        position: Int[Tensor, " A"],
        vectors: Float[Tensor, "A D"],
        row: Int[Tensor, " A"] | None = None,
    ) -> Sources:
        """What flows into `vectors[a] . read` of a layer at `position[a]`, summed over all `a` of one row.

        By default each is a row of its own.
        """
        read = self.reads[layer]
        row = torch.arange(len(vectors)) if row is None else row
        ahead = read.new_zeros(int(row.max()) + 1, *read.shape)
        ahead.index_put_((row, torch.zeros_like(row), position), vectors.to(read), accumulate=True)
        return self._pull(read, ahead, layer)

    def into_logits(self, position: int, vectors: Float[Tensor, "R V"]) -> Sources:
        """What flows into `vectors[r] . logits` at a position."""
        return self._pull(self.logits[:, position], vectors[:, None].to(self.logits), self.n_layers)

    def _pull(self, output: Tensor, ahead: Tensor, layer: int) -> Sources:
        """The frozen Jacobian, transposed, times directions: one pass back for all rows."""
        between = {at: tensor for at, tensor in self.between.items() if at <= layer}
        groups = [[self.stream], self.writes[:layer], between.values(), [bias for _, bias in self.biases]]
        leaves = [leaf for group in groups for leaf in group]
        settings: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "is_grads_batched": True}
        found = torch.autograd.grad(output, leaves, ahead, **settings)
        grads = iter(
            leaf.new_zeros(len(ahead), *leaf.shape) if grad is None else grad
            for grad, leaf in zip(found, leaves, strict=True)
        )
        stream = next(grads)[:, 0]
        writes = [next(grads)[:, 0].transpose(0, 1).to(stream) for _ in range(layer)]
        added = {at: next(grads)[:, 0].to(stream) for at in between}
        biases = stream.new_zeros(len(ahead), self.n_layers + 1)
        for (at, bias), grad in zip(self.biases, grads, strict=True):
            biases[:, at] += (grad * bias).flatten(1).sum(1).to(biases)
        empty = stream.new_zeros(stream.shape[1], len(stream), 0, stream.shape[2])
        return Sources(stream, torch.stack(writes, 2) if writes else empty, added, biases)


def trace(model: LoadedModel, coder: CrossLayerTranscoder, batch: Batch) -> LocalReplacement:
    """The local replacement model of one prompt.

    Raises:
        UserError: when what is frozen does not make the model linear, with what was measured.
    """
    frozen = Frozen()
    with eager_attention(model.model):
        plain = _plain_pass(model, batch)
        run = _FrozenPass(model, coder, plain).run(batch, frozen)

    @torch.no_grad()
    def replay(stream: Tensor | float, writes: Mapping[int, Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        with eager_attention(model.model):
            again = _FrozenPass(model, coder, plain, stream, writes).run(batch, frozen)
        return tuple(again.reads[layer] for layer in range(model.n_layers)), again.logits

    gaps = [_gap(read, plain.reads[layer]) for layer, read in run.streams.items()]
    gap = max(*gaps, _gap(run.logits, plain.logits))
    _check(model, gap, _crookedness(replay, run))
    n, between = model.n_layers, dict(run.between)
    return LocalReplacement(
        run.logits,
        tuple(run.reads[layer] for layer in range(n)),
        run.stream,
        tuple(run.writes[layer] for layer in range(n)),
        between,
        tuple((layer, run.biases[name]) for name, layer in _bias_layers(model).items()),
        gap,
        replay,
    )


@dataclass
class _Plain:
    """What a forward pass as it is does to the stream."""

    reads: dict[int, Tensor] = field(default_factory=dict)
    writes: dict[int, Tensor] = field(default_factory=dict)
    entries: dict[int, Tensor] = field(default_factory=dict)
    exits: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    def between(self, layer: int) -> Tensor | None:
        """What is added between a layer and the one before; None where nothing is."""
        added = self.entries[layer] - self.exits[layer - 1].to(self.entries[layer])
        return added if added.any() else None


@torch.no_grad()
def _plain_pass(model: LoadedModel, batch: Batch) -> _Plain:
    plain, layers = _Plain(), [site.layer for site in model.sites.layers]
    with (
        recording(model.sites, _copies(plain.reads), _copies(plain.writes)),
        entering(layers, _copies(plain.entries)),
        watching(layers, _copies(plain.exits)),
    ):
        plain.logits = model.model(**batch.inputs, use_cache=False).logits
    return plain


def _copies(kept: dict[int, Tensor]) -> Callable[[int, Tensor], None]:
    return lambda layer, tensor: kept.__setitem__(layer, tensor.clone())  # some models add to it in place


class _FrozenPass:
    """A forward pass with everything frozen, in which all that was written to the stream is a leaf of the graph."""

    def __init__(
        self,
        model: LoadedModel,
        coder: CrossLayerTranscoder,
        plain: _Plain,
        stream: Tensor | float = 0.0,
        writes: Mapping[int, Tensor] | None = None,
    ):
        self.model, self.coder, self.plain, self.changes = model, coder, plain, writes or {}
        self.stream = (plain.entries[0] + stream).requires_grad_()
        added = {layer: plain.between(layer) for layer in range(1, model.n_layers)}
        self.between = {layer: t.requires_grad_() for layer, t in added.items() if t is not None}
        parameters = dict(model.model.named_parameters())
        self.biases = {name: parameters[name].detach().requires_grad_() for name in _bias_layers(model)}
        self.streams, self.reads, self.writes = dict[int, Tensor](), dict[int, Tensor](), dict[int, Tensor]()
        self.skipped, self.skipped_before = dict[int, Tensor](), dict[int, Tensor]()
        for layer, read in plain.reads.items():
            _pass_on(coder, layer, read, self.skipped_before)
        self.logits = torch.empty(0)

    def run(self, batch: Batch, frozen: Frozen) -> "_FrozenPass":
        """Run it; `frozen` records in its first pass and repeats afterwards."""
        sites, kwargs = self.model.sites, {**batch.inputs, "use_cache": False}
        with (
            changing([site.layer for site in sites.layers], self._enter),
            reading(sites, self._read),
            replacing(sites, self._write),
            frozen.forward_pass(),
        ):
            self.logits = functional_call(self.model.model, self.biases, (), kwargs).logits
        return self

    def _enter(self, layer: int, x: Tensor) -> Tensor:
        if layer == 0:
            return self.stream
        return x + (self.between[layer] - self.between[layer].detach()) if layer in self.between else x

    def _read(self, layer: int, x: Tensor) -> None:
        self.streams[layer] = x
        self.reads[layer] = x if self.coder.input_norm is None else self.coder.input_norm(x)
        _pass_on(self.coder, layer, x, self.skipped)

    def _write(self, layer: int) -> Tensor:
        own = self.plain.writes[layer] - self.skipped_before.get(layer, 0.0)
        self.writes[layer] = (own + self.changes.get(layer, 0.0)).requires_grad_()
        return self.writes[layer] + self.skipped.get(layer, 0.0)


def _pass_on(coder: CrossLayerTranscoder, layer: int, x: Tensor, into: dict[int, Tensor]) -> None:
    """Add, by target, what a layer's skip connection passes on."""
    if coder.skip is not None and layer in coder.skip.source_layers:
        parts = coder.skipped(layer, x.to(coder.b_dec)).unflatten(-1, (-1, coder.d_model)).unbind(-2)
        for target, part in zip(coder.skip.targets(layer), parts, strict=True):
            into[target] = into.get(target, 0.0) + part.to(x)


def _bias_layers(model: LoadedModel) -> dict[str, int]:
    """The layer of every bias of the language model, by parameter name; L for those outside of layers."""
    names = {id(parameter): name for name, parameter in model.model.named_parameters()}
    text: Any = model.model
    homes: list[tuple[int, nn.Module]] = [(i, site.layer) for i, site in enumerate(model.sites.layers)]
    homes += [(model.n_layers, part) for part in (text.get_decoder(), text.get_output_embeddings()) if part is not None]
    found: dict[str, int] = {}
    for layer, home in homes:
        for name, parameter in home.named_parameters():
            if name.rpartition(".")[2].endswith("bias"):
                found.setdefault(names[id(parameter)], layer)
    return found


def _crookedness(replay: Callable[..., Any], run: _FrozenPass) -> float:
    """|f(2v) - 2 f(v) + f(0)| / |f(v) - f(0)| of the frozen logits f, for a random change v of the stream."""
    v = torch.randn(run.stream.shape, generator=torch.Generator().manual_seed(0)).to(run.stream)
    v *= run.stream.detach().square().mean().sqrt()
    f = [replay(scale * v, {})[1] for scale in (0.0, 1.0, 2.0)]
    return ((f[2] - 2 * f[1] + f[0]).norm() / (f[1] - f[0]).norm().clamp_min(1e-30)).item()


def _check(model: LoadedModel, gap: float, crooked: float) -> None:
    tolerance = TOLERANCE.get(model.model.dtype, 5e-2)
    if not gap <= tolerance:
        raise UserError(
            f"{model.id}: with attention and norms frozen its activations differ by {gap:.2g} relative "
            f"(at most {tolerance:g}); graphs of it would be wrong, so none is made"
        )
    if not crooked <= tolerance:
        raise UserError(
            f"{model.id}: with attention and norms frozen it is not linear in the stream: {crooked:.2g} relative "
            f"(at most {tolerance:g}); something else in it depends on the stream, so no graph is made"
        )


def _gap(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()
