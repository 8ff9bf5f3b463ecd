"""What a graph predicts against what happens: exact where all is held, and by hand where the model runs free."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import crosslayer as xl
from crosslayer import UserError, Wiring
from crosslayer.attribution.activity import activations
from crosslayer.attribution.effects import effects
from crosslayer.attribution.faithfulness import Ablated, Faithfulness, faithfulness
from crosslayer.attribution.faithfulness_figure import draw_faithfulness
from crosslayer.attribution.faithfulness_summary import faithfulness_summary
from crosslayer.attribution.node import Node
from crosslayer.attribution.perturbation import downstream
from crosslayer.replacement.local import trace
from making import finished_coder
from making_graphs import dense, random_graph
from test_interventions import by_hand, double  # noqa: F401
from test_replacement import batch_of

PROMPT = "is there a cat ?"
FEATURES = 40


@pytest.fixture(scope="module")
def bundled() -> tuple[xl.LoadedModel, xl.CrossLayerTranscoder]:
    """The bundled model and a transcoder of random features, each active on about a fifth of the tokens."""
    model = xl.load_model("emoji-llava")
    coder = finished_coder(Wiring.full(model.n_layers), D=model.d_model, F=32)
    return model, coder.with_thresholds(torch.full((model.n_layers, 32), 3.0))


@pytest.fixture(scope="module")
def asked() -> xl.Example:
    scene = xl.load_data("emoji-scenes", split="test", n=1)[0]
    return xl.Example("a", PROMPT, image=scene.image)


@pytest.fixture(scope="module", params=[None, 1, 2], ids=["each patch", "pooled to 1 a side", "pooled to 2 a side"])
def check(request, bundled, asked):
    graph = xl.attribute(*bundled, PROMPT, asked.image, pool_patches=request.param, run="runs/clt")
    return graph, faithfulness(*bundled, graph, batch_of(bundled[0], [asked]), features=FEATURES)


def node_of(graph: xl.AttributionGraph, f: Ablated) -> Node:
    return graph.nodes[graph.index[f.id]]


def test_direct_edges_are_confirmed_under_freeze_on_the_bundled_model(check):
    graph, found = check
    assert len(found.features) == FEATURES
    assert any(node.pooled for node in graph.nodes) == any(node_of(graph, f).pooled for f in found.features)
    largest = max(abs(f.direct) for f in found.features)
    for f in found.features:
        edges = (graph.target == graph.index[main_target(graph)]) & (graph.source == graph.index[f.id])
        assert f.direct == pytest.approx(-graph.weight[edges].sum().item(), abs=1e-6)
        assert f.frozen == pytest.approx(f.direct, abs=1e-4 * largest)
    assert found.worst_frozen_gap < 1e-4


def main_target(graph: xl.AttributionGraph) -> str:
    return graph.nodes[int(graph.target_weight.argmax())].id


def test_live_effects_are_those_of_single_edits(check, bundled, asked):
    (graph, found), (model, coder), batch = check, bundled, batch_of(bundled[0], [asked])
    vocab = graph.nodes[graph.index[main_target(graph)]].vocab
    with torch.no_grad():
        plain = model.model(**batch.inputs).logits[0, -1]
        for f in [*found.features[:5], *(f for f in found.features if node_of(graph, f).pooled)][:10]:
            node = node_of(graph, f)
            edits = [
                xl.Intervention(layer=node.layer, feature=node.feature, action=xl.Ablate(), where=xl.Positions((p,)))
                for p in node.pooled or (node.position,)
            ]
            with xl.edited(model, coder, edits):
                moved = model.model(**batch.inputs).logits[0, -1] - plain
            assert f.live == pytest.approx((moved[vocab] - moved.mean()).item(), abs=1e-4)


@pytest.fixture(scope="module")
def small(llava_folder):
    """A tiny random LLaVA in float64, whose pictures are 3 x 3 patches, a transcoder, and a prompt."""
    model = xl.load_model(llava_folder)
    model.model.double()
    example = xl.Example("a", PROMPT, image=Image.new("RGB", (48, 96), "teal"))
    return model, finished_coder(Wiring.full(3), F=10).double(), example


def pooled_graph(small, pool: int | None) -> xl.AttributionGraph:
    model, coder, example = small
    return xl.attribute(model, coder, PROMPT, example.image, pool_patches=pool)


def checked(small, graph: xl.AttributionGraph) -> Faithfulness:
    """With all its features."""
    model, coder, example = small
    return faithfulness(model, coder, graph, batch_of(model, [example]), features=len(graph.nodes))


@pytest.fixture(scope="module")
def small_checks(small):
    graphs = {pool: pooled_graph(small, pool) for pool in (None, 1, 2)}
    return {pool: (graph, checked(small, graph)) for pool, graph in graphs.items()}


@pytest.mark.parametrize("pool", [None, 1, 2])
def test_in_float64_all_features_have_their_direct_edges_under_freeze(small_checks, pool):
    graph, found = small_checks[pool]
    assert len(found.features) == graph.of_kind("feature").sum()
    assert found.worst_frozen_gap < 1e-6


def test_a_pooled_feature_is_predicted_and_loses_what_its_parts_do(small_checks):
    parts, (pooled, found) = {f.id: f for f in small_checks[None][1].features}, small_checks[2]
    several = [f for f in found.features if node_of(pooled, f).pooled]
    assert len(several) > 10
    for f in several:
        node = node_of(pooled, f)
        own = [parts[part.id] for p in node.pooled if (part := replace(node, position=p)).id in parts]
        for name in ("direct", "frozen"):
            assert getattr(f, name) == pytest.approx(sum(getattr(part, name) for part in own), rel=1e-4, abs=1e-5)


def test_activations_of_a_pooled_feature_are_those_of_its_positions(small):
    model, coder, example = small
    batch = batch_of(model, [example])
    nodes = [node for node in pooled_graph(small, 2).nodes if node.kind == "feature"]
    local = trace(model, coder, batch)
    found = activations(local, coder, batch, nodes)
    for node, acts in zip(nodes, found, strict=True):
        dense = coder.encode_layer(node.layer, local.reads[node.layer][0]).dense()[:, node.feature]
        elsewhere = [p for p in range(len(dense)) if p not in (node.pooled or (node.position,))]
        dense[[0, *elsewhere]] = 0.0
        torch.testing.assert_close(acts, dense)
        assert acts.sum().item() == pytest.approx(node.activation, rel=1e-5)


def test_a_cell_may_begin_the_prompt_where_no_feature_is(small, small_checks):
    graph, found = small_checks[2]
    begins = [replace(node, pooled=(0, *node.pooled)) if node.pooled else node for node in graph.nodes]
    assert checked(small, replace(graph, nodes=tuple(begins))).to_dict() == found.to_dict()


def test_total_effects_are_a_dense_inverse():
    graph = random_graph(3)
    target = int(np.flatnonzero(graph.of_kind("target"))[0])
    A = dense(graph, biases=True)
    scale = np.where(graph.of_kind("feature"), A.sum(1), 1.0)
    A = np.divide(A, scale[:, None], out=np.zeros_like(A), where=scale[:, None] != 0)
    wanted = (np.linalg.inv(np.eye(len(A)) - A) - np.eye(len(A)))[target]
    np.testing.assert_allclose(effects(graph, np.eye(len(A))[target]).node, wanted, rtol=1e-6, atol=1e-9)


def test_a_linear_graph_loses_over_all_paths_what_it_is_predicted_to():
    """Every source gone from a linear graph, recomputed forwards row by row."""
    graph = random_graph(5)
    target = int(np.flatnonzero(graph.of_kind("target"))[0])
    A, order = dense(graph, biases=True), np.argsort(graph.rank, kind="stable")
    for gone in np.flatnonzero(graph.of_kind("feature"))[:6]:
        share = np.ones(len(A))  # of its pre-activation that is left of each node
        share[gone] = 0.0
        for i in order:
            if i != gone and A[i].any():
                share[i] = A[i] @ share / A[i].sum()
        lost = A[target].sum() * (share[target] - 1)
        assert lost == pytest.approx(-effects(graph, np.eye(len(A))[target]).node[gone], rel=1e-4, abs=1e-5)


def features_of(coder: xl.CrossLayerTranscoder, reads: list[torch.Tensor]) -> tuple[list[Node], torch.Tensor]:
    """The feature of each layer that is active most often, and what by, at all positions."""
    nodes, active = [], []
    for layer, x in enumerate(reads):
        acts = coder.encode_layer(layer, x).dense()
        acts[0] = 0.0
        feature = int((acts > 0).sum(0).argmax())
        active.append(acts[:, feature])
        nodes.append(Node(kind="feature", layer=layer, position=int(acts[:, feature].argmax()), feature=feature))
    return nodes, torch.stack(active)


def alone(nodes: list[Node], active: torch.Tensor) -> torch.Tensor:
    """The same, each at the one position where it is strongest."""
    there = torch.arange(active.shape[1]) == torch.tensor([node.position for node in nodes])[:, None]
    return torch.where(there, active, 0.0)


@pytest.mark.parametrize("pooled", [False, True], ids=["at its position", "pooled"])
def test_agreement_downstream_is_that_of_passes_by_hand(double, pooled):  # noqa: F811
    coder, batch = finished_coder(Wiring.full(3)).double(), batch_of(double, [xl.Example("a", PROMPT)])
    tokens, plain, writes = batch.tokens[0], [], []

    def rebuilt(reads: list[torch.Tensor]) -> torch.Tensor:
        t, y = len(reads) - 1, coder.b_dec[len(reads) - 1].expand(len(tokens), -1).clone()
        for s, x in enumerate(reads):
            y = y + coder.encode_layer(s, x).dense() @ coder.W_dec[s][:, t - s]
        y[0] = coder.first_write[t]
        return y

    with torch.no_grad():
        by_hand(double, tokens, lambda t, x: plain.append(x) or x, lambda t, y: writes.append(y) or y)
        errors = [writes[t] - rebuilt(plain[: t + 1]) for t in range(3)]
        nodes, active = features_of(coder, plain)
        active = active if pooled else alone(nodes, active)
        assert ((active[0] > 0).sum() > 1) == pooled
        row = coder.W_enc[0][nodes[0].feature]
        change = -torch.outer(active[0], row) / row.square().sum()
        answers = {
            "own": lambda t, y, reads: y,
            "replaced": lambda t, y, reads: rebuilt(reads) + errors[t],
            "held": lambda t, y, reads: writes[t],
        }
        moved = {}
        for name, answer in answers.items():
            reads = []

            def read(t, x, reads=reads):
                reads.append(x + change if t == 0 else x)
                return reads[-1]

            by_hand(double, tokens, read, lambda t, y, answer=answer, reads=reads: answer(t, y, reads))
            moved[name] = [(a - b).flatten() for a, b in zip(reads, plain, strict=True)]
        found = downstream(double, coder, batch, nodes[:1], active[:1])
    assert [at.mlps for at in found] == [1, 2]
    for at in found:
        own, ours, held = (moved[name][at.mlps] for name in ("own", "replaced", "held"))
        for cosine, error, other in ((at.cosine, at.error, ours), (at.cosine_held, at.error_held, held)):
            assert cosine == pytest.approx((own @ other / own.norm() / other.norm()).item(), abs=1e-4)
            assert error == pytest.approx(((other - own).square().sum() / own.square().sum()).item(), rel=1e-3)


def test_a_transcoder_that_writes_constants_answers_like_mlps_held(double):  # noqa: F811
    coder, batch, plain = finished_coder(Wiring.full(3)).double(), batch_of(double, [xl.Example("a", PROMPT)]), []
    with torch.no_grad():
        by_hand(double, batch.tokens[0], lambda t, x: plain.append(x) or x, lambda t, y: y)
    found = features_of(coder, plain)
    for W_dec in coder.W_dec:
        W_dec.zero_()
    for at in downstream(double, coder, batch, *found):
        assert (at.cosine, at.error) == pytest.approx((at.cosine_held, at.error_held), rel=1e-4)


def test_a_check_is_said_drawn_and_written(check, tmp_path):
    found = check[1]
    text = faithfulness_summary([found, found])
    assert f"{found.influence.rho:.2f}" in text
    assert text.count("runs/clt") == 2
    draw_faithfulness([found, replace(found, run="a/long/path/" * 20)], tmp_path / "check.png")
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert len(record["features"]) == FEATURES
    assert record["downstream"][0]["mlps"] == 1


def test_what_cannot_be_checked_is_refused(bundled):
    batch = batch_of(bundled[0], [xl.Example("a", PROMPT)])
    graph = xl.attribute(*bundled, PROMPT)
    bare = graph.keep(np.zeros(len(graph.nodes), bool), np.ones(len(graph.weight), bool))
    with pytest.raises(UserError, match="the graph has 0 features; a check by ablating them needs at least 3"):
        faithfulness(*bundled, bare, batch)
    vector = torch.randn(len(bundled[0].processor.tokenizer))
    for label in ("says cat", "cat"):
        probe = xl.Target(label=label, vector=vector, position=-1)
        with pytest.raises(UserError, match=f"target '{label}' is a direction of your own"):
            faithfulness(*bundled, xl.attribute(*bundled, PROMPT, targets=[probe]), batch)
