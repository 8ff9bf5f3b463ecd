"""Attribution graphs against independent truth: sums, finite differences under full freeze, and bad requests."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from crosslayer import CrossLayerTranscoder, Full, LoadedModel, LowRank, SourceTied, TargetTied, UserError, Wiring
from crosslayer.attribution.attribute import Budget, attribute
from crosslayer.attribution.graph import AttributionGraph
from crosslayer.attribution.parts import Parts, split
from crosslayer.attribution.rows import Rows, feature_rows, rows_of
from crosslayer.attribution.targets import named, salient
from crosslayer.coders.input_norm import LayerNorm
from crosslayer.replacement.local import LocalReplacement, trace
from making import finished_coder
from test_local import loaded, prompt_of

PROMPT = "a cat and a dog ."
CODERS = {
    "full": {},
    "window": {"wiring": Wiring(2, 1)},
    "own layer left out, its MLP kept": {"wiring": Wiring(2, 1, 1), "kept_layers": [0]},
    "scales and offsets": {"decoder": Full(scale=True, offset=True)},
    "source-tied": {"decoder": SourceTied()},
    "target-tied": {"decoder": TargetTied(scale=True)},
    "low rank": {"decoder": LowRank(2)},
    "skip": {"skip": Wiring.full(2)},
    "norm": {"input_norm": LayerNorm()},
}


def coder_of(model: LoadedModel, wiring: Wiring | None = None, **settings) -> CrossLayerTranscoder:
    """A random finished transcoder in the model's precision."""
    torch.manual_seed(0)
    like = finished_coder(wiring or Wiring.full(model.n_layers), D=model.d_model)
    coder = CrossLayerTranscoder(like.wiring, model.d_model, like.d_transcoder, like.sparsity, **settings)
    for parameter in coder.parameters():
        parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    coder.first_write.normal_()
    coder.with_thresholds(torch.rand(len(coder.sources), like.d_transcoder))
    return coder.to(model.model.dtype).requires_grad_(False)


def traced(name: str, **settings) -> tuple[LocalReplacement, Parts, CrossLayerTranscoder]:
    model = loaded(name)
    coder, batch = coder_of(model, **settings), prompt_of(model)
    local = trace(model, coder, batch)
    return local, split(local, coder, batch.position[0] == 0), coder


def all_rows(local: LocalReplacement, parts: Parts) -> list[tuple[torch.Tensor, Rows]]:
    """Active features and their rows, in small batches."""
    return list(feature_rows(local, parts, torch.arange(parts.n_features), 2**16))


def writes_of(parts: Parts, coder: CrossLayerTranscoder, a: int) -> dict[int, torch.Tensor]:
    """What an active feature adds to the stream, by layer, from the definition."""
    active, i = parts.active, coder.sources.index(int(parts.active.layers[a]))
    feature = active.features[a : a + 1]
    found, constants = active.activations[a] * coder.decoder.vectors(i, feature), coder.decoder.constants(i, feature)
    found = found if constants is None else found + constants
    return dict(zip(coder.wiring.targets(coder.sources[i]), found[0], strict=True))


@pytest.mark.parametrize("settings", CODERS.values(), ids=CODERS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "cohere", "llava", "gemma3"])
def test_every_row_closes(name, settings):
    local, parts, _ = traced(name, **settings)
    assert parts.n_features > 20
    active, seen = parts.active, []
    for some, rows in all_rows(local, parts):
        wanted = active.preactivations[some] + active.bias[some]
        torch.testing.assert_close(rows.total(), wanted, rtol=1e-10, atol=1e-10)
        seen.append(some)
    assert len(seen) > 1
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(parts.n_features))
    vectors = torch.randn(3, local.logits.shape[2]).double()
    rows = rows_of(local, parts, local.into_logits(-1, vectors))
    torch.testing.assert_close(rows.total(), vectors @ local.logits[0, -1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("settings", CODERS.values(), ids=CODERS)
def test_what_features_write_constants_and_errors_are_every_write(settings):
    local, parts, coder = traced("llama", **settings)
    whole = parts.constants + parts.errors
    for a, position in enumerate(parts.active.positions):
        for t, write in writes_of(parts, coder, a).items():
            whole[t, position] += write
    for t, (write, written) in enumerate(zip(local.writes, parts.written.values(), strict=True)):
        torch.testing.assert_close(whole[t], write[0])
        sums = [terms.sum(0) for terms in written.terms.split([count + 2 for count in written.counts])]
        torch.testing.assert_close(torch.stack(sums), write[0])
        assert (parts.constants[t] == 0).all() == (t in coder.kept_layers)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "llava"])
def test_doubling_a_source_moves_every_preactivation_and_the_logits_by_its_column(name):
    local, parts, coder = traced(name)
    rows, active = all_rows(local, parts), parts.active
    vector = torch.randn(1, local.logits.shape[2]).double()
    onto_logits = rows_of(local, parts, local.into_logits(-1, vector)).features[0]
    for source in range(0, int((active.layers == 0).sum()), 5):
        position = active.positions[source]
        writes = {t: _at(position, write, local.stream) for t, write in writes_of(parts, coder, source).items()}
        reads, logits = local.replay(0.0, writes)
        moved = (vector @ (logits - local.logits)[0, -1]).item()
        assert moved == pytest.approx(onto_logits[source].item(), rel=1e-8, abs=1e-10)
        change = torch.stack([after - before for after, before in zip(reads, local.reads, strict=True)])[:, 0]
        for some, row in rows:
            moved = (change[active.layers[some], active.positions[some]] * active.directions[some]).sum(1)
            torch.testing.assert_close(moved, row.features[:, source], rtol=1e-8, atol=1e-10)


def _at(position: torch.Tensor, write: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    change = torch.zeros_like(like)
    change[0, position] = write
    return change


def test_edges_of_a_layer_to_itself_and_to_earlier_positions_are_none():
    local, parts, _ = traced("llama")
    active, L = parts.active, local.n_layers
    for some, rows in all_rows(local, parts):
        layers, positions = active.layers[some, None], active.positions[some, None]
        assert not rows.features[(active.layers >= layers) | (active.positions > positions)].any()
        assert not rows.errors[torch.arange(L) >= layers].any()
        assert not rows.stream[torch.arange(local.stream.shape[1]) > positions].any()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma3", "qwen3_vl"])
def test_rows_are_the_same_one_by_one_on_the_whole_prompt_and_together_on_the_positions_they_see(name):
    local, parts, _ = traced(name, skip=Wiring.full(2))
    whole, chosen = replace(local, layers=replace(local.layers, uncut={0, 1})), torch.arange(0, parts.n_features, 9)
    alone = {int(some): rows for some, rows in feature_rows(whole, parts, chosen, 1)}
    for some, rows in feature_rows(local, parts, chosen, 2**16):
        wanted = torch.cat([alone[number].features for number in some.tolist()])
        torch.testing.assert_close(rows.features, wanted, rtol=1e-8, atol=1e-8 * wanted.abs().max().item())
    assert not local.layers.uncut or name == "gemma3"  # where a batch ends inside the image


@pytest.fixture(scope="module")
def seeing(llava) -> tuple[LoadedModel, CrossLayerTranscoder]:
    return llava, finished_coder(Wiring.full(llava.n_layers), D=llava.d_model)


def graph_of(seeing, prompt="is there a cat ?", image: Image.Image | None = None, **settings) -> AttributionGraph:
    return attribute(*seeing, prompt, image or Image.new("RGB", (48, 96), "teal"), **settings)


def test_a_graph_has_all_kinds_of_nodes_and_closes(seeing, tmp_path):
    graph = graph_of(seeing)
    assert graph.scores.worst_row_gap < 1e-5
    assert {node.kind for node in graph.nodes} == {"token", "patch", "bias", "feature", "error", "target"}
    patches = [node for node in graph.nodes if node.kind == "patch"]
    assert [patches[i].box for i in (0, -1)] == [(0, 0, 16, 32), (32, 64, 48, 96)]
    assert graph.picture.rows == graph.picture.columns == 3
    assert graph.left_out == ""
    assert graph.target_weight.sum() <= 1
    graph.save(tmp_path / "graph.json")
    assert AttributionGraph.load(tmp_path / "graph.json").scores == graph.scores
    assert graph.prune().scores.worst_row_gap < 1e-5


def test_targets_are_the_likeliest_tokens_or_those_named(seeing):
    model, _ = seeing
    tokenizer, logits = model.processor.tokenizer, torch.randn(len(model.processor.tokenizer))
    likely = salient(logits, tokenizer, 0, probability=0.5, at_most=100)
    shares = [target.probability for target in likely]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) >= 0.5 > sum(shares[:-1])
    assert len(salient(logits, tokenizer, 0, at_most=4)) == 4
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    margin = named('"yes" - "no"', logits, tokenizer, 0)
    assert (margin.vector @ logits).item() == pytest.approx((logits[yes] - logits[no]).item())
    assert (named("yes", logits, tokenizer, 0).vector @ logits).item() == pytest.approx(
        (logits[yes] - logits.mean()).item()
    )
    both = ["yes", '"yes" - "no"']
    for asked, labels in ((both, both), ("yes", ["yes"])):
        graph = graph_of(seeing, targets=asked)
        assert [node.label for node in graph.nodes if node.kind == "target"] == labels


def test_a_token_in_the_middle_of_an_answer_is_explained_by_what_comes_before_it(seeing):
    whole = graph_of(seeing, response="yes there is", token=2)
    before = graph_of(seeing, "is there a cat ? yes there")
    assert whole.tokens == before.tokens
    assert [n.label for n in whole.nodes if n.kind == "target"] == [n.label for n in before.nodes if n.kind == "target"]
    first, plain = graph_of(seeing, response="yes").target_weight, graph_of(seeing).target_weight
    torch.testing.assert_close(first[first > 0], plain[plain > 0])


def test_a_graph_ends_at_the_token_explained_and_loses_nothing_by_it(seeing):
    tokenizer, answer = seeing[0].processor.tokenizer, {"response": "yes there is a cat", "token": 2}
    ended = graph_of(seeing, targets=["cat"], **answer)
    at = len(ended.tokens) - 1
    by_hand = replace(named("cat", torch.zeros(len(tokenizer)), tokenizer, at), probability=ended.nodes[-1].probability)
    whole = graph_of(seeing, targets=[by_hand], **answer)
    assert len(whole.tokens) > len(ended.tokens)
    late = [i for i, node in enumerate(whole.nodes) if (node.position or 0) > at]
    assert len(late) > 0
    assert not whole.influence.node[late].any()
    wanted, found = edges_of(whole), edges_of(ended)
    torch.testing.assert_close(found, {edge: wanted[edge] for edge in found}, rtol=1e-4, atol=1e-5)


def edges_of(graph: AttributionGraph) -> dict[tuple[str, str], float]:
    ids = [node.id for node in graph.nodes]
    return {
        (ids[s], ids[t]): weight
        for s, t, weight in zip(graph.source.tolist(), graph.target.tolist(), graph.weight.tolist(), strict=True)
    }


def test_a_budget_gives_rows_to_the_most_influential_features(seeing):
    whole, part = graph_of(seeing), graph_of(seeing, budget=Budget(features=9))
    with_rows = [n.id for n, v in zip(part.nodes, part.preactivation, strict=True) if n.kind == "feature" and v == v]
    assert len(with_rows) == 9
    assert "have no row of their own" in part.left_out
    assert part.scores.left_out > 0
    influence = dict(zip((n.id for n in whole.nodes), whole.influence.node, strict=True))
    assert influence[with_rows[0]] > 0
    assert graph_of(seeing, budget=Budget(features=10**6)).scores == whole.scores


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["cat dog"]}, r"target 'cat dog' is 2 tokens \('cat', 'dog'\)"),
        ({"targets": ["zebroid"]}, r"target 'zebroid' is no token"),
        ({"token": 1}, r"token is 1, but the answer has 1, its end mark included; choose 0 to 0"),
        ({"response": "yes", "token": 2}, r"token is 2, but the answer has 2"),
        (
            {"prompt": "<image><image> cat"},
            r"prompt '<image><image> cat': 2 <image> marks but 1 image; leave a single mark",
        ),
        ({"prompt": "a cat " * 70}, r"tokens, 9 of them for its image; .* by \d+ \(--pool-patches leaves it as long"),
    ],
)
def test_what_cannot_be_explained_is_refused_in_one_line(seeing, settings, message):
    with pytest.raises(UserError, match=message):
        graph_of(seeing, **settings)


def test_a_run_without_active_features_or_of_another_model_is_refused(seeing):
    model, coder = seeing
    silent = finished_coder(coder.wiring, D=model.d_model).with_thresholds(torch.full_like(coder.thresholds, 1e9))
    with pytest.raises(UserError, match="no feature is active on this prompt"):
        graph_of((model, silent))
    with pytest.raises(UserError, match="d_model"):
        graph_of((model, finished_coder(coder.wiring, D=8)))


def test_targets_that_choose_among_features_are_refused(seeing):
    model, _ = seeing
    coder = coder_of(model, decoder=TargetTied(topk_coalesced=3))
    coder.provenance = replace(coder.provenance, model_id="tiny")
    with pytest.raises(UserError, match="topk_coalesced"):
        graph_of((model, coder))


@pytest.mark.parametrize("budget", [{"features": 0}, {"seconds": -1.0}])
def test_a_budget_of_nothing_is_refused(budget):
    with pytest.raises(UserError, match="budget of"):
        Budget(**budget)
