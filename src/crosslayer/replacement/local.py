"""The local replacement model: for one prompt, everything between an MLP's write and a later read is linear.

Attention patterns and norm denominators are held at the prompt's values, and every MLP's write is a number of its own:
what the transcoder reconstructs plus an error. The model's own activations and logits come out, only now each is a sum
over what was written. Source: "Circuit Tracing" (Anthropic 2025), section "The local replacement model".

Axes: P positions, K of them, the last ones, whose logits are wanted, R rows (targets whose sources are asked for),
D d_model, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.mapped import give_back
from crosslayer.models.freezing import Frozen, eager_attention
from crosslayer.models.hooks import calling, changing, entering, reading, recording, replacing, watching
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch
from crosslayer.replacement.carrying import Call, Layers, Sources, Step, gap, pull, skipped

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest relative gap allowed between the local replacement model and the model itself, by the model's dtype.

Models in float64 compute some norms and patterns in float32 all the same.
"""


@dataclass(frozen=True)
class LocalReplacement:
    """One prompt, traced; `trace` makes it."""

    logits: Float[Tensor, "1 K V"]
    reads: tuple[Float[Tensor, "1 P D"], ...]
    """What each layer's encoder reads, after a norm of the transcoder's own."""
    stream: Float[Tensor, "1 P D"]
    """What enters the first layer: embeddings of tokens and image patches, with positions where those are added."""
    writes: tuple[Float[Tensor, "1 P D"], ...]
    """What each MLP writes, but for skip connections, which are part of the paths."""
    between: dict[int, Float[Tensor, "1 P D"]]
    """What is added to the stream as it enters a later layer (DeepStack)."""
    gap: float
    """|activations and logits - the model's own|, relative, at worst."""
    replay: Callable[[Tensor | float, Mapping[int, Tensor]], tuple[tuple[Tensor, ...], Tensor]]
    """Reads and logits after adding something to the stream that enters, and to writes by layer, all else frozen."""

    layers: Layers
    """What rows are carried down through."""
    head: "_FrozenPass"
    """With a graph from what enters the last layer to the logits."""

    @property
    def n_layers(self) -> int:
        """Decoder layers L."""
        return len(self.reads)

    @cached_property
    def n_heads(self) -> int:
        """Of attention in a layer."""
        return getattr(self.layers.model.model.config.get_text_config(), "num_attention_heads", 1)

    def logits_at(self, position: int) -> Float[Tensor, " V"]:
        """Those of one position, which must be among the wanted ones; negative ones count from the end."""
        return self.logits[0, self._from_the_end(position)]

    def _from_the_end(self, position: int) -> int:
        n_positions = self.stream.shape[1]
        return position % n_positions - n_positions

    def rest(self) -> None:
        """Let go of the model's weights, as far as they are maps of its files, until a layer is next run."""
        give_back(self.layers.model.model.parameters())

    def into_reads(
        self,
        layer: Int[Tensor, " R"],
        position: Int[Tensor, " E"],
        vectors: Float[Tensor, "E D"],
        row: Int[Tensor, " E"] | None = None,
    ) -> Sources:
        """What flows into the sum of `vectors[e] . read` at `position[e]` over all e of a row, at the row's layer.

        Rows of later layers must come first, and entries in the order of their rows; by default each is a row.
        """
        row = torch.arange(len(vectors), device=position.device) if row is None else row
        return Sources(len(layer), self.layers.into_reads(layer, position, vectors, row))

    def into_logits(self, position: int, vectors: Float[Tensor, "R V"]) -> Sources:
        """What flows into `vectors[r] . logits` at a position."""
        return Sources(len(vectors), self._from_logits(position, vectors))

    @torch.no_grad()
    def _from_logits(self, position: int, vectors: Tensor) -> Iterator[Step]:
        last, head = self.n_layers - 1, self.head
        leaves = [head.entries[last], head.writes[last], *head.biases.values()]
        with torch.enable_grad():
            logits = head.logits[:, self._from_the_end(position)]
        entry, write, *grads = pull({logits: vectors[:, None].to(logits)}, leaves)
        biases = {at: entry.new_zeros(len(vectors)) for at in (last, last + 1)}
        for (name, bias), grad in zip(head.biases.items(), grads, strict=True):
            biases[head.bias_layers[name]] += (grad * bias).flatten(1).sum(1)
        step = Step(last, write[:, 0].to(entry), entry[:, 0], biases)
        yield step
        yield from self.layers.onward(step)


def trace(model: LoadedModel, coder: CrossLayerTranscoder, batch: Batch, logits_from: int = 0) -> LocalReplacement:
    """The local replacement model of one prompt, with logits of the position `logits_from` and later ones.

    Raises:
        UserError: when what is frozen does not make the model linear, with what was measured.
    """
    frozen, kept = Frozen(), partial(_last_logits, model, batch.tokens.shape[1] - logits_from)
    with eager_attention(model.model), kept():
        plain = _plain_pass(model, batch)
        run = _FrozenPass(model, coder, plain).run(batch, frozen)

    @torch.no_grad()
    def replay(stream: Tensor | float, writes: Mapping[int, Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        with eager_attention(model.model), kept():
            again = _FrozenPass(model, coder, plain, stream, writes).run(batch, frozen)
        return tuple(again.reads[layer] for layer in range(model.n_layers)), again.logits

    n = model.n_layers
    wrong = max(*(gap(run.streams[layer], plain.reads[layer]) for layer in range(n)), gap(run.logits, plain.logits))
    _check(model, wrong, _crookedness(replay, run))
    return LocalReplacement(
        run.logits.detach(),
        tuple(run.reads[layer] for layer in range(n)),
        run.stream,
        tuple(run.writes[layer] for layer in range(n)),
        run.between,
        wrong,
        replay,
        Layers(model, coder, tuple(run.call(layer) for layer in range(n))),
        run,
    )


def _last_logits(model: LoadedModel, n: int) -> AbstractContextManager[None]:
    """Inside, logits of the last n positions alone are computed; some models' own setting for it changes layers too."""
    output = model.model.get_output_embeddings()
    return changing([] if output is None else [output], lambda _, x: x[:, -n:])


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
    """A forward pass with everything frozen; what enters and is written by the last layer is a leaf of its graph."""

    def __init__(
        self,
        model: LoadedModel,
        coder: CrossLayerTranscoder,
        plain: _Plain,
        stream: Tensor | float = 0.0,
        writes: Mapping[int, Tensor] | None = None,
    ):
        self.model, self.coder, self.plain, self.changes = model, coder, plain, writes or {}
        self.last = model.n_layers - 1
        self.stream = plain.entries[0] + stream
        added = {layer: plain.between(layer) for layer in range(1, model.n_layers)}
        self.between = {layer: tensor for layer, tensor in added.items() if tensor is not None}
        found = _bias_layers(model) if torch.is_grad_enabled() else {}
        self.bias_layers = {name: at for name, at in found.items() if at >= self.last}
        self.biases = {name: model.model.get_parameter(name).detach().requires_grad_() for name in self.bias_layers}
        self.entries, self.calls = dict[int, Tensor](), dict[int, tuple[tuple, dict[str, Any]]]()
        self.streams, self.reads, self.outputs = dict[int, Tensor](), dict[int, Tensor](), dict[int, Tensor]()
        self.writes, self.whole_writes = dict[int, Tensor](), dict[int, Tensor]()
        self.passed, self.passed_before = dict[int, Tensor](), dict[int, Tensor]()
        for layer, read in plain.reads.items():
            _add(skipped(coder, layer, read), self.passed_before)
        self.logits = torch.empty(0)

    def run(self, batch: Batch, frozen: Frozen) -> "_FrozenPass":
        """Run it; `frozen` records in its first pass and repeats afterwards."""
        sites, kwargs = self.model.sites, {**batch.inputs, "use_cache": False}
        layers = [site.layer for site in sites.layers]
        with (
            changing(layers, self._enter),
            calling(layers, self._called),
            reading(sites, self._read),
            replacing(sites, self._write),
            watching(layers, lambda layer, x: self.outputs.__setitem__(layer, x.detach().clone())),
            frozen.forward_pass(),
        ):
            self.logits = functional_call(self.model.model, self.biases, (), kwargs).logits
        return self

    def call(self, layer: int) -> Call:
        """How a layer was called, and what came of it."""
        found = (self.reads[layer], self.whole_writes[layer], self.outputs[layer])
        return Call(self.entries[layer].detach(), *self.calls[layer], *found)

    def _enter(self, layer: int, x: Tensor) -> Tensor:
        x = (self.stream if layer == 0 else x).detach().clone()  # a copy, as some models add to it in place
        self.entries[layer] = x.requires_grad_(layer == self.last and torch.is_grad_enabled())
        return self.entries[layer].clone()

    def _called(self, layer: int, args: tuple, kwargs: dict[str, Any]) -> None:
        self.calls[layer] = args, kwargs

    def _read(self, layer: int, x: Tensor) -> None:
        self.streams[layer] = x.detach()
        self.reads[layer] = (x if self.coder.input_norm is None else self.coder.input_norm(x)).detach()
        _add(skipped(self.coder, layer, x), self.passed)

    def _write(self, layer: int) -> Tensor:
        own = self.plain.writes[layer] - self.passed_before.get(layer, 0.0) + self.changes.get(layer, 0.0)
        self.writes[layer] = own.detach().requires_grad_(layer == self.last and torch.is_grad_enabled())
        whole = self.writes[layer] + self.passed.get(layer, 0.0)
        self.whole_writes[layer] = whole.detach()
        return whole


def _add(parts: Mapping[int, Tensor], into: dict[int, Tensor]) -> None:
    for target, part in parts.items():
        into[target] = into.get(target, 0.0) + part


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
    """|f(2v) - 2 f(v) + f(0)| / |f(v) - f(0)| for a random change v of the stream.

    The larger one of f the logits and f what the last layer reads, which is of all positions.
    """
    v = torch.randn(run.stream.shape, generator=torch.Generator().manual_seed(0)).to(run.stream)
    v *= run.stream.square().mean().sqrt()
    (reads, logits), (reads_of_two, logits_of_two) = (replay(scale * v, {}) for scale in (1.0, 2.0))
    of_reads = run.reads[run.last], reads[-1], reads_of_two[-1]
    of_logits = run.logits.detach(), logits, logits_of_two
    return max(((c - 2 * b + a).norm() / (b - a).norm().clamp_min(1e-30)).item() for a, b, c in (of_reads, of_logits))


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
