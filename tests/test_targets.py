"""What a graph explains: sums of tokens, features, directions; against finite differences under full freeze."""

from dataclasses import replace

import pytest
import torch

from crosslayer import CrossLayerTranscoder, LoadedModel, Target, UserError, attribute
from crosslayer.attribution.parts import split
from crosslayer.attribution.targets import feature_target, named, sums
from crosslayer.replacement.local import trace
from making import finished_coder
from test_attribute import PROMPT, coder_of, writes_of
from test_local import loaded, prompt_of


def exact() -> tuple[LoadedModel, CrossLayerTranscoder]:
    """A tiny Llama and a transcoder of it, in float64."""
    model = loaded("llama")
    coder = coder_of(model)
    coder.provenance = replace(coder.provenance, model_id="llama")
    return model, coder


def directions(model: LoadedModel) -> list[Target]:
    torch.manual_seed(3)
    reading, logits = torch.randn(model.d_model).double(), torch.randn(model.model.config.vocab_size).double()
    return [
        Target(label="of the read", vector=reading, layer=1, position=3),
        Target(label="of the logits", vector=logits, position=-2),
    ]


def test_rows_of_directions_and_features_close_and_are_finite_differences():
    model, coder = exact()
    batch = prompt_of(model)
    local = trace(model, coder, batch)
    parts = split(local, coder, batch.position[0] == 0)
    P, active = local.stream.shape[1], parts.active
    named_feature = f"feature 1/{int(active.features[-1])} @ {int(active.positions[-1]) - P}"
    targets = [*directions(model), feature_target(named_feature, parts, coder, P)]
    graph = attribute(model, coder, PROMPT, targets=[*directions(model), named_feature])
    assert graph.scores.worst_row_gap < 1e-6
    rows = [i for i, node in enumerate(graph.nodes) if node.kind == "target"]
    weight = {
        (t, s): w for t, s, w in zip(graph.target.tolist(), graph.source.tolist(), graph.weight.tolist(), strict=True)
    }
    moved_by_any = 0
    for a in range(0, int((active.layers == 0).sum()), 3):
        writes = {t: torch.zeros_like(local.stream) for t in range(2)}
        for t, write in writes_of(parts, coder, a).items():
            writes[t][0, active.positions[a]] = write
        reads, logits = local.replay(0.0, writes)
        source = graph.index[f"feature/0/{int(active.positions[a])}/{int(active.features[a])}"]
        for row, target in zip(rows, targets, strict=True):
            after, before = (
                (logits, local.logits) if target.layer is None else (reads[target.layer], local.reads[target.layer])
            )
            moved = (target.vector @ (after - before)[0, target.position].detach()).item()
            assert weight.get((row, source), 0.0) == pytest.approx(moved, rel=1e-5, abs=1e-9)
            moved_by_any += moved != 0
    assert moved_by_any > 10


def test_a_features_row_as_a_target_is_its_own_row_and_nothing_at_or_above_it_is_traced():
    model, coder = exact()
    whole = attribute(model, coder, PROMPT)
    id = next(node.id for node in reversed(whole.nodes) if node.kind == "feature" and node.layer == 1)
    _, layer, position, feature = id.split("/")
    graph = attribute(model, coder, PROMPT, targets=[f"feature {layer}/{feature} @ {position}"])
    target = next(i for i, node in enumerate(graph.nodes) if node.kind == "target")

    def row(of, i):
        edges = (of.target == i).nonzero().flatten().tolist()
        return {of.nodes[of.source[e]].id: float(of.weight[e]) for e in edges}

    assert row(graph, target) == pytest.approx(row(whole, whole.index[id]), rel=1e-5, abs=1e-9)
    assert graph.preactivation[target] == pytest.approx(float(whole.preactivation[whole.index[id]]))
    assert {node.layer for node in graph.nodes if node.kind == "feature"} == {0}
    assert graph.captions[target].startswith(f"target layer {layer} feature {feature} at")


def test_weighted_sums_of_tokens_are_what_they_say(llama):
    tokenizer, logits = llama.processor, torch.randn(len(llama.processor))
    yes, no, cat = (logits[tokenizer.convert_tokens_to_ids(word)] for word in ("yes", "no", "cat"))
    for text, wanted in {
        '"yes" - "no"': yes - no,
        "'yes' + 0.5 'no' - 2 * \"cat\"": yes + 0.5 * no - 2 * cat - (1 + 0.5 - 2) * logits.mean(),
        '-"yes"': logits.mean() - yes,
        '"cat"-.5"cat"': 0.5 * (cat - logits.mean()),
    }.items():
        target = named(text, logits, tokenizer, 7)
        assert (target.vector @ logits).item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-5)
        assert (target.vocab, target.position) == (None, 7)
    with pytest.raises(UserError, match="is 6 tokens"):
        named('"yes" "no"', logits, tokenizer, 7)


def test_words_that_a_shell_splits_are_sums_again():
    assert sums(["yes", "no"]) == ["yes", "no"]
    assert sums([" yes", "-", " no", "+", "0.5 'cat'", "dog"]) == ['" yes" - " no" + 0.5 \'cat\'', "dog"]
    assert sums(["-"]) == ["-"]


def test_several_tokens_of_an_answer_are_explained_in_one_graph(llama):
    coder = finished_coder(coder_of(llama).wiring, D=llama.d_model)
    both = attribute(llama, coder, "is there a cat ?", response="yes there is", token=[0, 2], at_most=2)
    at = {node.position for node in both.nodes if node.kind == "target"}
    assert at == {len(both.tokens) - 3, len(both.tokens) - 1}
    assert both.scores.worst_row_gap < 1e-5
    alone = attribute(llama, coder, "is there a cat ?", response="yes there is", token=2, at_most=2)
    for node in alone.nodes:
        if node.kind == "target":
            assert both.preactivation[both.index[node.id]] == alone.preactivation[alone.index[node.id]]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("feature 7/1 @ 2", "the run has features of layers 0 to 1, none of layer 7"),
        ("feature 1 @ 2", "a feature is `feature LAYER/NUMBER @ POSITION`"),
        ("feature 1/24 @ 2", "a layer has features 0 to 23"),
        ("feature 1/2 @ 99", r"position 99 is none of the prompt's \d+; choose 0 to"),
        ("feature 1/2 @ -99", "position -99 is none of"),
        ("feature 1/2 @ 0", "not active there, but at .*; choose one of these positions"),
        (
            Target(label="x", vector=torch.ones(3), position=0),
            r"'x': its vector has shape \[3\]; 64 finite|as the logits",
        ),
        (Target(label="x", vector=torch.ones(3), position=0, layer=0), "as the read has"),
        (
            Target(label="x", vector=torch.ones(16), position=0, layer=2),
            "layer 2 is none of the model's; choose 0 to 1",
        ),
        (Target(label="x", vector=torch.ones(16), position=50, layer=1), "position 50 is none of"),
        (Target(label="x", vector=torch.ones(16), position=1, layer=1, weight=-1.0), "its weight is -1.0"),
    ],
)
def test_what_is_not_there_is_refused(target, message):
    model, coder = exact()
    with pytest.raises(UserError, match=message):
        attribute(model, coder, PROMPT, targets=[target])
