"""Our edges against those that circuit-tracer found on the same weights, which `benchmarks/` stored here."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pair
import pytest
import torch
from compared import Theirs, compare
from safetensors.torch import load_file

from crosslayer.attribution.graph import AttributionGraph

FOUND = Path(__file__).with_name("circuit_tracer_edges.safetensors")
ROUNDING = 1e-5


@cache
def both(name: str) -> tuple[AttributionGraph, Theirs]:
    model, coder = pair.make(pair.PAIRS[name])
    with TemporaryDirectory() as folder:
        pair.write(model, pair.tokenizer(), coder, Path(folder))
        graph = pair.trace(Path(folder), *pair.load(Path(folder)))
    found = load_file(FOUND)
    return graph, Theirs(**{part: found[f"{name}: {part}"] for part in ("features", "activations", "edges")})


@pytest.mark.parametrize("name", pair.PAIRS)
def test_every_edge_is_circuit_tracers(name):
    found = compare(*both(name))
    assert found.features > 20
    assert found.edges > 300
    assert (found.in_one_alone, found.zeros) == (0, 0)
    assert max(found.activations, found.from_features, found.from_errors, found.from_tokens) < ROUNDING


@pytest.mark.parametrize("name", pair.PAIRS)
def test_their_rows_lack_our_biases_and_first_position_and_nothing_else(name):
    found = compare(*both(name))
    assert found.their_gap > 0.01
    assert found.first > 0.01
    assert max(found.closed_gap, found.our_gap) < ROUNDING


@pytest.mark.parametrize("column", ["from_features", "from_errors", "from_tokens"])
def test_one_edge_that_differs_is_noticed(column):
    graph, theirs = both("llama, CLT")
    columns, edges = theirs.columns(graph), theirs.edges.clone()
    mine = torch.tensor([name.startswith(column.removeprefix("from_")[:-1]) for name in columns])
    edges.view(-1)[(edges * mine).abs().argmax()] *= 1.001
    assert getattr(compare(graph, replace(theirs, edges=edges)), column) > 5e-4


def test_a_feature_of_one_graph_alone_is_counted_and_the_others_compared():
    graph, theirs = both("llama, CLT")
    features = theirs.features.clone()
    features[-1, 2] = pair.FEATURES
    found = compare(graph, replace(theirs, features=features))
    assert (found.features, found.in_one_alone) == (len(features) - 1, 2)
    assert found.from_features < ROUNDING
