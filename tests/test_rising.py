"""Sources carried up and rows carried down meet: the same edges as rows carried all the way, and finite differences."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import pad

from crosslayer import Wiring
from crosslayer.attribution.columns import Columns
from crosslayer.attribution.parts import Parts
from crosslayer.attribution.rising import Rising, middle_of
from crosslayer.attribution.rows import Rows, feature_rows, rows_of
from crosslayer.replacement.lifting import Lift
from crosslayer.replacement.local import LocalReplacement
from test_attribute import CODERS, _at, traced, writes_of

FAMILIES = ["llama", "gemma2", "gpt2", "cohere", "llava", "gemma3", "bloom", "qwen3_vl"]
MOST = 2**18
"""Bytes: several bands and batches."""


def columns_of(local: LocalReplacement, parts: Parts, cell: torch.Tensor | None = None) -> tuple[Columns, int]:
    """A node of its own for everything, or for each cell of positions and feature; and how many nodes."""
    (L, P), active = parts.errors.shape[:2], parts.active
    cell = torch.arange(P) if cell is None else cell
    F = int(active.features.max()) + 1
    features = ((active.layers * P + cell[active.positions]) * F + active.features).unique(return_inverse=True)[1]
    sizes = [P, *(P for _ in local.between), L + 1, L * P, int(features.max()) + 1]
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    between = {layer: start + cell for layer, start in zip(local.between, starts[1:], strict=False)}
    biases, errors, first, n = starts[-4:]
    at = (torch.arange(L)[:, None] * P + cell) + errors
    return Columns(cell, between, torch.arange(L + 1) + biases, first + features, at), n


def edges_met(local: LocalReplacement, parts: Parts, at: Columns, n: int, middle: int) -> torch.Tensor:
    """All edges into features [N, N], and into a direction of the logits [1, N] below them."""
    found, every = torch.zeros(n + 1, n, dtype=local.stream.dtype), torch.arange(parts.n_features)
    rising = Rising(local, parts, at, middle, n, MOST)
    for read in rising.rows():
        found[read.targets[:, None], read.sources] += read.edges

    def whole(rows: Rows) -> torch.Tensor:
        of_rows = at.by_node(rows, n)
        rising.add_met(rows.entry, of_rows)
        return of_rows

    mine = every[parts.active.layers >= middle]
    nodes, row = at.features[mine].unique(return_inverse=True)
    for some, rows in feature_rows(local, parts, mine, MOST, row, middle):
        found[nodes[some]] += whole(rows)
    torch.manual_seed(2)
    vector = torch.randn(1, local.logits.shape[2], dtype=local.stream.dtype)
    rows = rows_of(local, parts, local.into_logits(-1, vector), middle)
    found[n:] += whole(rows)
    return found


@pytest.mark.parametrize("pooled", [False, True], ids=["each position", "pooled"])
@pytest.mark.parametrize("name", FAMILIES)
def test_edges_are_the_same_wherever_rows_and_sources_meet(name, pooled):
    local, parts, _ = traced(name)
    cell = torch.arange(local.stream.shape[1]) // 2 if pooled else None
    at, n = columns_of(local, parts, cell)
    wanted = edges_met(local, parts, at, n, 0)
    assert (wanted != 0).sum() > 100
    for middle in range(1, local.n_layers):
        found = edges_met(local, parts, at, n, middle)
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9 * wanted.abs().max().item())


@pytest.mark.parametrize("settings", CODERS.values(), ids=CODERS)
def test_edges_are_the_same_with_every_kind_of_transcoder(settings):
    settings = {**settings, "skip": Wiring.per_layer(2)} if "skip" in settings else settings
    local, parts, _ = traced("llama", **settings)
    at, n = columns_of(local, parts)
    torch.testing.assert_close(
        edges_met(local, parts, at, n, 1), edges_met(local, parts, at, n, 0), rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gemma3"])
def test_a_rising_source_changes_what_is_read_as_doubling_it_does(name):
    local, parts, coder = traced(name)
    at, n = columns_of(local, parts)
    found, active = edges_met(local, parts, at, n, local.n_layers - 1), parts.active
    for source in range(0, int((active.layers == 0).sum()), 7):
        writes = {t: _at(active.positions[source], w, local.stream) for t, w in writes_of(parts, coder, source).items()}
        reads, _ = local.replay(0.0, writes)
        change = torch.stack([after - before for after, before in zip(reads, local.reads, strict=True)])[:, 0]
        moved = (change[active.layers, active.positions] * active.directions).sum(1)
        torch.testing.assert_close(found[at.features, at.features[source]], moved, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere", "llava", "bloom"])
def test_a_layer_cut_at_a_position_lifts_as_the_whole_does(name):
    local, _, _ = traced(name)
    P, D = local.stream.shape[1:]
    entry, write = torch.randn(2, 3, P - 2, D).double()
    entry[2] = 0.0
    for layer in range(local.n_layers):
        part = Lift(local.layers, layer).section(2)
        assert part.first == 2
        whole = Lift(replace(local.layers, uncut={layer}), layer).section(2)
        assert whole.first == 0
        found, wanted = entry.clone(), pad(entry, (0, 0, 2, 0))
        pairs = (part.up(found, write, 2), whole.up(wanted, pad(write, (0, 0, 2, 0)), 3)), (found, wanted)
        for one, other in pairs:
            torch.testing.assert_close(one, other[:, 2:], rtol=1e-10, atol=1e-10)
            assert other[:, :2].abs().max() == 0


def test_an_image_block_that_attends_both_ways_is_not_cut():
    local, _, _ = traced("gemma3")
    P, D = local.stream.shape[1:]
    lift = Lift(local.layers, 0)
    inside = [first for first in range(1, P) if lift.section(first) is lift.whole]
    assert inside
    local.layers.uncut.clear()
    section = lift.section(inside[0])
    assert section.first == 0
    stream = pad(torch.randn(1, P - inside[0], D).double(), (0, 0, inside[0], 0))
    section.up(stream, torch.zeros_like(stream), 1)
    assert stream[:, : inside[0]].abs().max() > 0


def test_a_middle_takes_both_sides_into_account():
    local, parts, _ = traced("llama")
    at, _ = columns_of(local, parts)
    assert middle_of(local, parts, at, local.n_layers - 1, 2**30) == 1
    assert middle_of(local, parts, at, 0, 2**30) == 0
    assert middle_of(local, parts, at, local.n_layers - 1, 1) == 0
    local, parts, _ = traced("llama", skip=Wiring.full(2))
    assert middle_of(local, parts, columns_of(local, parts)[0], 1, 2**30) == 0
