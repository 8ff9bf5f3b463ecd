"""Interventions: edits equal a forward pass by hand, in any batch and any cache, and change nothing else."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import crosslayer as xl
from crosslayer import (
    Ablate,
    Add,
    BatchTopK,
    EditFile,
    Everywhere,
    Full,
    GroupMax,
    Intervention,
    LowRank,
    Part,
    Positions,
    ReLU,
    Scale,
    Set,
    SourceTied,
    Steer,
    TargetTied,
    TopK,
    UserError,
    Wiring,
)
from crosslayer.coders.codes import DenseCodes
from crosslayer.coders.input_norm import LayerNorm
from crosslayer.models.hooks import recording
from crosslayer.replacement.model import continuation
from crosslayer.zoo.emoji_llava.architecture import WORDS
from making import finished_coder, random_coder, text_examples, traces
from test_local import loaded, prompt_of
from test_replacement import batch_of, pictured

EDITS = (
    Intervention(layer=0, feature=3, action=Ablate()),
    Intervention(layer=0, feature=5, action=Scale(-2.0), where=Positions((2, 4))),
    Intervention(layer=1, feature=7, action=Set(1.5)),
    Intervention(layer=1, feature=7, action=Add(0.5), where=Positions((3,))),
    Intervention(layer=0, feature=9, action=Ablate(), writes=((1, 0.3),)),
    Intervention(layer=0, feature=9, action=Set(1.0), writes=((0, 1.0), (2, -0.5))),
    Intervention(layer=0, feature=11, action=Ablate(), writes=((0, 0.25), (1, 0.5))),
)
DIRECTIONS = (
    Steer(layer=1, vector=torch.linspace(-1, 1, 32), action=Ablate(), site="read"),
    Steer(layer=0, vector=torch.linspace(0, 1, 32), action=Add(3.0), where=Positions((1, 2))),
)
CODERS = {
    "full": {},
    "window": {"wiring": Wiring(3, 2)},
    "own layer left out, its MLP kept": {"wiring": Wiring.full(3, 1), "kept_layers": [0]},
    "scales and offsets": {"decoder": Full(scale=True, offset=True)},
    "source-tied": {"decoder": SourceTied(offset=True)},
    "target-tied": {"decoder": TargetTied(scale=True)},
    "low rank": {"decoder": LowRank(rank=2)},
    "skip": {"skip": Wiring.full(3)},
    "norm": {"input_norm": LayerNorm()},
    "topk": {"sparsity": TopK(6)},
    "groupmax": {"sparsity": GroupMax(6)},
    "batch-topk": {"sparsity": BatchTopK(6)},
    "relu": {"sparsity": ReLU()},
}


def coder_of(wiring: Wiring | None = None, sparsity=None, **settings) -> xl.CrossLayerTranscoder:
    """A random transcoder of the tiny models, ready for use."""
    torch.manual_seed(0)
    coder = xl.CrossLayerTranscoder(wiring or Wiring.full(3), 32, 24, sparsity or TopK(6), **settings)
    for parameter in coder.parameters():
        parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    coder.cut.fill_(1.0)
    return (coder if sparsity else coder.with_thresholds(torch.rand(len(coder.sources), 24))).requires_grad_(False)


@pytest.fixture(scope="module")
def double(llama_folder) -> xl.LoadedModel:
    model = xl.load_model(llama_folder)
    model.model.double()
    return model


@pytest.fixture(scope="module")
def coder() -> xl.CrossLayerTranscoder:
    return finished_coder(Wiring.full(3))


def logits_of(model, prompts, coder, edits=(), **settings) -> torch.Tensor:
    with torch.no_grad(), xl.edited(model, coder, edits, **settings):
        return model.model(**prompts.inputs).logits


def new_acts(coder: xl.CrossLayerTranscoder, layer: int, x: torch.Tensor, edits) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense activations of a layer of one prompt, before and after the edits, position by position."""
    acts = coder.encode_layer(layer, x).dense()
    acts[0] = 0.0
    new = acts.clone()
    for edit in edits:
        for p in range(1, len(x)):
            if edit.layer == layer and (edit.where == Everywhere() or p in edit.where.at):
                new[p, edit.feature] = edit.action(new[p, edit.feature])
    return acts, new


def changes(coder: xl.CrossLayerTranscoder, layer: int, x: torch.Tensor, edits) -> torch.Tensor:
    """What the edits of a layer add to the writes of all layers, [L, P, D]."""
    out = torch.zeros(3, *x.shape, dtype=x.dtype)
    if layer in coder.sources:
        i, targets = coder.sources.index(layer), list(coder.wiring.targets(layer))
        for writes in {edit.writes for edit in edits}:
            some = [edit for edit in edits if edit.writes == writes]
            before, after = (coder.decoder.write(i, DenseCodes(acts)) for acts in new_acts(coder, layer, x, some))
            change = (after - before).unflatten(1, (len(targets), -1)).transpose(0, 1)
            for place, target in enumerate(targets):
                out[target] += change[place] * (1.0 if writes is None else dict(writes).get(target, 0.0))
    return out


def by_hand(model: xl.LoadedModel, tokens: torch.Tensor, read, write) -> torch.Tensor:
    """Logits of one prompt [P, V] in plain torch: what `read(t, x)` and `write(t, y)` give goes on."""
    llama = model.model.model
    stream = llama.embed_tokens(tokens[None])
    turn = llama.rotary_emb(stream, torch.arange(len(tokens))[None])
    for t, layer in enumerate(llama.layers):
        stream = stream + layer.self_attn(layer.input_layernorm(stream), turn, None)[0]
        stream = read(t, stream[0])[None]
        stream = stream + write(t, layer.mlp(layer.post_attention_layernorm(stream))[0])
    return model.model.lm_head(llama.norm(stream))[0]


def edited_by_hand(model: xl.LoadedModel, coder, tokens: torch.Tensor, edits=EDITS, directions=()) -> torch.Tensor:
    more = []

    def steered(t: int, site: str, x: torch.Tensor) -> torch.Tensor:
        return x + sum(moved(steer, x) for steer in directions if (steer.layer, steer.site) == (t, site))

    def read(t: int, x: torch.Tensor) -> torch.Tensor:
        x = steered(t, "read", x)
        more.append(changes(coder, t, x, edits))
        return x

    return by_hand(model, tokens, read, lambda t, y: steered(t, "write", y + sum(change[t] for change in more)))


def moved(steer: Steer, x: torch.Tensor) -> torch.Tensor:
    """What steering adds to x [P, D]."""
    vector, out = steer.vector.to(x), torch.zeros_like(x)
    for p in range(1, len(x)):
        if steer.where == Everywhere() or p in steer.where.at:
            out[p] = -(x[p] @ vector) / (vector @ vector) * vector if steer.action == Ablate() else 3.0 * vector
    return out


def reaches(edit: Intervention, coder: xl.CrossLayerTranscoder) -> bool:
    return all(target in coder.wiring.targets(edit.layer) for target, _ in edit.writes or ())


@pytest.mark.parametrize("settings", CODERS.values(), ids=CODERS)
def test_an_edit_is_a_forward_pass_by_hand(double, settings):
    coder, batch = coder_of(**settings).double(), batch_of(double)
    edits = [edit for edit in EDITS if edit.layer in coder.sources and reaches(edit, coder)]
    with torch.no_grad():
        plain = double.model(**batch.inputs).logits
        logits = logits_of(double, batch, coder, edits)
        for row, before, tokens, real in zip(logits, plain, batch.tokens, batch.attention, strict=True):
            wanted = edited_by_hand(double, coder, tokens[real], edits)
            torch.testing.assert_close(row[real], wanted, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(before[real], wanted)


def test_steering_is_a_forward_pass_by_hand(double, coder):
    batch, coder = batch_of(double), coder_of().double()
    with torch.no_grad():
        logits = logits_of(double, batch, coder, [*EDITS, *DIRECTIONS])
        for row, tokens, real in zip(logits, batch.tokens, batch.attention, strict=True):
            wanted = edited_by_hand(double, coder, tokens[real], EDITS, DIRECTIONS)
            torch.testing.assert_close(row[real], wanted, atol=1e-5, rtol=1e-5)


def never_active(coder: xl.CrossLayerTranscoder) -> xl.CrossLayerTranscoder:
    coder.thresholds[:, 3] = torch.inf
    return coder


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_no_strength_and_features_that_never_fire_change_no_bit(kind, request):
    model = request.getfixturevalue(kind)
    examples = pictured() if kind == "llava" else text_examples(4)
    batch, coder = batch_of(model, examples), never_active(finished_coder(Wiring.full(3)))
    silent = [
        Intervention(layer=layer, feature=3, action=action) for layer in range(3) for action in (Ablate(), Scale(9.0))
    ]
    plain, words = model.model(**batch.inputs).logits, continuation(model, batch, max_new_tokens=8)
    for edits, strength in ((silent, 1.0), ([*EDITS, *DIRECTIONS], 0.0)):
        assert torch.equal(logits_of(model, batch, coder, edits, strength=strength), plain)
        with xl.edited(model, coder, edits, strength=strength):
            assert torch.equal(continuation(model, batch, max_new_tokens=8), words)
    assert not torch.equal(logits_of(model, batch, coder, EDITS), plain)


@pytest.mark.parametrize("kind", ["llama", "llava"])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_cached_generation_is_uncached_generation_and_padding_does_not_matter(kind, cache, request, coder):
    model = request.getfixturevalue(kind)
    examples = pictured() if kind == "llava" else text_examples(4)
    edits = [
        *DIRECTIONS,
        *(Intervention(layer=1, feature=f, action=Set(4.0), where=Part("answer")) for f in range(4)),
        *(Intervention(layer=0, feature=f, action=Set(3.0), where=Part("text")) for f in range(4)),
        *(Intervention(layer=0, feature=f, action=Add(3.0), where=Part("image")) for f in range(4, 8)),
        Intervention(layer=2, feature=1, action=Set(20.0), where=Positions((7, 18))),
    ]
    batch = batch_of(model, examples)
    settings = {"max_new_tokens": 10, "min_new_tokens": 6, "suppress_tokens": [WORDS.index("<image>")]}
    with xl.edited(model, coder, edits):
        cached = continuation(model, batch, **settings, **cache)
        plain = {name: value for name, value in cache.items() if name == "num_beams"}
        assert torch.equal(cached, continuation(model, batch, **settings, **plain, use_cache=False))
        for row, example in zip(cached, examples, strict=True):
            alone = continuation(model, batch_of(model, [example]), **settings, **cache)[0]
            assert torch.equal(row[: len(alone)], alone)
    assert not torch.equal(cached, continuation(model, batch, **settings, **cache))


@pytest.mark.parametrize(
    "name", ["bloom", "cohere", "falcon", "gemma4_text", "gpt2", "gpt_oss", "granite", "llama4_text", "olmo2", "opt"]
)
def test_writes_of_every_kind_of_layer_get_what_is_added_and_no_more(name):
    model = loaded(name)
    vector, writes = torch.linspace(-1, 1, model.d_model), {}
    edit, coder = Steer(layer=1, vector=vector, action=Add(2.0)), finished_coder(Wiring.full(2), D=model.d_model)
    silent = [Intervention(layer=0, feature=0, action=Ablate()), edit]
    batch = prompt_of(model)
    with torch.no_grad():
        with recording(model.sites, lambda *_: None, lambda layer, y: writes.setdefault((layer, 0), y.clone())):
            plain = model.model(**batch.inputs).logits
        assert torch.equal(logits_of(model, batch, coder, silent, strength=0.0), plain)
        with (
            xl.edited(model, coder, [edit]),
            recording(model.sites, lambda *_: None, lambda layer, y: writes.setdefault((layer, 1), y.clone())),
        ):
            model.model(**batch.inputs)
    added = torch.where(batch.position[..., None] > 0, 2 * vector, 0.0)
    torch.testing.assert_close(writes[0, 1], writes[0, 0])
    torch.testing.assert_close(writes[1, 1] - writes[1, 0], added.to(writes[1, 0]), atol=1e-5, rtol=1e-5)


def test_parts_are_those_of_the_batch(llava, coder):
    told = [replace(example, response="a tiger") for example in pictured()]
    batch = batch_of(llava, told)
    parts = {"image": batch.image, "text": batch.attention & ~batch.image, "answer": batch.response}
    plain = logits_of(llava, batch, coder)
    for name, mask in parts.items():
        edit = Steer(layer=0, vector=torch.arange(32.0), action=Add(5.0), where=Part(name))
        changed = (logits_of(llava, batch, coder, [edit], batch=batch) != plain).any(2) & batch.attention
        began, wanted = (torch.where(m & (batch.position > 0), batch.position, 999).amin(1) for m in (changed, mask))
        assert torch.equal(began, wanted)
    edit = Intervention(layer=0, feature=0, action=Ablate(), where=Part("answer"))
    with pytest.raises(UserError, match="part answer, but a forward pass does not show where its answer begins"):
        logits_of(llava, batch, coder, [edit])


@pytest.mark.parametrize(("first", "last"), [(0, 2), (0, 1), (1, 1), (1, 2)])
def test_constrained_patching_is_a_forward_pass_by_hand(double, first, last):
    coder, batch = coder_of().double(), batch_of(double, text_examples(1))
    edits, tokens, reads, writes = EDITS if first == 0 else EDITS[2:], batch.tokens[0], {}, {}
    with torch.no_grad():
        by_hand(double, tokens, lambda t, x: reads.setdefault(t, x), lambda t, y: writes.setdefault(t, y))
        more = sum(changes(coder, t, reads[t], edits) for t in range(3))
        held = {t: writes[t] + more[t] for t in range(first, last + 1)}
        wanted = by_hand(double, tokens, lambda t, x: x, lambda t, y: held.get(t, y))
    found = xl.patched(double, coder, edits, batch, first=first, last=last)
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, logits_of(double, batch, coder, edits))
    with pytest.raises(UserError, match="an edit at layer 2 changes no write of layers 0 to 1; move the range"):
        xl.patched(double, coder, [Intervention(layer=2, feature=0, action=Ablate())], batch, first=0, last=1)


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_a_sweep_is_edits_one_by_one(kind, request, coder):
    model = request.getfixturevalue(kind)
    example = replace(pictured()[0], response="a tiger") if kind == "llava" else text_examples(4)[3]
    batch = batch_of(model, [example])
    wheres = (Everywhere(), Positions((1, 5)), Part("answer"))
    sets = [[Intervention(layer=f % 3, feature=f, action=Add(2.0), where=wheres[f % 2])] for f in range(7)]
    sets += [[], EDITS, [*DIRECTIONS, sets[0][0]], [replace(sets[1][0], where=Part("answer"))]]
    found = xl.sweep(model, coder, batch, sets, at_once=4)
    for logits, edits in zip(found, sets, strict=True):
        alone = logits_of(model, batch, coder, edits, batch=batch)[0, -1]
        torch.testing.assert_close(logits, alone, atol=2e-4, rtol=1e-4)
    assert len({round(logits.sum().item(), 3) for logits in found}) > 7
    with pytest.raises(UserError, match="a sweep is over edits of one prompt; the batch has 2"):
        xl.sweep(model, coder, batch_of(model, text_examples(2)), sets)


def test_an_edit_file_is_read_as_it_was_written(llama, coder, tmp_path):
    path, edits = tmp_path / "edit.json", [*EDITS, *DIRECTIONS, replace(EDITS[0], where=Part("answer"))]
    EditFile.of(llama, coder, edits, 0.5).save(path)
    found = EditFile.load(path)
    found.check(llama, coder)
    batch = batch_of(llama, text_examples(1))
    wanted = logits_of(llama, batch, coder, edits, strength=0.5, batch=batch)
    again = logits_of(llama, batch, coder, found.interventions, strength=found.strength, batch=batch)
    assert torch.equal(again, wanted)
    assert found.interventions[: len(EDITS)] == EDITS
    with pytest.raises(UserError, match="these edits are for run '[0-9a-f]{16}', but this run is '[0-9a-f]{16}'"):
        found.check(llama, finished_coder(Wiring.full(3), seed=1))
    with pytest.raises(UserError, match="these edits are for model '.*llama', but this model is 'other'"):
        found.check(replace(llama, id="other"), coder)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ('"schema": 1', '"schema": 2', "edits of schema 2, this crosslayer reads 1"),
        ('"kind": "ablate"', '"kind": "abate"', "action is 'abate'; choose one of ablate, scale, set, add"),
        ('"factor"', '"factory"', "action scale has no setting factory"),
        ('"feature": 3', '"feature": "3"', "an intervention has feature '3'; a whole number is wanted"),
        ("0.3", '"a"', "an intervention is damaged .ValueError"),
        ('"feature": 3,', "", "an intervention feature: missing a required .*argument: 'feature'"),
        ('"strength": 1.0', '"strength": "much"', "its strength is 'much'; a number is wanted"),
        ('"kind": "positions"', '"kind": "part"', "where part has no setting at"),
        ("{", "", "cannot be read as JSON"),
    ],
)
def test_a_damaged_edit_file_is_refused_in_one_line(llama, coder, tmp_path, before, after, named):
    path = tmp_path / "edit.json"
    EditFile.of(llama, coder, EDITS).save(path)
    path.write_text(path.read_text().replace(before, after, 1))
    with pytest.raises(UserError, match=named):
        EditFile.load(path)


def one(**settings) -> Intervention:
    return Intervention(**{"layer": 0, "feature": 0, "action": Ablate()} | settings)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: one(layer=3), "an intervention is at layer 3; features are at layers 0 to 2"),
        (lambda: one(layer=1, writes=((0, 1.0),)), "feature 1.0 writes to layer 0; it writes to layers 1 to 2"),
        (lambda: one(writes=((1, 1.0), (1, 0.5))), "name one layer or more, each once and with a finite share"),
        (lambda: one(writes=()), "name one layer or more"),
        (lambda: one(writes=((1, float("inf")),)), "each once and with a finite share"),
        (lambda: one(feature=24), "on feature 24 of layer 0, which has features 0 to 23"),
        (lambda: one(where=Positions((0, 1))), r"positions are \[0, 1\]; give whole numbers from 1 on"),
        (lambda: one(where=Positions(())), r"positions are \[\]"),
        (lambda: one(where=Part("picture")), "a part is 'picture'; choose one of image, text, answer"),
        (lambda: one(action=Set(float("nan"))), "the value of Set is nan; a finite number is wanted"),
        (lambda: Steer(layer=9, vector=torch.ones(32), action=Ablate()), "layer 9 is to be steered; .* has 0 to 2"),
        (lambda: Steer(layer=0, vector=torch.ones(3), action=Ablate()), "vector has 3 entries; .* width is 32"),
        (lambda: Steer(layer=0, vector=torch.zeros(32), action=Ablate()), "is all zeros or not finite"),
        (lambda: Steer(layer=0, vector=torch.ones(32), action=Ablate(), site="x"), "site to steer at is 'x'"),
    ],
)
def test_edits_that_cannot_be_are_refused(llama, coder, make, named):
    with pytest.raises(UserError, match=named):
        logits_of(llama, batch_of(llama), coder, [make()])


def test_transcoders_that_cannot_be_edited_by_are_refused(llama):
    coalesced = coder_of(decoder=TargetTied(topk_coalesced=3), sparsity=TopK(6))
    with pytest.raises(UserError, match="with topk_coalesced targets choose among features"):
        logits_of(llama, batch_of(llama), coalesced, EDITS)
    with pytest.raises(UserError, match="joint TopK cannot encode one layer alone"):
        logits_of(llama, batch_of(llama), random_coder(Wiring.full(3), D=32, F=24), EDITS)
    with pytest.raises(UserError, match="the transcoder has n_layers 4, the model .* has 3"):
        logits_of(llama, batch_of(llama), finished_coder(Wiring.full(4)), EDITS)


def test_nothing_is_left_after_use_or_an_exception(llama, coder):
    batch, before = batch_of(llama), traces(llama.model)
    logits = llama.model(**batch.inputs).logits
    with pytest.raises(RuntimeError, match="inside"), xl.edited(llama, coder, [*EDITS, *DIRECTIONS]):
        raise RuntimeError("inside")
    xl.patched(llama, coder, [*EDITS, *DIRECTIONS], batch, first=0, last=2)
    assert traces(llama.model) == before
    assert "generate" not in vars(llama.model)
    assert torch.equal(llama.model(**batch.inputs).logits, logits)


def test_the_examples_of_the_docs_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    finished_coder(Wiring.full(10), D=128).save("runs/clt")
    Image.new("RGB", (48, 48), "teal").save("scene.png")
    page = Path(__file__).parent.parent / "docs" / "interventions.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(compile("\n".join(examples), str(page), "exec"), {})
    assert capsys.readouterr().out.count("['") == 3
