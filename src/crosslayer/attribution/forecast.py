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
from crosslayer.replacement.local import LocalReplacement

EDGE_BYTES = 100
"""Ends and weight of an edge, twice while a graph is put together, and what its check and its scores keep of it."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes that a graph takes while it is made, beside the model and the trace of its prompt."""

    parts: int
    """On the model's device: what each active feature writes to each of its targets, and errors."""
    gradients: int
    """There too: a batch of rows on their way back through the layers, and what has risen to meet them."""
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
    gradients = 3 * max(batch_bytes, row_bytes(local, local.stream.shape[1])) + batch_bytes
    n_edges = _most_edges(counts, _row_lengths(counts, coder), max_features, max_positions)
    return Forecast(parts=parts, gradients=gradients, edges=int(n_edges * EDGE_BYTES))


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
