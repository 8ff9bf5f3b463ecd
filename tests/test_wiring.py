"""Wiring: targets and sources are one relation, and nothing out of range can be built."""

import pytest
from hypothesis import given

from crosslayer import UserError, Wiring
from making import wirings


@given(wirings())
def test_targets_and_sources_are_inverse(wiring):
    layers = range(wiring.n_layers)
    assert {(s, t) for s in layers for t in wiring.targets(s)} == {(s, t) for t in layers for s in wiring.sources(t)}


@given(wirings())
def test_a_pair_is_wired_when_its_distance_is_in_the_window(wiring):
    layers = range(wiring.n_layers)
    window = range(wiring.first_target, wiring.first_target + wiring.span)
    pairs = [(s, t) for s in layers for t in layers if t - s in window]
    assert [(s, t) for s in layers for t in wiring.targets(s)] == pairs
    assert wiring.n_pairs == len(pairs)


@given(wirings())
def test_counts_are_those_of_the_lists(wiring):
    layers = range(wiring.n_layers)
    assert [wiring.n_targets(s) for s in layers] == [len(wiring.targets(s)) for s in layers]
    assert sum(wiring.n_sources(t) for t in layers) == wiring.n_pairs
    assert list(wiring.source_layers) == [s for s in layers if len(wiring.targets(s)) > 0]


@pytest.mark.parametrize("n_layers", [1, 2, 9, 31])
def test_plt_is_span_1_and_the_full_clt_has_a_triangle_of_decoders(n_layers):
    plt, clt = Wiring.per_layer(n_layers), Wiring.full(n_layers)
    assert plt == Wiring(n_layers, span=1)
    assert [list(plt.targets(s)) for s in range(n_layers)] == [[s] for s in range(n_layers)]
    assert clt.n_pairs == n_layers * (n_layers + 1) // 2
    assert all(list(clt.targets(s)) == list(range(s, n_layers)) for s in range(n_layers))


def test_full_with_the_own_layer_left_out():
    wiring = Wiring.full(5, first_target=1)
    assert wiring.n_pairs == 10
    assert list(wiring.sources(0)) == []
    assert wiring.source_layers == (0, 1, 2, 3)


@pytest.mark.parametrize(("first_target", "last"), [(0, 1), (1, 0)])
def test_31_layers_with_span_16(first_target, last):
    wiring = Wiring(31, 16, first_target)
    assert [wiring.n_targets(layer) for layer in (0, 20, 30)] == [16, 11 - first_target, last]
    assert wiring.n_sources(30) == 16


def test_table_has_a_line_a_layer():
    lines = Wiring(4, 2, 1).table().splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["0", "2", "1..2", "0", "-"],
        ["1", "2", "2..3", "1", "0"],
        ["2", "1", "3", "2", "0..1"],
        ["3", "0", "-", "2", "1..2"],
    ]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ((0, 1, 0), "n_layers is 0"),
        ((-3, 1, 0), "n_layers is -3"),
        ((4, 0, 0), "span is 0"),
        ((4, 5, 0), "span is 5.* choose 1 to 4"),
        ((4, 4, 1), "span is 4.* choose 1 to 3"),
        ((4, 2, 2), "first_target is 2"),
        ((4, 2, -1), "first_target is -1"),
        ((1, 1, 1), "first_target 1 needs at least 2 layers, the model has 1"),
    ],
)
def test_out_of_range_values_are_named(values, named):
    with pytest.raises(UserError, match=named):
        Wiring(*values)
