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
from torch.nn.functional import pad

from crosslayer.models.freezing import Frozen
from crosslayer.replacement.carrying import Layers, Run, cut, pull, same


@dataclass(frozen=True)
class Lifted:
    """What R sources change at one layer, on the positions from `first` on."""

    first: int
    read: Float[Tensor, "R Q D"]
    """What the layer's encoder reads."""
    output: Float[Tensor, "R Q D"]
    """The stream that leaves the layer."""


@dataclass(frozen=True)
class _Back:
    """A pass back through a layer, with a graph of its own from its directions."""

    along: tuple[Tensor, Tensor]
    """Directions of what is read, and of the output."""
    entry: Tensor
    write: Tensor
    biases: tuple[tuple[Tensor, Tensor], ...]
    """Each with the bias itself."""


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
        self.whole = self._back(slice(0, self.n_positions), self.frozen, along)

    def up(self, first: int, entry: Float[Tensor, "R Q D"], write: Float[Tensor, "R Q D"]) -> Lifted:
        """What comes of changes to the positions from `first` on.

        Args:
            first: the first position that is changed.
            entry: what is added to the stream as it enters the layer.
            write: what is added to what its MLP writes.
        """
        back = self._from(first)
        if back is self.whole:
            entry, write, first = (*(pad(added, (0, 0, first, 0)) for added in (entry, write)), 0)
        read, output = pull({back.entry: entry[:, None], back.write: write[:, None]}, list(back.along))
        return Lifted(first, read[:, 0].to(entry), output[:, 0].to(entry))

    def biases(self) -> Lifted | None:
        """What the layer's own biases add, as one source; None where it has none that count."""
        if not self.whole.biases:
            return None
        found = pull({back: bias.detach()[None] for back, bias in self.whole.biases}, list(self.whole.along))
        return Lifted(0, *(part[:, 0] for part in found))

    def _from(self, first: int) -> _Back:
        """The layer on the positions from `first` on; on all where it cannot be cut there."""
        if first == 0 or self.layer in self.layers.uncut:
            return self.whole
        places = slice(first, self.n_positions)
        try:
            frozen = self.frozen.changed(lambda factor: cut(factor, self.n_positions, places))
            part = self._back(places, frozen, tuple(along[:, places] for along in self.whole.along))
        except RuntimeError:  # an axis of another meaning has as many places as the prompt positions
            part = None
        if part is not None and same(part.entry, self.whole.entry[:, places]):
            return part
        self.layers.uncut.add(self.layer)
        return self.whole

    def _back(self, places: slice, frozen: Frozen, along: tuple[Tensor, ...]) -> _Back:
        run: Run = self.layers.forward(self.layer, places, frozen)
        read, output = (direction.detach().requires_grad_() for direction in along)
        leaves = [run.entry, run.write, *run.biases.values()]
        with torch.enable_grad():
            entry, write, *biases = torch.autograd.grad(
                [run.read, run.output], leaves, [read, output], create_graph=True, allow_unused=True
            )
        pairs = zip(biases, run.biases.values(), strict=True)
        return _Back((read, output), entry, write, tuple((back, bias) for back, bias in pairs if back is not None))
