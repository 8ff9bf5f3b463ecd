"""Features behind hallucination on a tiny random model: what fires, what it adds, and the table made of both."""

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from crosslayer import UserError, Wiring
from crosslayer.hallucination.causes import causes
from crosslayer.hallucination.comparing import Compared, compared
from crosslayer.hallucination.contrast import contrast
from crosslayer.hallucination.contrast_page import page
from crosslayer.hallucination.contrast_settings import ContrastSettings
from crosslayer.hallucination.decisions import as_batch, decisions
from crosslayer.hallucination.feature_table import read_contrast
from crosslayer.hallucination.firing import PLACES, Firing, fire
from crosslayer.hallucination.labelling import Said, label
from crosslayer.hallucination.ranking import examine
from crosslayer.hallucination.responses import Query, write_responses
from crosslayer.hallucination.splits import split_of
from crosslayer.hallucination.synonyms import load_table
from crosslayer.models.hooks import reading
from crosslayer.models.prompts import prepare
from crosslayer.replacement.local import trace
from crosslayer.zoo.emoji_llava.world import render, scenes
from making import array, finished_coder
from test_together import command, files

TEXTS = ("a dog and a bone .", "a star , a dog and a bone .", "a bone .")
SETTINGS = ContrastSettings(at_least=3, traced=6, resamples=40, top=5, rows=12, examples=2, near=3)


@pytest.fixture(scope="module")
def coder():
    return finished_coder(Wiring.full(3), F=16)


@pytest.fixture(scope="module")
def said(llava, tmp_path_factory):
    """Captions in which the bone is hallucinated every other time; only the split `select` has its pictures."""
    folder, pictures, responses = tmp_path_factory.mktemp("said"), scenes("plain", 8, seed=0), []
    for i in range(90):
        name = f"image-{i}"
        if split_of(name) == "select":
            render(pictures[i % 8]).save(folder / f"{name}.png")
        asked = Query(
            id=f"{name}:caption", image_id=name, image=f"{name}.png", prompt="describe the picture .", kind="caption",
            truth=("dog", "star", "bone")[: 2 + i % 2],
        )  # fmt: skip
        responses.append(label(asked, Said(TEXTS[i % 3]), load_table("emoji"), llava.processor))
    return responses, folder


@pytest.fixture(scope="module")
def others(coder):
    """The same features in another order, and features of another seed."""
    shuffled = finished_coder(Wiring.full(3), F=16)
    for i in range(3):
        order = torch.randperm(16, generator=torch.Generator().manual_seed(i))
        for parameters in (shuffled.W_enc, shuffled.b_enc, shuffled.W_dec, shuffled.thresholds):
            parameters[i].data.copy_(parameters[i][order].clone())
    return {"shuffled": shuffled, "other": finished_coder(Wiring.full(3), F=16, seed=1)}


@pytest.fixture(scope="module")
def found(llava, coder, said, others):
    return contrast(llava, coder, *said, SETTINGS, run="clt", beside=others)


def acts_alone(model, coder, response, folder):
    """Activations [S, P, F] of one response by itself, from the definition, and where its response begins."""
    batch, reads = prepare(model.model, model.processor, [response.answered(folder)]), {}
    with torch.no_grad(), reading(model.sites, lambda layer, x: reads.setdefault(layer, x[0].clone())):
        model.model(**batch.inputs)
    acts = []
    for i, layer in enumerate(coder.sources):
        pre = array(reads[layer]) @ array(coder.W_enc[i]).T + array(coder.b_enc[i])
        acts.append(pre * (pre > array(coder.thresholds[i])) * (np.arange(len(pre)) > 0)[:, None])
    asked = prepare(model.model, model.processor, [response.example(folder)])
    return np.stack(acts), asked.tokens.shape[1], asked.image[0].numpy()


def test_what_fires_is_what_the_encoders_read_at_each_place(llava, coder, said):
    responses, folder = said
    chosen = [r for r in responses if split_of(r.image_id) == "select"][:4]
    made = decisions(llava, chosen)
    firing = fire(llava, coder, made, folder, batch_prompts=3)
    for n, decision in enumerate(made):
        acts, start, image = acts_alone(llava, coder, decision.response, folder)
        at = [start + decision.response.response.split().index(decision.mention.object)]
        patches = acts[:, : len(image)][:, image]
        wanted = (acts[:, at[0]], acts[:, at[0] - 1], acts[:, start - 1], patches.max(1), patches.mean(1))
        for place, values in zip(PLACES, wanted, strict=True):
            got = np.stack([x.toarray()[n] for x in firing.acts[place]])
            assert got == pytest.approx(values, abs=1e-4), place


def test_modality_compares_mean_activations_on_image_and_text(llava, coder, said):
    responses, folder = said
    chosen = [r for r in responses if split_of(r.image_id) == "select"][:3]
    firing = fire(llava, coder, decisions(llava, chosen), folder)
    image, text = [], []
    for response in chosen:
        acts, _, seen = acts_alone(llava, coder, response, folder)
        seen = np.append(seen, [False] * (acts.shape[1] - len(seen)))
        image.append(acts[:, seen])
        text.append(acts[:, ~seen][:, 1:])  # no feature is there at the first position
    E_img, E_txt = (np.concatenate(parts, 1).mean(1) for parts in (image, text))
    alive = E_img + E_txt > 1e-3
    assert firing.modality[alive] == pytest.approx((E_img / (E_img + E_txt))[alive], abs=1e-3)


def test_attributions_are_what_a_margin_loses_without_the_feature(llava, coder, said):
    responses, folder = said
    response = next(r for r in responses if split_of(r.image_id) == "select" and len(r.mentions) == 3)
    decision = replace(decisions(llava, [response])[2], instead=5)
    made = causes(llava, coder, [decision], folder)
    decided = as_batch(llava, [decision], folder)
    local, place = trace(llava, coder, decided.batch), decided.position[0]
    acts, _, image = acts_alone(llava, coder, response, folder)
    image = np.append(image, [False] * (acts.shape[1] - len(image)))

    def margin(positions, i, f):
        """With a feature's writes taken away, everything else frozen."""
        a = torch.tensor(acts[i, :, f] * positions).float()[None, :, None]
        writes = {t: -a * coder.W_dec[i][f, j] for j, t in enumerate(coder.wiring.targets(coder.sources[i]))}
        logits = local.replay(0.0, writes)[1][0, place]
        return (logits[decision.chosen] - logits[5]).item()

    before = margin(np.zeros_like(image), 0, 0)
    assert made.margin[0] == pytest.approx(before, abs=1e-4)
    strongest = np.abs(made.total.toarray()[0]).argsort()[-6:]
    for column in strongest:
        i, f = divmod(int(column), coder.d_transcoder)
        for part, positions in ((made.text, ~image), (made.image, image)):
            assert part.toarray()[0, column] == pytest.approx(before - margin(positions, i, f), abs=2e-4)


def test_planted_firing_is_found_where_it_was_planted():
    rng = np.random.default_rng(0)
    N, S, F = 120, 2, 40
    h, stratum = rng.random(N) < 0.5, rng.integers(0, 3, N)
    acts = {place: [np.abs(rng.normal(size=(N, F))) * (rng.random((N, F)) < 0.6) for _ in range(S)] for place in PLACES}
    for place in PLACES:
        acts[place][1][:, 0] = 0.0  # a dead one
    acts["decision"][1][:, 7] = np.where(h, 5.0, 0.0) * (rng.random(N) < 0.8)  # AUROC 0.5 + 0.8 / 2
    zeros = np.zeros((S, F))
    firing = Firing({place: tuple(map(csr_array, parts)) for place, parts in acts.items()}, zeros, zeros)
    result = examine(firing, Compared((), h, stratum, np.arange(N)))
    assert result.auroc[1, F + 7] == pytest.approx(0.9, abs=0.05)
    assert np.argwhere(result.matched_q <= 0.05).tolist() == [[1, F + 7]]
    assert tuple(PLACES)[result.place[F + 7]] == "decision"
    assert np.flatnonzero(~result.alive).tolist() == [F]


def test_the_table_says_what_was_compared_and_orders_by_what_drives(found, said, coder):
    select = [r for r in said[0] if split_of(r.image_id) == "select"]
    mentions = [m for r in select for m in r.mentions]
    assert found.responses == len(select)
    assert (found.hallucinated, found.true) == tuple(
        sum(m.hallucinated is side for m in mentions) for side in (True, False)
    )
    assert found.left_out == 0
    assert 0 < found.matched_true < found.true
    keys = [(not f.passes, -(f.attribution.hallucinated - max(f.attribution.true, 0))) for f in found.features]
    assert keys == sorted(keys)
    for f in found.features:
        assert f.fires[f.place] == (f.frequency.hallucinated, f.frequency.true)
        assert f.attribution.difference == pytest.approx(f.attribution.hallucinated - f.attribution.true)
        assert f.attribution.low <= f.attribution.difference <= f.attribution.high
    assert [len(f.examples) for f in found.features] == [2] * 5 + [0] * 7


def test_features_of_other_runs_are_matched_by_what_they_do(found):
    shuffled, other = found.beside
    assert (shuffled.matched, shuffled.matched_in_top) == (1.0, 1.0)
    assert other.matched_in_top <= other.matched < 0.5
    assert [f.match["shuffled"] for f in found.features[:5]] == pytest.approx([1.0] * 5)
    assert max(f.match["other"] for f in found.features[:5]) < 0.99
    assert all(not f.match for f in found.features[5:])


def test_examples_are_the_strongest_of_the_split(llava, found, said, coder):
    responses, folder = said
    feature = found.features[0]
    i, best = coder.sources.index(feature.layer), []
    for response in responses:
        if split_of(response.image_id) == "select":
            acts = acts_alone(llava, coder, response, folder)[0][i, :, feature.feature]
            best.append((acts.max(), int(acts.argmax()), response.id))
    for shown, (activation, position, _) in zip(feature.examples, sorted(best, reverse=True)[:2], strict=True):
        assert (shown.activation, shown.position) == (pytest.approx(activation, abs=1e-4), position)
        assert (shown.token is None) == (shown.box is not None)


def test_the_table_comes_back_from_disk_and_again_from_the_same_seed(llava, found, said, coder, tmp_path):
    (tmp_path / "contrast.json").write_text(found.to_json())
    assert read_contrast(tmp_path / "contrast.json") == found
    again = contrast(llava, coder, *said, SETTINGS, run="clt")
    alone = replace(found, beside=(), features=tuple(replace(f, match={}) for f in found.features))
    assert again.to_json() == alone.to_json()
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [(int(r["layer"]), float(r["matched_q"])) for r in rows] == [(f.layer, f.matched_q) for f in found.features]
    assert json.loads(found.to_json())["features"][0]["effect"] == found.features[0].effect
    (tmp_path / "contrast.json").write_text("{}")
    with pytest.raises(UserError, match=r"contrast.json: is no table of features"):
        read_contrast(tmp_path / "contrast.json")


def test_the_page_shows_every_example_and_needs_nothing_else(found, said):
    text = page(found, said[1])
    assert text.count("<figure>") == sum(len(f.examples) for f in found.features)
    assert text.count("data:image/png") == text.count("<img")
    assert "http" not in text.replace("http-equiv", "")


def test_labels_that_cannot_be_compared_are_refused_with_what_it_takes(llava, said, coder):
    responses, folder = said
    plain = [replace(r, mentions=tuple(replace(m, tokens=None) for m in r.mentions)) for r in responses]
    with pytest.raises(UserError, match="none of .* mentions has a token span; label the responses with"):
        compared(llava, plain)
    with pytest.raises(
        UserError, match="responses that hallucinate, .* fall to the split .*, 40 are needed; about 400 in all"
    ):
        compared(llava, responses, at_least=40)
    apart = [
        replace(r, mentions=tuple(m for m in r.mentions if m.hallucinated or m.object == "dog")) for r in responses
    ]
    with pytest.raises(
        UserError, match="0 have a true one of the same object within 3 tokens, 3 are needed; widen --near"
    ):
        compared(llava, apart, near=3, at_least=3)
    beyond = replace(responses[0], mentions=(replace(responses[0].mentions[0], tokens=(40, 41)),))
    with pytest.raises(UserError, match=r"image-0:caption: its mention of 'dog' .* lies outside its response"):
        compared(llava, [beyond, *responses[1:]])
    other = [replace(r, token_ids=tuple(id + 1 for id in r.token_ids or ())) for r in responses]
    with pytest.raises(UserError, match="label the responses of this model"):
        contrast(llava, coder, other, folder, SETTINGS)
    with pytest.raises(UserError, match=r"the transcoder has n_layers 2, the model .* has 3"):
        contrast(llava, finished_coder(Wiring.full(2)), responses, folder, SETTINGS)
    with pytest.raises(UserError, match="names an object, so there is nothing to compare"):
        compared(llava, responses, about="questions")


def test_mentions_without_a_token_span_are_left_out_and_counted(llava, said):
    responses = [replace(r, mentions=(replace(r.mentions[0], tokens=None), *r.mentions[1:])) for r in said[0]]
    select = [r for r in responses if split_of(r.image_id) == "select"]
    found = compared(llava, [*responses, *said[0]], at_least=3)
    assert found.left_out == len(select)


def test_settings_out_of_range_are_refused():
    with pytest.raises(UserError, match="near is 0; choose at least 1"):
        ContrastSettings(near=0)
    with pytest.raises(UserError, match="alpha is 1.0; choose a rate between 0 and 1"):
        ContrastSettings(alpha=1.0)


@pytest.fixture(scope="module")
def asked(llava_folder, said, coder, tmp_path_factory) -> list[str]:
    """The verb, without its output folder."""
    write_responses(said[1] / "responses.jsonl", said[0])
    run = tmp_path_factory.mktemp("run") / "clt"
    coder.save(run)
    small = {"at-least": 3, "resamples": 20, "examples": 1, "top": 3, "traced": 3, "batch-prompts": 4}
    options = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    return ["hallucination", "contrast", str(run), str(said[1]), "--model", str(llava_folder), *options, "--out"]


def test_the_verb_writes_table_csv_and_page(asked, tmp_path):
    code, out, _ = command(*asked, str(tmp_path))
    assert code == 0
    assert "hallucinated mentions (h) compared with" in out
    assert read_contrast(tmp_path / "contrast.json").run == asked[2]
    assert files(tmp_path).keys() == {"contrast.json", "contrast.csv", "contrast.html"}
    code, _, err = command(*asked, str(tmp_path))
    assert code == 2
    assert "already exists; choose another folder or add --overwrite" in err


def test_many_write_what_one_writes(ranks, asked, tmp_path):
    code, out, _ = command(*asked, str(tmp_path / "one"))
    (first_code, first, _), *others = ranks.run(2, command, *asked, str(tmp_path / "many"))
    assert (code, first_code, first) == (0, 0, out.replace(str(tmp_path / "one"), str(tmp_path / "many")))
    assert others == [(0, "", "")]
    assert files(tmp_path / "many") == files(tmp_path / "one")
