"""Carrying what enters the stream up through the frozen layers of one prompt: the transpose of `carrying`.

A transposed Jacobian is linear in the directions that it is applied to; so a pass back through that pass back is the
Jacobian itself, and no model needs a forward mode. What is added at a position changes that one and later ones alone;
a layer is cut there, its frozen factors with it.

Axes: P positions, Q positions from the first that is changed, R sources, D d_model.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.models.freezing import Frozen
from crosslayer.replacement.carrying import Layers, Run, cut, pull, same, stretches


@dataclass(frozen=True)
class Section:
    """A layer on the positions from `first` on: a pass back through it, with a graph of its own from its directions."""

    first: int
    along: tuple[Tensor, Tensor]
    """Directions of what the layer's encoder reads, and of the stream that leaves the layer."""
    entry: Tensor
    write: Tensor
    back_to_biases: tuple[tuple[Tensor, Tensor], ...]
    """Each with the bias itself."""

    def up(
        self, stream: Float[Tensor, "R Q D"], write: Float[Tensor, "R Q D"], entering: int
    ) -> Float[Tensor, "R Q D"]:
        """What R changes do to what the layer's encoder reads.

        Args:
            stream: what is added to it as it enters the layer; becomes, in place, what changes in it as it leaves.
            write: what is added to what the layer's MLP writes.
            entering: how many, the first ones, add to the stream that enters; the others are written here first.
        """
        reads = torch.empty_like(stream)
        for outputs, start, end in (((self.entry, self.write), 0, entering), ((self.write,), entering, len(stream))):
            for some in stretches(start, end, stream):
                added = {self.entry: stream[some, None], self.write: write[some, None]}
                read, output = pull({into: added[into].to(into) for into in outputs}, list(self.along))
                reads[some], stream[some] = read[:, 0], output[:, 0]  # in this order: some encoders read what enters
        return reads

    def biases(self) -> tuple[Float[Tensor, "Q D"], Float[Tensor, "Q D"]] | None:
        """What the layer's own biases add to what is read and to what leaves it; None where it has none that count."""
        if not self.back_to_biases:
            return None
        read, output = pull({back: bias.detach()[None] for back, bias in self.back_to_biases}, list(self.along))
        return read[0, 0], output[0, 0]


def lifts(layers: Layers) -> bool:
    """Whether all goes from layer to layer by the stream: no skip connection leads to a later layer."""
    skip = layers.coder.skip
    return skip is None or all(set(skip.targets(layer)) <= {layer} for layer in skip.source_layers)


class Lift:
    """One frozen layer, upwards; of models and transcoders that `lifts` holds for."""

    def __init__(self, layers: Layers, layer: int):
        self.layers, self.layer, self.frozen = layers, layer, Frozen()
        call = layers.calls[layer]
        self.n_positions = call.entry.shape[1]
        generator = torch.Generator().manual_seed(0)
        along = tuple(torch.randn(x.shape, generator=generator).to(x) for x in (call.read, call.output))
        self.whole = self._section(0, self.frozen, along)

    def section(self, first: int) -> Section:
        """The layer on the positions from `first` on; on all where it cannot be cut there."""
        if first == 0 or self.layer in self.layers.uncut:
            return self.whole
        places = slice(first, self.n_positions)
        try:
            frozen = self.frozen.changed(lambda factor: cut(factor, self.n_positions, places))
            part = self._section(first, frozen, tuple(along[:, places] for along in self.whole.along))
        except RuntimeError:  # an axis of another meaning has as many places as the prompt positions
            part = None
        if part is not None and same(part.entry, self.whole.entry[:, places]):
            return part
        self.layers.uncut.add(self.layer)
        return self.whole

    def _section(self, first: int, frozen: Frozen, along: tuple[Tensor, ...]) -> Section:
        run: Run = self.layers.forward(self.layer, slice(first, self.n_positions), frozen)
        read, output = (direction.detach().requires_grad_() for direction in along)
        leaves = [run.entry, run.write, *run.biases.values()]
        with torch.enable_grad():
            entry, write, *biases = torch.autograd.grad(
                [run.read, run.output], leaves, [read, output], create_graph=True, allow_unused=True
            )
        pairs = zip(biases, run.biases.values(), strict=True)
        return Section(first, (read, output), entry, write, tuple((b, bias) for b, bias in pairs if b is not None))
