"""Carrying what flows into many rows down through the frozen layers, one layer at a time.

The graph of the frozen model is cut where the stream enters a layer: a row joins at its own layer and its gradient is
carried from there to the first. A layer is run anew for each batch of rows, on the positions that these can see alone.

Axes: P positions, Q positions from the first that a batch of rows can see, R rows, D d_model.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import pad
from torch.utils._pytree import tree_map

from crosslayer.coders.products import quick_products
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.models.freezing import Frozen, eager_attention
from crosslayer.models.hooks import changing, reading, replacing
from crosslayer.models.load import LoadedModel

PREFIX = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Largest relative gap between a layer on the first positions alone and the same within the whole prompt, by dtype.

An image block that attends both ways and is cut in two misses it by orders of magnitude.
"""
AT_ONCE = 768
"""Positions of rows that pass through a layer together on a CPU: what they need on the way stays in its caches."""


@dataclass(frozen=True)
class Step:
    """What flows into rows at one layer; R rows for what enters it, the first N of them for what it writes.

    Its gradients are overwritten as the next layer's are computed.
    """

    layer: int
    write: Float[Tensor, "N Q D"]
    """Per unit of its MLP's write; of the rows of later layers, which come first."""
    entry: Float[Tensor, "R Q D"]
    """Per unit of what is added to the stream as it enters the layer."""
    biases: dict[int, Float[Tensor, " R"]]
    """From the model's own biases, by layer; L for those after all layers."""


@dataclass(frozen=True)
class Sources:
    """What flows into R rows: layers from the last to the first, to be gone through once."""

    n_rows: int
    steps: Iterator[Step]


@dataclass(frozen=True)
class Call:
    """How the whole prompt's forward pass called a layer, and what came of it."""

    entry: Float[Tensor, "1 P D"]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    read: Float[Tensor, "1 P D"]
    """After a norm of the transcoder's own."""
    write: Float[Tensor, "1 P D"]
    """Of the MLP, skip connections included."""
    output: Float[Tensor, "1 P D"]


@dataclass
class Run:
    """One frozen layer's graph on some positions."""

    entry: Tensor
    write: Tensor
    biases: dict[str, Tensor]
    passed: dict[int, Tensor] = field(default_factory=dict)
    """What its skip connections pass on, by the layer they write to."""
    read: Tensor = field(default_factory=lambda: torch.empty(0))
    output: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Layers:
    """The frozen layers of one prompt."""

    model: LoadedModel
    coder: CrossLayerTranscoder
    calls: tuple[Call, ...]
    uncut: set[int] = field(default_factory=set)
    """Layers found to need the whole prompt."""

    def into_reads(
        self,
        layer: Int[Tensor, " R"],
        position: Int[Tensor, " E"],
        vectors: Float[Tensor, "E D"],
        row: Int[Tensor, " E"],
    ) -> Iterator[Step]:
        """What flows into the sum of `vectors[e] . read` at `position[e]` over all e of a row, at the row's layer.

        Args:
            layer: of each row; must not rise.
            position: of each entry.
            vectors: of each entry.
            row: of each entry; must not fall.
        """
        first, *_ = self.calls
        nothing = first.entry.new_zeros(0, int(position.max()) + 1, vectors.shape[1])
        start = Step(int(layer[0]) + 1, nothing, nothing, {})
        return self._down(start, layer.tolist(), position, vectors, row)

    def onward(self, step: Step) -> Iterator[Step]:
        """What comes after a first step."""
        none = torch.zeros(0, dtype=torch.int64)
        return self._down(step, [], none, step.entry.new_zeros(0, step.entry.shape[2]), none)

    @torch.no_grad()
    def _down(self, step: Step, layers: list[int], position: Tensor, vectors: Tensor, row: Tensor) -> Iterator[Step]:
        passed, ahead, n = {step.layer: step.write}, step.entry, len(step.entry)
        ahead = pad(ahead, (0, 0, 0, 0, 0, max(n, len(layers)) - n))
        space = torch.empty_like(ahead)
        for layer in range(step.layer - 1, -1, -1):
            run, end = self._run(layer, ahead.shape[1]), n + layers.count(layer)
            if run.entry.shape[1] > ahead.shape[1]:
                ahead = pad(ahead, (0, 0, 0, run.entry.shape[1] - ahead.shape[1]))
                space = torch.empty_like(ahead)
            mine = (row >= n) & (row < end)
            ahead[n:end].zero_().index_put_((row[mine] - n, position[mine]), vectors[mine].to(ahead), accumulate=True)
            biases = ahead.new_zeros(end)
            for some in stretches(0, n, ahead):
                write, space[some], biases[some] = _back(run, {run.output: ahead[some]} | _skips(run, passed, some))
                if write.data_ptr() != ahead[some].data_ptr():  # mostly it is what is ahead itself
                    ahead[some] = write
            for some in stretches(n, end, ahead):
                _, space[some], biases[some] = _back(run, {run.read: ahead[some]})
            write, ahead, space = ahead[:n], space, ahead
            if self.coder.skip is not None:
                passed[layer] = write.clone()
            yield Step(layer, write, ahead[:end], {layer: biases})
            n = end

    def _run(self, layer: int, n_positions: int) -> Run:
        """A layer's graph on the first positions; on all where it cannot be cut there."""
        call, whole = self.calls[layer], self.calls[layer].entry.shape[1]
        if n_positions < whole and layer not in self.uncut:
            try:
                run = self.forward(layer, slice(0, n_positions), Frozen())
            except RuntimeError:  # an axis of another meaning has as many places as the prompt positions
                run = None
            if run is not None and _reproduces(run, call):
                return run
            self.uncut.add(layer)
        return self.forward(layer, slice(0, whole), Frozen())

    @torch.enable_grad()
    def forward(self, layer: int, places: slice, frozen: Frozen) -> Run:
        """A layer's graph on some positions.

        Raises:
            RuntimeError: when it cannot be cut there, though not always.
        """
        call, site = self.calls[layer], self.model.sites.layers[layer]
        entry, write = (_leaf(tensor[:, places]) for tensor in (call.entry, call.write))
        names = [name for name, _ in site.layer.named_parameters() if name.rpartition(".")[2].endswith("bias")]
        run = Run(entry, write, {name: _leaf(site.layer.get_parameter(name)) for name in names})
        args, kwargs = tree_map(lambda value: cut(value, call.entry.shape[1], places), (call.args, call.kwargs))
        alone = replace(self.model.sites, layers=(site,))

        def read(_: int, x: Tensor) -> None:
            run.read = x if self.coder.input_norm is None else self.coder.input_norm(x)
            run.passed |= skipped(self.coder, layer, x)

        def written(_: int) -> Tensor:
            own = run.passed.pop(layer, torch.zeros(()))
            return write + (own - own.detach())

        with (
            eager_attention(site.layer),
            changing([site.layer], lambda *_: entry.clone()),  # a copy, as some models add to it in place
            reading(alone, read),
            replacing(alone, written),
            frozen.forward_pass(),
        ):
            output = functional_call(site.layer, run.biases, args, dict(kwargs))
        run.output = output if isinstance(output, Tensor) else output[0]
        return run


def stretches(start: int, end: int, like: Float[Tensor, "R Q D"]) -> Iterator[slice]:
    """Rows from `start` to before `end`, so many at a time as one pass takes; all on a GPU."""
    step = rows_at_once(like)
    return (slice(first, min(first + step, end)) for first in range(start, end, step))


def rows_at_once(like: Float[Tensor, "R Q D"]) -> int:
    """Rows of as many positions that pass through a layer together."""
    return max(1, AT_ONCE // like.shape[1]) if like.device.type == "cpu" else max(1, len(like))


def skipped(coder: CrossLayerTranscoder, layer: int, x: Tensor) -> dict[int, Tensor]:
    """What a layer's skip connections pass on, by the layer they write to."""
    if coder.skip is None or layer not in coder.skip.source_layers:
        return {}
    parts = coder.skipped(layer, x.to(coder.b_dec)).unflatten(-1, (-1, coder.d_model)).unbind(-2)
    return {target: part.to(x) for target, part in zip(coder.skip.targets(layer), parts, strict=True)}


def pull(outputs: Mapping[Tensor, Float[Tensor, "R ..."]], leaves: list[Tensor]) -> list[Float[Tensor, "R ..."]]:
    """The transposed Jacobian from leaves to outputs, times R directions."""
    n = len(next(iter(outputs.values())))
    settings: dict[str, Any] = {"allow_unused": True, "is_grads_batched": True, "retain_graph": True}
    whole = n == rows_at_once(leaves[0])  # another number of rows would be another shape, which oneDNN compiles anew
    with quick_products() if whole else nullcontext():
        found = torch.autograd.grad(list(outputs), leaves, list(outputs.values()), **settings)
    return [leaf.new_zeros(n, *leaf.shape) if grad is None else grad for grad, leaf in zip(found, leaves, strict=True)]


def _back(run: Run, outputs: Mapping[Tensor, Float[Tensor, "R Q D"]]) -> tuple[Tensor, Tensor, Tensor]:
    """What flows into rows of what the layer's MLP writes, of what enters the layer, and of its biases in all."""
    along = {output: grad[:, None].to(output) for output, grad in outputs.items()}
    entry, write, *biases = pull(along, [run.entry, run.write, *run.biases.values()])
    own = sum(
        ((grad * bias).flatten(1).sum(1) for grad, bias in zip(biases, run.biases.values(), strict=True)),
        entry.new_zeros(len(entry)),
    )
    return write[:, 0], entry[:, 0], own


def _skips(run: Run, passed: Mapping[int, Tensor], some: slice) -> dict[Tensor, Float[Tensor, "R Q D"]]:
    """What flows into some rows of what the layer's skip connections pass on."""
    found = {}
    for target, part in run.passed.items():
        if target in passed:
            grad = passed[target][some]
            missing = some.stop - some.start - len(grad)
            found[part] = pad(grad, (0, 0, 0, part.shape[1] - grad.shape[1], 0, missing))
    return found


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def cut(value: Any, whole: int, places: slice) -> Any:
    """Some places of a tensor along every axis that has as many as the prompt positions."""
    if isinstance(value, Tensor):
        return value[tuple(places if size == whole else slice(None) for size in value.shape)]
    return value


def _reproduces(run: Run, call: Call) -> bool:
    pairs = ((run.read, call.read), (run.output, call.output))
    return all(same(found, wanted[:, : found.shape[1]]) for found, wanted in pairs)


def same(found: Tensor, wanted: Tensor) -> bool:
    """Whether a layer on some positions gives what it gives on all."""
    return gap(found, wanted) <= PREFIX.get(wanted.dtype, 2e-2)


def gap(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted|, relative to the largest wanted, at worst."""
    return ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()
