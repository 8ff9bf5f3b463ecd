"""Graphs of many examples against sums in numpy, and two sets of them in which one feature is planted to differ."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import bootstrap, mannwhitneyu

from crosslayer import Aggregate, UserError
from crosslayer.attribution.aggregate_figure import draw_aggregate, draw_contrast
from crosslayer.attribution.aggregate_summary import contrast_summary, summary
from crosslayer.attribution.contrast import p_values
from crosslayer.attribution.graph import AttributionGraph
from crosslayer.attribution.node import Node
from crosslayer.attribution.tally import Pruning, Tally, tally
from making_graphs import graph_of, random_graph

ALL = Pruning(node_threshold=1.0, edge_threshold=1.0)


def of_random_graphs(n: int = 6, **settings) -> Aggregate:
    return Aggregate(tallies=tuple(tally(random_graph(seed, 8), str(seed)) for seed in range(n)), **settings)


def matrix(tallies: tuple[Tally, ...], name: str, role) -> np.ndarray:
    """A measure of one role in each graph, 0 where it is not there."""
    return np.array([dict(zip(t.roles, getattr(t, name), strict=True)).get(role, 0.0) for t in tallies])


def test_nodes_are_means_over_all_graphs_and_listed_by_the_share_of_circuits():
    found = of_random_graphs(share=0.5)
    assert len(found.nodes) > 5
    for row in found.nodes:
        assert row.influence.value == pytest.approx(matrix(found.tallies, "influence", row.role).mean())
        assert row.effect.value == pytest.approx(matrix(found.tallies, "effect", row.role).mean())
        assert row.kept == pytest.approx(matrix(found.tallies, "kept", row.role).mean())
        assert row.active == pytest.approx(np.mean([row.role in t.roles for t in found.tallies]))
    roles = {role for t in found.tallies for role in t.roles}
    often = {role for role in roles if matrix(found.tallies, "kept", role).mean() >= 0.5}
    assert {row.role for row in found.nodes} == often
    assert len(often) < len(roles)


def test_edges_are_means_over_all_graphs():
    found = of_random_graphs(share=0.5)
    assert len(found.edges) > 5
    for row in found.edges:
        values = []
        for t in found.tallies:
            ends = [(t.roles[s], t.roles[e]) for s, e in zip(t.source, t.target, strict=True)]
            values.append(dict(zip(ends, t.edge_effect, strict=True)).get((row.source, row.target)))
        assert row.effect.value == pytest.approx(np.mean([value or 0.0 for value in values]))
        assert row.kept == np.mean([value is not None for value in values])


def test_intervals_are_those_of_the_percentile_bootstrap():
    found = of_random_graphs(30, share=0.5)
    for row in found.nodes[:4]:
        values = matrix(found.tallies, "influence", row.role)
        wanted = bootstrap((values,), np.mean, method="percentile", n_resamples=5000, rng=1).confidence_interval
        spread = wanted.high - wanted.low
        assert (row.influence.low, row.influence.high) == pytest.approx((wanted.low, wanted.high), abs=0.08 * spread)
    assert np.isnan(of_random_graphs(1).nodes[0].influence.low)


def scene(seed: int, inhibited: bool) -> AttributionGraph:
    """A patch drives feature 0; feature 1, where it is active, holds the target down; feature 2 does what it likes."""
    rng = np.random.default_rng(seed)
    nodes = [Node(kind="patch", position=0, label="patch 0"), Node(kind="token", position=1, vocab=1)]
    nodes += [Node(kind="feature", layer=0, position=1, feature=f, activation=1.0) for f in (0, 1, 2)]
    nodes += [Node(kind="target", position=1, label="fish", vocab=2)]
    edges = {(2, 0): 1.0, (4, 1): 1.0, (5, 2): 2.0 + rng.random(), (5, 4): 0.5 * rng.random(), (5, 0): rng.random()}
    if inhibited:
        edges |= {(3, 0): 1.0, (5, 3): -1.0 - rng.random()}
    else:
        nodes = [node for node in nodes if node.feature != 1]
        edges = {(i - (i > 3), j - (j > 3)): weight for (i, j), weight in edges.items()}
    return graph_of(nodes, edges, [0.0] * (len(nodes) - 1) + [1.0], tokens=("x", "y"))


def planted(n: int, label: str, inhibited: bool, **about) -> Aggregate:
    first = 1000 * inhibited
    tallies = [tally(scene(first + i, inhibited), str(i), label, token=0, pruning=ALL) for i in range(n)]
    return Aggregate(tallies=tuple(tallies), about=about)


def test_a_feature_that_is_silent_in_one_set_is_found_with_the_sign_of_what_it_did():
    hallucinated, true = planted(12, "hallucinated", False), planted(15, "true", True)
    found = hallucinated.contrast(true)
    changes = {row.role.feature: row for row in found.nodes if row.role.kind == "feature"}
    silent = changes[1]
    assert (silent.change, silent.active_here, silent.active_there) == ("suppressed", 0.0, 1.0)
    assert silent.effect.there < -1.0 < silent.effect.here == 0.0
    assert silent.influence.difference.high < 0 < silent.effect.difference.low
    assert silent.influence.q < 1e-4
    assert changes[0].change == "gained"
    assert changes[2].effect.q > 0.05
    back = {row.role.feature: row for row in true.contrast(hallucinated).nodes if row.role.kind == "feature"}
    assert back[1].change == "appeared"
    edge = next(row for row in found.edges if row.source.feature == 1)
    assert (edge.change, edge.target.kind) == ("suppressed", "target")


def test_p_and_q_are_those_of_one_column_at_a_time():
    rng = np.random.default_rng(0)
    here, there = rng.normal(size=(9, 5)) * (rng.random((9, 5)) < 0.6), rng.normal(size=(12, 5))
    here[:, 4] = there[:, 4] = 0.0
    p = p_values(here, there)
    wanted = [mannwhitneyu(here[:, i], there[:, i], method="asymptotic").pvalue for i in range(4)]
    assert p == pytest.approx([*wanted, 1.0])
    found = planted(8, "a", False).contrast(planted(8, "b", True)).nodes
    p = np.array([row.influence.p for row in found])
    q = [min(p[p >= value] * len(p) / [(p <= other).sum() for other in p[p >= value]]) for value in p]
    assert [row.influence.q for row in found] == pytest.approx(q)


def test_sets_of_two_runs_are_not_compared():
    one, other = planted(3, "a", True, run="clt 12"), planted(3, "b", True, run="plt 34")
    with pytest.raises(UserError, match="run = clt 12, the other with plt 34"):
        one.contrast(other)
    with pytest.raises(UserError, match="no graphs"):
        one.only("b")
    both = replace(one, tallies=one.tallies + other.tallies)
    assert len(both.only("b")) == 3
    with pytest.raises(UserError, match=r"share is 1\.5"):
        replace(one, share=1.5)


def test_what_is_saved_drawn_and_told(tmp_path):
    found = planted(6, "a", False)
    changes = found.contrast(planted(6, "b", True))
    found.save(tmp_path)
    changes.save(tmp_path)
    record = json.loads((tmp_path / "aggregate.json").read_text())
    assert [node["influence"]["value"] for node in record["nodes"]] == [row.influence.value for row in found.nodes]
    with (tmp_path / "contrast-nodes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:5] == ["kind", "layer", "feature", "place", "label"]
    assert [float(row["influence_difference"]) for row in rows] == [
        row.influence.difference.value for row in changes.nodes
    ]
    draw_aggregate(found, tmp_path / "a.png")
    draw_contrast(changes, tmp_path / "c.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    assert "layer 0 feature 0 at last" in summary(found)
    assert "1 suppressed" in contrast_summary(changes)
