"""How much memory a graph will take, known before its rows are computed.

Axes: P positions, C cells of positions that stand together, S sources, L layers, D d_model.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosslayer.attribution.parts import active_pairs
from crosslayer.attribution.rows import row_bytes
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.files import size_text
from crosslayer.memory import memory_room
from crosslayer.replacement.carrying import rows_at_once
from crosslayer.replacement.local import LocalReplacement

EDGE_BYTES = 100
"""Ends and weight of an edge, twice while a graph is put together, and what its check and its scores keep of it."""

ROW_COPIES = 5
"""Times that a batch's rows are held at once at most: by part and by node, sorted, and their edges."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes that a graph takes while it is made, beside the model and the trace of its prompt."""

    parts: int
    """On the model's device: what each active feature writes to each of its targets, and errors."""
    gradients: int
    """There too: a batch of rows on their way back through the layers and as edges, and what has risen to meet them."""
    edges: int
    """In main memory."""


@torch.no_grad()
def forecast(
    local: LocalReplacement,
    coder: CrossLayerTranscoder,
    first: Bool[Tensor, " P"],
    cell: Int[Tensor, " P"],
    batch_bytes: int,
    max_features: int | None = None,
    max_positions: int | None = None,
) -> Forecast:
    """What the graph of a prompt will take, were all earlier positions seen by all later ones.

    Args:
        local: the prompt.
        coder: the transcoder.
        first: the positions that begin a prompt.
        cell: which cell each position is in.
        batch_bytes: what a batch of rows may take.
        max_features: at most so many rows.
        max_positions: rows at so many cells at most.
    """
    counts = torch.zeros(len(coder.sources), int(cell.max()) + 1, dtype=torch.float64)
    D, size = local.stream.shape[2], local.stream.element_size()
    parts = 4 * local.n_layers * local.stream.nbytes
    for i, source in enumerate(coder.sources):
        positions, features, _ = active_pairs(local, coder, i, first)
        parts += len(features) * (len(coder.wiring.targets(source)) + 1) * D * size
        nodes = torch.stack([cell[positions.cpu()], features.cpu()], 1).unique(dim=0)
        counts[i] = torch.bincount(nodes[:, 0], minlength=counts.shape[1])
    gradients = _gradient_bytes(local, counts.sum(0), cell, batch_bytes, max_features)
    n_edges = _most_edges(counts, _row_lengths(counts, coder), max_features, max_positions)
    return Forecast(parts=parts, gradients=gradients, edges=int(n_edges * EDGE_BYTES))


def _gradient_bytes(
    local: LocalReplacement,
    rows: Float[Tensor, " C"],
    cell: Int[Tensor, " P"],
    batch_bytes: int,
    max_features: int | None,
) -> int:
    """What a batch of rows and all that has risen take, given how many rows each cell has."""
    P, D, size = *local.stream.shape[1:], local.stream.element_size()
    if local.stream.device.type != "cpu":  # where a batch passes through a layer as a whole
        return 3 * max(batch_bytes, row_bytes(local, P)) + batch_bytes
    last = torch.zeros_like(rows, dtype=torch.int64).scatter_reduce_(0, cell, torch.arange(P), "amax")
    seen = rows.new_zeros(P).index_add_(0, last, rows).cumsum(0).clamp_max(max_features or float("inf")).tolist()
    n = [min(below, max(1, batch_bytes // row_bytes(local, p + 1))) for p, below in enumerate(seen)]
    carried = 2 * max(at_once * (p + 1) for p, at_once in enumerate(n)) * D * size
    n_nodes = int(rows.sum()) + (2 * local.n_layers + 1) * P
    risen = min(batch_bytes, n_nodes * P * D * size)
    passing = rows_at_once(local.stream) * row_bytes(local, P)
    return int(carried + ROW_COPIES * max(n) * n_nodes * size + risen + passing)


def _row_lengths(counts: Float[Tensor, "S C"], coder: CrossLayerTranscoder) -> Float[Tensor, "S C"]:
    """Edges into a feature of each source and cell: from inputs, errors and features, of its cell and earlier ones."""
    before, places = counts.cumsum(1), torch.arange(1, counts.shape[1] + 1)
    starts = torch.tensor([coder.wiring.targets(source).start for source in coder.sources])
    lengths = [(layer + 1) * places + before[starts < layer].sum(0) for layer in coder.sources]
    return torch.stack(lengths)


def _most_edges(
    counts: Float[Tensor, "S C"], lengths: Float[Tensor, "S C"], max_features: int | None, max_positions: int | None
) -> float:
    """Edges of all rows, were those that a budget allows the longest."""
    cells = (counts * lengths).sum(0).argsort(descending=True)[:max_positions]
    order = lengths[:, cells].flatten().argsort(descending=True)
    rows = counts[:, cells].flatten()[order]
    if max_features is not None:
        rows = rows.cumsum(0).clamp_max(max_features).diff(prepend=rows.new_zeros(1))
    return float((rows * lengths[:, cells].flatten()[order]).sum())


def check_memory(need: Forecast, local: LocalReplacement) -> None:
    """Refuse a graph that memory does not suffice for; where the system tells nothing, nothing is refused.

    Raises:
        UserError: with how much is needed, how much there is, and what to change.
    """
    device, host = local.stream.device, torch.device("cpu")
    needs = {device: need.parts + need.gradients}
    needs[host] = needs.get(host, 0) + need.edges
    for where, n_bytes in needs.items():
        room = memory_room(where)
        if room is not None and n_bytes > room:
            raise UserError(
                f"this graph would take {size_text(n_bytes)} of memory ({size_text(need.edges)} of it for edges), "
                f"and {size_text(room)} are free; limit it with --max-features, --max-positions or --pool-patches"
            )
