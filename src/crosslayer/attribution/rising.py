"""The lower half of a graph: sources carried up to a layer in the middle, where the rows of later layers meet them.

A row of a later layer is carried down to the middle alone: one product with what the sources have become there gives
its edges from them. A row below the middle is read off as they pass. So nothing is carried through more than the layers
on its side.

Axes: P positions, Q positions from a band's first, S sources, R rows, K vectors added at one layer, N nodes, D d_model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from crosslayer.attribution.columns import Columns
from crosslayer.attribution.parts import Parts
from crosslayer.attribution.rows import batches, row_bytes
from crosslayer.replacement.lifting import Lift, lifts
from crosslayer.replacement.local import LocalReplacement


@dataclass(frozen=True)
class Origins:
    """Where nodes first add something to the stream."""

    nodes: Int[Tensor, " S"]
    layers: Int[Tensor, " S"]
    positions: Int[Tensor, " S"]

    def only(self, some: Int[Tensor, " some"] | Bool[Tensor, " S"]) -> "Origins":
        """Those of some nodes."""
        return Origins(self.nodes[some], self.layers[some], self.positions[some])


def origins(local: LocalReplacement, parts: Parts, at: Columns) -> Origins:
    """Where every node that adds to the stream below the last layer's write does so first."""
    n, places, first = len(at.features), torch.arange(local.stream.shape[1]), torch.zeros(1, dtype=torch.int64)
    found = [(at.stream, 0, places), *((nodes, layer, places) for layer, nodes in at.between.items())]
    for layer, errors in enumerate(at.errors):
        found += [(at.biases[layer : layer + 1], layer, first), (errors, layer, places)]
    layers = [torch.full_like(nodes, layer) for nodes, layer, _ in found]
    columns = [nodes for nodes, *_ in found], layers, [positions for *_, positions in found]
    features = at.features, parts.first_targets[:n], parts.active.positions[:n].cpu()
    nodes, layers, positions = (torch.cat([*some, more]) for some, more in zip(columns, features, strict=True))
    unique, which = nodes.unique(return_inverse=True)
    least = (
        torch.zeros_like(unique).scatter_reduce_(0, which, x, "amin", include_self=False) for x in (layers, positions)
    )
    return Origins(unique, *least)


def middle_of(local: LocalReplacement, parts: Parts, at: Columns, highest: int, most_bytes: int) -> int:
    """The layer to meet at, so that least is carried and what has risen takes at most so many bytes; 0 for none."""
    if not lifts(local.layers):
        return 0
    found, (P, D), n = origins(local, parts, at), local.stream.shape[1:], len(at.features)
    seen, above = P - found.positions, parts.active.positions[:n].cpu() + 1
    layers = parts.active.layers[:n].cpu()

    def carried(middle: int) -> int:
        up, down = (middle - found.layers).clamp_min(0), (layers + 1 - middle).clamp_min(0)
        return int((up * seen).sum() + (down * above).sum())

    fits = [m for m in range(highest + 1) if seen[found.layers < m].sum() * D * local.stream.itemsize <= most_bytes]
    return min(fits, key=carried)


@dataclass(frozen=True)
class Read:
    """What flows into R nodes from S of those that rise."""

    targets: Int[Tensor, " R"]
    sources: Int[Tensor, " S"]
    edges: Float[Tensor, "R S"]


@dataclass
class _Band:
    """Sources of like positions, in the order of the layers that they come from."""

    origins: Origins
    row: Int[Tensor, " N"]
    """Of every node of the graph: its place here, or -1."""
    first: int
    stream: Float[Tensor, "S Q D"]
    """What those so far add to it, on the positions from the first one on; 0 for those that come later."""

    def widen(self, first: int) -> None:
        """Begin at an earlier position, where it must."""
        if first < self.first:
            self.stream, self.first = pad(self.stream, (0, 0, self.first - first, 0)), first

    def add(
        self, onto: Float[Tensor, "S Q D"], nodes: Tensor, positions: Tensor, vectors: Float[Tensor, "K D"]
    ) -> None:
        """Add what is of these sources, in place."""
        row = self.row[nodes]
        mine = (row >= 0).nonzero().squeeze(1)
        places = row[mine].to(onto.device), (positions[mine] - self.first).to(onto.device)
        onto.index_put_(places, vectors[mine.to(vectors.device)].to(onto), accumulate=True)


class Rising:
    """All that is added to the stream below a layer, carried up to it.

    Args:
        local: the prompt.
        parts: what its stream is a sum of.
        at: the nodes of the graph that its parts belong to.
        middle: the layer.
        n_nodes: of the graph.
        most_bytes: what a layer's pass may take.
    """

    def __init__(self, local: LocalReplacement, parts: Parts, at: Columns, middle: int, n_nodes: int, most_bytes: int):
        self.local, self.parts, self.at, self.middle, self.n_nodes = local, parts, at, middle, n_nodes
        self.places = torch.arange(local.stream.shape[1])
        found = origins(local, parts, at)
        found = found.only(found.layers < middle)
        last = (len(self.places) - 1 - found.positions).tolist()
        together = batches(last, partial(row_bytes, local), most_bytes)
        self.bands = [self._band(found.only(torch.tensor(some))) for some in together]

    def _band(self, some: Origins) -> _Band:
        some, first = some.only(some.layers.argsort(stable=True)), int(some.positions.min())
        row = torch.full((self.n_nodes,), -1).index_put_((some.nodes,), torch.arange(len(some.nodes)))
        return _Band(
            some, row, first, self.local.stream.new_zeros(len(some.nodes), *self.local.stream[0, first:].shape)
        )

    @torch.no_grad()
    def rows(self) -> Iterator[Read]:
        """The rows of all features below the layer, as the sources rise."""
        for layer in range(self.middle):
            lift, written = Lift(self.local.layers, layer), self._written(layer)
            for band in self.bands:
                n = int((band.origins.layers <= layer).sum())
                if n:
                    yield self._read(layer, band, self._risen(layer, lift, band, n, written))

    def _risen(
        self, layer: int, lift: Lift, band: _Band, n: int, written: tuple[Tensor, Tensor, Tensor]
    ) -> Float[Tensor, "S Q D"]:
        """Carry the first n sources of a band up one layer; what its encoder reads of them."""
        section, bias = lift.section(band.first), int(band.row[self.at.biases[layer]])
        band.widen(section.first)
        stream, entering = band.stream[:n], int((band.origins.layers < layer).sum())
        for nodes, added in self._entering(layer):
            band.add(stream, nodes, self.places, added)
            entering = n
        write = torch.zeros_like(stream)
        band.add(write, *written)
        read = section.up(stream, write, entering)
        biases = lift.whole.biases() if bias >= 0 else None
        if biases is not None:
            read[bias] += biases[0]
            stream[bias] += biases[1]
        return read

    def _entering(self, layer: int) -> list[tuple[Int[Tensor, " P"], Float[Tensor, "P D"]]]:
        """Nodes that add to the stream as it enters a layer, and what they add at each position."""
        found = [(self.at.stream, self.local.stream[0])] if layer == 0 else []
        if layer in self.local.between:
            found.append((self.at.between[layer], self.local.between[layer][0]))
        return found

    def _written(self, layer: int) -> tuple[Int[Tensor, " K"], Int[Tensor, " K"], Float[Tensor, "K D"]]:
        """Nodes, positions and vectors of all that is written to a layer, in the order of `Written.terms`."""
        written, by_position = self.parts.written[layer], self.parts.by_position.cpu()
        bias, nodes = self.at.biases[layer : layer + 1], list[Tensor]()
        for start, count, error in zip(written.starts, written.counts, self.at.errors[layer, :, None], strict=True):
            nodes += [self.at.features[by_position[start : start + count]], error, bias]
        return torch.cat(nodes), self.places.repeat_interleave(torch.tensor(written.counts) + 2), written.terms

    def _read(self, layer: int, band: _Band, read: Float[Tensor, "S Q D"]) -> Read:
        active, n = self.parts.active, len(self.at.features)
        start, end = torch.searchsorted(active.layers[:n].cpu(), torch.tensor([layer, layer + 1])).tolist()
        each, at = read.new_zeros(end - start, len(read)), start
        for p, count in enumerate(active.positions[start:end].bincount(minlength=len(self.places)).tolist()):
            if p >= band.first:
                each[at - start : at - start + count] = active.directions[at : at + count] @ read[:, p - band.first].T
            at += count
        bias = int(band.row[self.at.biases[layer]])
        if bias >= 0:
            each[:, bias] += active.bias[start:end]
        nodes, row = self.at.features[start:end].unique(return_inverse=True)
        edges = each.new_zeros(len(nodes), len(read)).index_add_(0, row.to(each.device), each)
        return Read(nodes, band.origins.nodes[: len(read)], edges)

    def add_met(self, grad: Float[Tensor, "R Q D"], found: Float[Tensor, "R N"]) -> None:
        """Add what flows into rows from each node, given what they get per unit of the stream that enters the layer."""
        for band in self.bands:
            edges = grad.new_zeros(len(grad), len(band.origins.nodes))
            for p in range(band.first, grad.shape[1]):
                edges.addmm_(grad[:, p], band.stream[: edges.shape[1], p - band.first].T)
            found.index_add_(1, band.origins.nodes, edges.to(found.device))
