"""Evaluation: every figure against a loop by hand, and what a mean, a perfect and a babbling replacement score."""

import json
from copy import deepcopy
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

from crosslayer import Example, LoadedModel, ReplacementModel, UserError, Wiring, evaluate, load_model
from crosslayer.activations.capture import capture
from crosslayer.evaluation import agreement
from crosslayer.models.prompts import prepare
from crosslayer.replacement.model import generate_tokens
from making import array, dense_acts, dense_writes, finished_coder, text_examples


def examples() -> list[Example]:
    """Five prompts, three of them with a picture, four with a response."""
    pictures = [Image.new("RGB", (96, 96), (shade, 90, 255 - shade)) for shade in (10, 120, 240)]
    told = [Example(f"p{i}", "describe the picture .", "a cat and a dog .", p) for i, p in enumerate(pictures)]
    return [*told, Example("q", "is there a dog ?", "yes ."), *text_examples(1)]


def usable_tokens(model: LoadedModel):
    captured = capture(model, examples(), range(5))
    return captured[captured.position > 0]


def silent(model: LoadedModel, write: torch.Tensor):
    """A transcoder without effect but its biases `write` [L, D], at first positions too."""
    coder = finished_coder(Wiring.full(model.n_layers))
    for W in coder.W_dec:
        W.data.zero_()
    coder.thresholds.fill_(torch.inf)
    coder.b_dec.data, coder.first_write = write.clone(), write.clone()
    return coder


@pytest.fixture(scope="module")
def coder():
    return finished_coder(Wiring.full(3))


@pytest.fixture(scope="module")
def score(llava, coder):
    return evaluate(llava, coder, examples(), max_new_tokens=12)


def test_agreement_is_that_of_a_loop_by_hand(llava, coder, score):
    agreed, scored, nats, divergence = 0, 0, 0.0, 0.0
    for example in examples():
        batch = prepare(llava.model, llava.processor, [example])
        original = llava.model(**batch.inputs).logits[0]
        replaced = ReplacementModel(llava, coder).logits(batch)[0]
        for place in range(1, batch.tokens.shape[1]):
            if batch.response[0, place]:
                p, q = original[place - 1].log_softmax(0), replaced[place - 1].log_softmax(0)
                agreed += int(p.argmax() == q.argmax())
                nats -= q[batch.tokens[0, place]].item()
                divergence += (p.exp() * (p - q)).sum().item()
                scored += 1
    assert score.n_tokens == scored
    assert score.top1_agreement.value == pytest.approx(agreed / scored)
    assert score.cross_entropy.value == pytest.approx(nats / scored, rel=1e-4)
    assert score.kl.value == pytest.approx(divergence / scored, rel=1e-4)


@pytest.fixture(scope="module")
def ending(llama_folder) -> LoadedModel:
    """A model that likes to end its answers, early or late."""
    model = load_model(llama_folder)
    model.model.lm_head.weight.data[model.model.generation_config.eos_token_id] *= 2
    return model


@pytest.mark.parametrize("kind", ["llava", "ending"])
def test_generation_match_is_that_of_a_loop_by_hand(kind, coder, request):
    model, matched, lengths = request.getfixturevalue(kind), 0, []
    data = examples() if kind == "llava" else text_examples(12)
    for example in data:
        original = generate_tokens(model, [example], max_new_tokens=12)[0].tolist()
        with ReplacementModel(model, coder).replaced():
            replaced = generate_tokens(model, [example], max_new_tokens=12)[0].tolist()
        matched += sum(a == b for a, b in zip(original, replaced, strict=False))
        lengths += [len(original), len(replaced)]
    found = evaluate(model, coder, data, max_new_tokens=12).generation_match
    assert found.value == pytest.approx(matched / sum(lengths[::2]))
    assert matched > 0
    assert len(set(lengths)) > 3 or kind == "llava"


def test_fvu_and_l0_are_those_of_the_definition(llava, coder, score):
    tokens = usable_tokens(llava)
    x, y = array(tokens.x), array(tokens.y)
    acts = dense_acts(coder, x)
    error = ((y - dense_writes(coder, acts)) ** 2).sum(2)
    spread = ((y - y.mean(0)) ** 2).sum(2)
    assert score.fvu.value == pytest.approx((error.sum(0) / spread.sum(0)).mean(), rel=1e-4)
    assert score.l0.value == pytest.approx(sum((a > 0).sum() for a in acts) / len(x), rel=1e-6)
    image = array(tokens.image) > 0
    for name, rows in {"all": image | True, "image": image, "text": ~image}.items():
        layers = score.layers[name]
        fvus = error[rows].sum(0) / spread[rows].sum(0)
        assert [layer.fvu.value for layer in layers] == pytest.approx(list(fvus), rel=1e-4)
        assert [layer.l0.value for layer in layers] == pytest.approx([(a[rows] > 0).sum(1).mean() for a in acts])
        dead = [((a[rows] > 0).sum(0) == 0).mean() for a in acts]
        assert [layer.dead_fraction for layer in layers] == pytest.approx(dead)


def test_batches_change_nothing(llava, coder, score):
    small = evaluate(llava, coder, examples(), batch_prompts=2, max_new_tokens=12)
    for name in ("top1_agreement", "kl", "cross_entropy", "cross_entropy_ablated", "generation_match", "fvu", "l0"):
        assert getattr(small, name).value == pytest.approx(getattr(score, name).value, rel=1e-4), name
    assert (small.n_tokens, small.n_filtered, small.verdict) == (score.n_tokens, score.n_filtered, score.verdict)


def test_the_figures_hang_together(score):
    recovered = (score.cross_entropy_ablated.value - score.cross_entropy.value) / (
        score.cross_entropy_ablated.value - score.cross_entropy_original.value
    )
    assert score.cross_entropy_recovered.value == pytest.approx(recovered, rel=1e-6)
    for name in ("top1_agreement", "top1_agreement_text", "kl", "cross_entropy", "generation_match", "fvu", "l0"):
        figure = getattr(score, name)
        assert figure.low <= figure.value <= figure.high, name
    assert score.n_prompts == 5


def test_the_quick_look_is_the_same_agreement(llava, coder, score):
    batches = [prepare(llava.model, llava.processor, examples()[i : i + 2]) for i in (0, 2, 4)]
    assert agreement(ReplacementModel(llava, coder), batches) == pytest.approx(score.top1_agreement.value)


def test_a_replacement_by_the_mean_recovers_nothing(llava):
    score = evaluate(llava, silent(llava, usable_tokens(llava).y.mean(0)), examples(), max_new_tokens=4)
    assert score.cross_entropy_recovered.value == pytest.approx(0, abs=1e-4)
    assert score.cross_entropy.value == pytest.approx(score.cross_entropy_ablated.value, rel=1e-5)
    assert score.fvu.value == pytest.approx(1, rel=1e-5)
    assert [layer.fvu.value for layer in score.layers["all"]] == pytest.approx([1] * 3, rel=1e-5)
    assert (score.l0.value, score.dead_fraction) == (0, 1)


def test_a_perfect_replacement_scores_perfectly(llama_folder):
    """MLPs that write nothing are replaced perfectly by a transcoder that writes nothing."""
    model = load_model(llama_folder)
    for site in model.sites.layers:
        site.mlp.down_proj.weight.data.zero_()
    score = evaluate(model, silent(model, torch.zeros(3, 32)), text_examples(4), max_new_tokens=12)
    assert score.top1_agreement.value == score.generation_match.value == 1
    assert score.kl.value == 0
    assert score.cross_entropy == score.cross_entropy_original
    assert json.loads(score.to_json())["fvu"]["value"] is None  # there is no variance to explain


def test_a_replacement_that_babbles_is_called_degenerate(llava):
    head = llava.model.lm_head.weight
    token = int(head[5:].norm(dim=1).argmax()) + 5
    write = torch.zeros(3, 32)
    write[2] = 1000 * head[token]
    score = evaluate(llava, silent(llava, write), examples(), max_new_tokens=12)
    word = llava.processor.tokenizer.decode([token])
    assert score.verdict == f"degenerate: 100% of the generated tokens are {word!r}"
    assert score.repetition_rate.value == pytest.approx(8 / 9)
    assert score.degenerate_share.value == 1


def test_a_replacement_that_ends_at_once_is_called_silent(llava):
    write = torch.zeros(3, 32)
    write[2] = 1000 * llava.model.lm_head.weight[llava.processor.tokenizer.eos_token_id]
    score = evaluate(llava, silent(llava, write), examples(), max_new_tokens=4)
    assert score.verdict == "silent: 100% of its answers end at once"


def test_a_replacement_that_does_not_repeat_itself_speaks(llama_folder):
    model = load_model(llama_folder)
    coder = silent(model, torch.zeros(3, 32))
    score = evaluate(model, coder, text_examples(3), max_new_tokens=4)
    assert score.repetition_rate.value == 0
    assert score.verdict == "speaks"


def test_the_filter_keeps_what_the_model_gets_right_hesitantly(llava, coder):
    """Responses made of the model's own most likely tokens are all right; the confident ones are filtered out."""
    prompt = examples()[0]
    batch = prepare(llava.model, llava.processor, [replace(prompt, response=None)])
    best = llava.model(**batch.inputs).logits[0, -1]
    word = llava.processor.tokenizer.decode([int(best.argmax())])
    confident = float(best.softmax(0).max()) >= 0.8
    score = evaluate(llava, coder, [replace(prompt, response=word)], max_new_tokens=1)
    end = prepare(llava.model, llava.processor, [replace(prompt, response=word)])
    second = llava.model(**end.inputs).logits[0, -2].softmax(0)
    second_counts = second.argmax() == end.tokens[0, -1] and second.max() < 0.8
    assert score.n_filtered == (not confident) + int(second_counts)
    assert score.n_tokens == 2


def test_the_record_is_json_without_nan(llama, coder):
    score = evaluate(llama, deepcopy(coder), text_examples(1), max_new_tokens=2)  # one prompt: no intervals

    def refuse(constant):
        raise AssertionError(constant)

    record = json.loads(score.to_json(), parse_constant=refuse)
    assert record.keys() == asdict(score).keys()
    assert record["top1_agreement"]["low"] is None
    assert set(record["layers"]) == {"all", "text"}


def test_evaluation_leaves_the_model_as_it_was(llama, coder):
    batch = prepare(llama.model, llama.processor, text_examples(2))
    logits = llama.model(**batch.inputs).logits
    evaluate(llama, coder, text_examples(2), max_new_tokens=2)
    assert torch.equal(llama.model(**batch.inputs).logits, logits)


def test_layers_without_features_are_reported_as_empty(llama):
    score = evaluate(llama, finished_coder(Wiring.full(3, first_target=1)), text_examples(3), max_new_tokens=2)
    last = score.layers["all"][2]
    assert (last.l0.value, last.dead_fraction) == (0, 0)
    assert np.isfinite([layer.fvu.value for layer in score.layers["all"]]).all()


def test_nothing_to_evaluate_on_and_another_models_transcoder_are_refused(llama, coder):
    with pytest.raises(UserError, match="data set is empty"):
        evaluate(llama, coder, [])
    with pytest.raises(UserError, match="n_layers 4"):
        evaluate(llama, finished_coder(Wiring.full(4)), text_examples(1))
