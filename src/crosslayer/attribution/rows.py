"""The rows of an attribution graph: what every earlier thing contributes to each target.

An edge is what its source adds to the stream, times the frozen Jacobian down to the target's read, times the target's
own direction: a_s W_dec[s -> l] . J(l -> t) . W_enc[t], summed over the layers l that the source writes to and that
lie before the target. Source: "Circuit Tracing" (Anthropic 2025), section "Constructing an attribution graph".

Axes: P positions, Q positions that a batch of rows can see, R rows, L layers, D d_model, A active features.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.attribution.parts import Parts, Written
from crosslayer.replacement.carrying import Sources
from crosslayer.replacement.local import LocalReplacement

IN_VAIN = 512
"""Positions that a batch's rows may carry together without seeing them, before another batch is cheaper.

A batch costs about 2 ms a layer on one thread of a CPU beside its products, as many as 300 to 600 positions of a row
of a small model take.
"""
COPIES = 10
"""Times that a gradient is held at once at most, in a layer's pass back on a GPU; on a CPU, a third."""


@dataclass(frozen=True)
class Rows:
    """What flows into R targets, in absolute numbers; the columns of all parts add up to the pre-activations."""

    stream: Float[Tensor, "R P"]
    between: dict[int, Float[Tensor, "R P"]]
    biases: Float[Tensor, "R L_plus_1"]
    features: Float[Tensor, "R A"]
    """As in `Parts.active`; 0 for those that cannot reach the target."""
    errors: Float[Tensor, "R L P"]
    entry: Float[Tensor, "R Q D"]
    """Per unit of what enters the lowest layer that they were carried to."""

    def total(self) -> Float[Tensor, " R"]:
        """The sum of each row."""
        parts = [self.stream, *self.between.values(), self.biases, self.features, self.errors.flatten(1)]
        return torch.stack([part.sum(1) for part in parts]).sum(0)


@torch.no_grad()
def rows_of(local: LocalReplacement, parts: Parts, sources: Sources, lowest: int = 0) -> Rows:
    """The contributions to targets whose `sources` are known, of those at the lowest layer and above it."""
    R, (L, P), like = sources.n_rows, parts.errors.shape[:2], local.stream
    rows = Rows(
        like.new_zeros(R, P),
        {layer: like.new_zeros(R, P) for layer in local.between},
        like.new_zeros(R, L + 1),
        like.new_zeros(R, parts.n_features),
        like.new_zeros(R, L, P),
        like.new_zeros(R, 0, like.shape[2]),
    )
    for step in sources.steps:
        for layer, found in step.biases.items():
            rows.biases[: len(found), layer] += found
        if len(step.write):
            _add_written(step.write, parts.written[step.layer], rows, step.layer)
        if step.layer in local.between:
            _add_entering(step.entry, local.between[step.layer][0], rows.between[step.layer])
        if step.layer == 0:
            _add_entering(step.entry, local.stream[0], rows.stream)
        if step.layer == lowest:
            rows = replace(rows, entry=step.entry)
            break
    rows.features[:, parts.by_position] = rows.features.clone()
    return rows


def _add_written(grad: Float[Tensor, "N Q D"], written: Written, rows: Rows, layer: int) -> None:
    """One product a position, features in the order of their positions: no gradient is copied for each of them."""
    n, end = len(grad), 0
    for p, back in enumerate(grad.unbind(1)):
        count, start = written.counts[p], written.starts[p]
        end += count + 2
        found = back @ written.terms[end - count - 2 : end].T
        rows.features[:n, start : start + count] += found[:, :count]
        rows.errors[:n, layer, p] += found[:, count]
        rows.biases[:n, layer] += found[:, count + 1]


def _add_entering(grad: Float[Tensor, "N Q D"], what: Float[Tensor, "P D"], into: Float[Tensor, "R P"]) -> None:
    n, Q = grad.shape[:2]
    into[:n, :Q] += torch.einsum("npd,pd->np", grad, what[:Q])


def feature_rows(
    local: LocalReplacement,
    parts: Parts,
    chosen: Int[Tensor, " C"],
    most_bytes: int,
    row: Int[Tensor, " C"] | None = None,
    lowest: int = 0,
) -> Iterator[tuple[Int[Tensor, " R"], Rows]]:
    """The rows of some active features in batches, each with the numbers of its rows.

    Args:
        local: the prompt.
        parts: what its stream is a sum of.
        chosen: numbers of features in `Parts.active`.
        most_bytes: what the gradients of one batch may take.
        row: which row each is part of, from 0 on; a row is the sum of its features' own, which are all of one layer. By
            default each has its own.
        lowest: the layer that they are carried down to; none may be of an earlier one.
    """
    active = parts.active
    row = torch.arange(len(chosen)) if row is None else row
    n_rows = int(row.max()) + 1 if len(row) else 0
    layers = torch.zeros(n_rows, dtype=torch.int64).index_put_((row,), active.layers[chosen].cpu())
    last = torch.zeros_like(layers).scatter_reduce_(0, row, active.positions[chosen].cpu(), "amax")
    for batch in batches(last.tolist(), partial(row_bytes, local), most_bytes):
        some = torch.tensor(batch)
        some = some[layers[some].argsort(descending=True, stable=True)]
        place = torch.full_like(layers, -1).index_put_((some,), torch.arange(len(some)))[row]
        entries = (place >= 0).nonzero().squeeze(1)
        entries = entries[place[entries].argsort(stable=True)]
        yield some, _batch(local, parts, layers[some], chosen[entries], place[entries], lowest)


def _batch(
    local: LocalReplacement,
    parts: Parts,
    layers: Int[Tensor, " R"],
    mine: Int[Tensor, " E"],
    place: Int[Tensor, " E"],
    lowest: int,
) -> Rows:
    """Rows whose layers are given; each active feature of `mine` is part of that at its `place`."""
    active, place = parts.active, place.to(parts.active.bias.device)
    sources = local.into_reads(layers, active.positions[mine], active.directions[mine], place)
    rows = rows_of(local, parts, sources, lowest)
    rows.biases.index_put_((place, active.layers[mine]), active.bias[mine], accumulate=True)
    return rows


def row_bytes(local: LocalReplacement, n_positions: int) -> int:
    """What a row takes in a layer's pass back: gradients of the stream on the first positions, and of its patterns."""
    return n_positions * (local.stream[0, 0].nbytes * COPIES + 2 * local.n_heads * n_positions * local.stream.itemsize)


def batches(last: list[int], bytes_of: Callable[[int], int], most_bytes: int) -> Iterator[list[int]]:
    """Rows of like last positions together, the last first: a batch carries all that its last row can see."""
    batch, end, in_vain = list[int](), 0, 0
    for row in sorted(range(len(last)), key=lambda row: -last[row]):
        in_vain += end - last[row]
        full = (len(batch) + 1) * bytes_of(end + 1) > most_bytes
        if batch and (full or in_vain > IN_VAIN):
            yield batch
            batch = []
        if not batch:
            end, in_vain = last[row], 0
        batch.append(row)
    if batch:
        yield batch
