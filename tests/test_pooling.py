"""Long prompts: pooled patches are sums of what they stand for, budgets of positions, and memory known beforehand."""

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crosslayer import AttributionGraph, Budget, Case, Example, Tracing, UserError, Wiring, aggregate, attribute
from crosslayer.attribution import attribute as attributing
from crosslayer.attribution.figure import figure
from crosslayer.attribution.forecast import EDGE_BYTES, Forecast, check_memory, forecast
from crosslayer.attribution.rows import feature_rows
from crosslayer.replacement.local import trace
from making import finished_coder
from test_attribute import traced
from test_local import prompt_of

PICTURE = Image.new("RGB", (48, 96), "teal")


def graph_of(model, image: Image.Image | None = PICTURE, **settings) -> AttributionGraph:
    coder = finished_coder(Wiring.full(model.n_layers), D=model.d_model)
    return attribute(model, coder, "is there a cat ?", image, **settings)


def test_pooled_edges_and_rows_are_the_sums_of_those_of_the_positions(llava, tmp_path):
    whole, pooled = graph_of(llava), graph_of(llava, pool_patches=2)
    assert pooled.scores.worst_row_gap < 1e-5
    first = {p: node.position for node in pooled.nodes if node.kind == "patch" for p in node.pooled}

    def merged(node) -> tuple:
        at = node.position if node.kind == "target" else first.get(node.position, node.position)
        return node.kind, node.layer, at, node.feature, node.vocab if node.kind == "target" else None

    wanted = defaultdict(float)
    for t, s, w in zip(whole.target.tolist(), whole.source.tolist(), whole.weight.tolist(), strict=True):
        wanted[merged(whole.nodes[t]), merged(whole.nodes[s])] += w
    found = {
        (merged(pooled.nodes[t]), merged(pooled.nodes[s])): w
        for t, s, w in zip(pooled.target.tolist(), pooled.source.tolist(), pooled.weight.tolist(), strict=True)
    }
    assert len(found) < len(whole.weight)
    largest = max(map(abs, wanted.values()))
    for pair in wanted.keys() | found.keys():
        assert found.get(pair, 0.0) == pytest.approx(wanted.get(pair, 0.0), rel=1e-4, abs=1e-6 * largest)
    pooled.save(tmp_path / "graph.json")
    assert AttributionGraph.load(tmp_path / "graph.json").nodes == pooled.nodes


def test_rows_of_several_positions_close_to_float_precision():
    local, parts, _ = traced("llava")
    active = parts.active
    row = (active.layers * 1000 + active.features // 2).unique(return_inverse=True)[1]  # two at a position add up too
    wanted = torch.zeros(int(row.max()) + 1).double().index_add_(0, row, active.preactivations + active.bias)
    batches = list(feature_rows(local, parts, torch.arange(len(active)), 2**16, row))
    assert len(batches) > 1
    assert torch.equal(torch.cat([some for some, _ in batches]).sort().values, torch.arange(len(wanted)))
    for some, rows in batches:
        torch.testing.assert_close(rows.total(), wanted[some], rtol=1e-10, atol=1e-10)


def test_cells_have_the_box_around_their_patches_and_a_mark_in_the_figure(llava):
    graph = graph_of(llava, pool_patches=2)
    cells = [node for node in graph.nodes if node.kind == "patch"]
    assert [node.box for node in cells] == [(0, 0, 32, 64), (32, 0, 48, 64), (0, 64, 32, 96), (32, 64, 48, 96)]
    assert [len(node.pooled) for node in cells] == [4, 2, 2, 0]
    assert (graph.picture.rows, graph.picture.columns) == (2, 2)
    assert "cell 0 (1)" in figure(graph)
    assert '["stands for positions", "1, 2, 4, 5"]' in figure(graph)
    assert graph.prune(0.5, 0.9).scores.worst_row_gap < 1e-5
    assert len([node for node in graph_of(llava, pool_patches=1).nodes if node.kind == "patch"]) == 1
    assert graph_of(llava, pool_patches=3).scores == graph_of(llava).scores


@pytest.mark.parametrize(("n", "image", "message"), [
    (4, PICTURE, "pool_patches is 4, but the patches form a grid of 3 x 3; choose 1 to 3"),
    (0, PICTURE, "pool_patches is 0"),
    (2, None, "the prompt has no image patches to pool"),
])  # fmt: skip
def test_what_cannot_be_pooled_is_refused(llava, n, image, message):
    with pytest.raises(UserError, match=message):
        graph_of(llava, image, pool_patches=n)


def test_a_budget_of_positions_gives_rows_where_most_influence_is(llava):
    whole, part = graph_of(llava), graph_of(llava, budget=Budget(positions=5))
    rows = part.preactivation.isfinite() & torch.from_numpy(part.of_kind("feature"))
    at = {part.nodes[i].position for i in rows.nonzero().flatten().tolist()}
    assert len(at) == 5
    n_all = len({node.position for node in part.nodes if node.kind == "feature"})
    assert f"those at {n_all - 5} of {n_all} positions among them" in part.left_out
    assert 0 < part.scores.left_out < 0.5
    all_of = [i for i, node in enumerate(part.nodes) if node.kind == "feature" and node.position in at]
    assert part.preactivation[all_of].isfinite().all()
    assert len(part.tokens) - 1 in at  # where the output is read
    assert graph_of(llava, budget=Budget(positions=99)).scores == whole.scores


def by_hand(path: Path, token: int) -> dict[tuple, np.ndarray]:
    """Influence and effect of each kind, layer, feature, place and word of a saved graph, from dense matrices."""
    nodes, edges = json.loads(path.read_text())["nodes"], load_file(path.with_suffix(".safetensors"))
    kind = np.array([node["kind"] for node in nodes])
    weight = np.zeros((len(nodes), len(nodes)))
    weight[edges["target"], edges["source"]] = edges["weight"]
    causes, start = np.abs(weight) * (kind != "bias"), edges["target_weight"].astype(float)
    shares = causes / np.maximum(causes.sum(1, keepdims=True), 1e-300)
    total = np.where(kind == "target", 1.0, weight.sum(1))[:, None]
    parts = np.divide(weight, total, out=np.zeros_like(weight), where=total != 0)
    one = np.eye(len(nodes))
    measures = np.stack([start @ (np.linalg.inv(one - part) - one) for part in (shares, parts)], 1)
    image = {p for node in nodes if node["kind"] == "patch" for p in (node["pooled"] or [node["position"]])}
    last, found = max(node["position"] for node in nodes if node["kind"] == "target"), defaultdict(float)
    for node, measure in zip(nodes, measures, strict=True):
        at = node["position"]
        words = "last" if at == last else "answer" if at is not None and at > last - token else "prompt"
        place = "" if at is None or node["kind"] == "target" else "image" if at in image else words
        label = node["label"] if node["kind"] == "token" else ""
        layer = None if node["kind"] == "target" else node["layer"]
        found[node["kind"], layer, node["feature"], place, label] += measure
    return found


def test_an_aggregate_of_pooled_graphs_is_the_mean_of_its_graphs_by_hand(llava, tmp_path):
    coder = finished_coder(Wiring.full(llava.n_layers), D=llava.d_model)
    tracing = Tracing(pool_patches=2, positions=6)
    noise = np.random.default_rng(0).integers(0, 256, (2, 48, 96, 3), np.uint8)
    cases, graphs, circuits = [], [], []
    for i, pixels in enumerate(noise):
        image, said = Image.fromarray(pixels), ("a cat .", "yes a dog .")[i]
        cases.append(Case(example=Example(f"e{i}", "is there a cat ?", said, image), token=2))
        limits = {"pool_patches": 2, "budget": Budget(positions=6)}
        graph = attribute(llava, coder, "is there a cat ?", image, response=said, token=2, **limits)
        graph.save(tmp_path / f"{i}.json")
        graph.prune().save(tmp_path / f"pruned-{i}.json")
        graphs.append(by_hand(tmp_path / f"{i}.json", 2))
        circuits.append({key for key in by_hand(tmp_path / f"pruned-{i}.json", 2) if key[0] == "feature"})

    found = aggregate(llava, coder, cases, tmp_path / "out", tracing=tracing, share=0.0)

    for graph, tally in zip(graphs, found.tallies, strict=True):
        assert {role.place for role in tally.roles if role.kind == "feature"} == {"image", "prompt", "answer", "last"}
        assert {tuple(asdict(role).values()) for role in tally.roles} == set(graph)
    assert any(row.active == 0.5 for row in found.nodes)
    for row in found.nodes:
        key = tuple(asdict(row.role).values())
        influence, effect = sum(graph.get(key, np.zeros(2)) for graph in graphs) / 2
        assert (row.influence.value, row.effect.value) == pytest.approx((influence, effect), rel=1e-4, abs=1e-6)
        assert row.active == np.mean([key in graph for graph in graphs])
        if row.role.kind == "feature":
            assert row.kept == np.mean([key in circuit for circuit in circuits])
    assert {key for some in circuits for key in some} == {
        tuple(asdict(row.role).values()) for row in found.nodes if row.role.kind == "feature"
    }
    assert found.scores["left_out"].value > 0


def test_pooling_changes_no_role_and_a_cell_has_the_names_of_its_patches(llava, tmp_path):
    coder = finished_coder(Wiring.full(llava.n_layers), D=llava.d_model)
    names = {4: "cat", 2: "dog", 5: "dog", 8: "bus"}  # of 3 x 3; cells of 2 x 2 hold 0 1 3 4, 2 5, 6 7 and 8
    case = Case(example=Example("e", "is there a cat ?", image=PICTURE), patches={**names, 3: "dog"})
    alone, pooled = (
        aggregate(llava, coder, [case], tmp_path / str(n), tracing=Tracing(pool_patches=n)).tallies[0] for n in (3, 2)
    )
    places = {"image", "dog + cat", "dog", "bus"}
    assert {role.place for role in pooled.roles if role.kind == "patch"} == places
    assert {role.place for role in pooled.roles if role.kind == "error"} == {*places, "prompt", "last"}
    without = [
        aggregate(llava, coder, [Case(example=case.example)], tmp_path / f"plain-{n}", tracing=Tracing(pool_patches=n))
        for n in (None, 2)
    ]
    assert set(without[0].tallies[0].roles) == set(without[1].tallies[0].roles)
    for one in (alone, pooled):
        inputs = [i for i, role in enumerate(one.roles) if role.kind not in ("feature", "target")]
        assert one.effect[inputs].sum() == pytest.approx(one.value, rel=1e-4)


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors made inside, at most and now."""

    def __init__(self):
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}
        self.most = 0

    def now(self) -> int:
        self.storages = {storage: size for storage, size in self.storages.items() if not storage.expired()}
        return sum(self.storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and not tensor.is_mkldnn:
                storage = tensor.untyped_storage()
                self.storages[StorageWeakRef(storage)] = storage.nbytes()
        if sum(self.storages.values()) > self.most:
            self.most = max(self.most, self.now())
        return found


@pytest.mark.parametrize("settings", [{}, {"pool_patches": 1}, {"budget": Budget(features=30)}], ids=repr)
def test_no_more_memory_is_taken_than_forecast_nor_much_less(llava, monkeypatch, settings):
    live, needs, before = Live(), [], []

    def note(need: Forecast, _) -> None:
        needs.append(need.parts + need.gradients + need.edges)
        before.append(live.now())
        live.most = 0

    monkeypatch.setattr(attributing, "check_memory", note)
    coder = finished_coder(Wiring.full(llava.n_layers), D=llava.d_model, F=96)
    with live:
        attribute(llava, coder, "is there a cat ?", PICTURE, **settings)
    assert needs[0] / 10 < live.most - before[0] < needs[0]


def test_the_forecast_counts_the_edges_that_come(llama):
    coder, batch = finished_coder(Wiring.full(llama.n_layers), D=llama.d_model), prompt_of(llama, "is there a cat ?")
    local, P = trace(llama, coder, batch), batch.tokens.shape[1]
    first, cell = batch.position[0] == 0, torch.arange(P)

    def expected(*limits) -> float:
        return forecast(local, coder, first, cell, 2**20, *limits).edges / EDGE_BYTES

    for budget, limits in ((None, ()), (Budget(features=20), (20,)), (Budget(positions=2), (None, 2))):
        graph = attribute(llama, coder, "is there a cat ?", targets=["yes"], budget=budget)
        inner, biases = (torch.from_numpy(graph.of_kind(kind)) for kind in ("feature", "bias"))
        found = int((inner[graph.target] & ~biases[graph.source]).sum())
        assert expected(*limits) == found if budget is None else found <= expected(*limits) <= 3 * found
    with pytest.raises(UserError, match=r"would take .*TiB of memory .* are free; limit it with --max-features"):
        check_memory(Forecast(parts=2**30, gradients=2**30, edges=2**60), local)
