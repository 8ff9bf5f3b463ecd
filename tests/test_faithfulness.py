"""What a graph predicts against what happens: exact where all is held, and by hand where the model runs free."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import crosslayer as xl
from crosslayer import UserError, Wiring
from crosslayer.attribution.effects import effects
from crosslayer.attribution.faithfulness import faithfulness
from crosslayer.attribution.faithfulness_figure import draw_faithfulness
from crosslayer.attribution.faithfulness_summary import faithfulness_summary
from crosslayer.attribution.node import Node
from crosslayer.attribution.perturbation import downstream
from making import finished_coder
from making_graphs import dense, random_graph
from test_interventions import by_hand, double  # noqa: F401
from test_replacement import batch_of

PROMPT = "is there a cat ?"


@pytest.fixture(scope="module")
def bundled() -> tuple[xl.LoadedModel, xl.CrossLayerTranscoder]:
    """The bundled model and a transcoder of random features, each active on about a fifth of the tokens."""
    model = xl.load_model("emoji-llava")
    coder = finished_coder(Wiring.full(model.n_layers), D=model.d_model, F=32)
    return model, coder.with_thresholds(torch.full((model.n_layers, 32), 3.0))


@pytest.fixture(scope="module")
def asked() -> xl.Example:
    return xl.Example("a", PROMPT, image=Image.new("RGB", (48, 48), "teal"))


@pytest.fixture(scope="module")
def check(bundled, asked):
    graph = xl.attribute(*bundled, PROMPT, asked.image, run="runs/clt")
    return graph, faithfulness(*bundled, graph, batch_of(bundled[0], [asked]), features=20)


def test_direct_edges_are_confirmed_under_freeze_on_the_bundled_model(check):
    graph, found = check
    assert len(found.features) == 20
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
        for f in found.features[:5]:
            node = graph.nodes[graph.index[f.id]]
            where = xl.Positions((node.position,))
            edit = xl.Intervention(layer=node.layer, feature=node.feature, action=xl.Ablate(), where=where)
            with xl.edited(model, coder, [edit]):
                moved = model.model(**batch.inputs).logits[0, -1] - plain
            assert f.live == pytest.approx((moved[vocab] - moved.mean()).item(), abs=1e-4)


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


def features_of(coder: xl.CrossLayerTranscoder, reads: list[torch.Tensor]) -> list[Node]:
    found = []
    for layer, x in enumerate(reads):
        position, feature = coder.encode_layer(layer, x).dense()[1:].nonzero()[0].tolist()
        activation = coder.encode_layer(layer, x).dense()[position + 1, feature].item()
        found.append(Node(kind="feature", layer=layer, position=position + 1, feature=feature, activation=activation))
    return found


def test_agreement_downstream_is_that_of_passes_by_hand(double):  # noqa: F811
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
        node = features_of(coder, plain)[0]
        row = coder.W_enc[0][node.feature]
        change = torch.zeros_like(plain[0])
        change[node.position] = -node.activation * row / row.square().sum()
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
        found = downstream(double, coder, batch, [node])
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
    nodes = features_of(coder, plain)
    for W_dec in coder.W_dec:
        W_dec.zero_()
    for at in downstream(double, coder, batch, nodes):
        assert (at.cosine, at.error) == pytest.approx((at.cosine_held, at.error_held), rel=1e-4)


def test_a_check_is_said_drawn_and_written(check, tmp_path):
    found = check[1]
    text = faithfulness_summary([found, found])
    assert f"{found.influence.rho:.2f}" in text
    assert text.count("runs/clt") == 2
    draw_faithfulness([found, found], tmp_path / "check.png")
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert len(record["features"]) == 20
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
