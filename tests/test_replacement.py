"""The replacement model: writes from its own stream, original MLPs unused, caches and padding harmless, no traces."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import DynamicCache

from crosslayer import Example, LoadedModel, ReplacementModel, UserError, Wiring, load_model
from crosslayer.models.hooks import recording, replacing
from crosslayer.models.prompts import prepare
from crosslayer.models.sites import find_sites
from crosslayer.replacement.model import generate_tokens
from making import array, dense_acts, dense_writes, finished_coder, random_coder, text_examples, traces

WIRINGS = [Wiring.full(3), Wiring(3, 2), Wiring.per_layer(3), Wiring.full(3, first_target=1)]


@pytest.fixture
def double(llama_folder) -> LoadedModel:
    """The tiny Llama in float64, to be spoiled at will."""
    model = load_model(llama_folder)
    model.model.double()
    return model


def batch_of(model, examples=None):
    return prepare(model.model, model.processor, text_examples(4) if examples is None else examples)


def pictured() -> list[Example]:
    shades = [Image.new("RGB", (96, 96), (shade, 60, 255 - shade)) for shade in (10, 120, 240)]
    prompts = ("describe the picture .", "is there a dog ?", "a cat and")
    return [Example(p, p, image=shade) for p, shade in zip(prompts, shades, strict=True)] + text_examples(2)


def by_hand(model: LoadedModel, coder, tokens: torch.Tensor, read: str) -> torch.Tensor:
    """Logits of one prompt [P, V], layer by layer, with dense features of the replaced stream."""
    llama = model.model.model
    stream = llama.embed_tokens(tokens[None])
    turn = llama.rotary_emb(stream, torch.arange(len(tokens))[None])
    x = torch.zeros(len(tokens), 3, model.d_model, dtype=stream.dtype)
    for index, layer in enumerate(llama.layers):
        stream = stream + layer.self_attn(layer.input_layernorm(stream), turn, None)[0]
        x[:, index] = (stream if read == "resid" else layer.post_attention_layernorm(stream))[0]
        write = torch.from_numpy(dense_writes(coder, dense_acts(coder, array(x))))[:, index]
        write[0] = coder.first_write[index]
        stream = stream + write
    return model.model.lm_head(llama.norm(stream))[0]


@pytest.mark.parametrize("read", ["resid", "mlp_in"])
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_logits_are_those_of_a_loop_by_hand(double, wiring, read):
    model = replace(double, sites=find_sites(double.model, read))
    coder = finished_coder(wiring, read=read).double()
    batch = batch_of(model)
    logits = ReplacementModel(model, coder).logits(batch)
    for row, tokens, real in zip(logits, batch.tokens, batch.attention, strict=True):
        torch.testing.assert_close(row[real], by_hand(model, coder, tokens[real], read), atol=1e-5, rtol=1e-5)


def test_writing_every_mlps_own_output_changes_nothing(llava):
    batch, writes = batch_of(llava, pictured()), {}
    with torch.no_grad(), recording(llava.sites, lambda *_: None, writes.__setitem__):
        logits = llava.model(**batch.inputs).logits
    with torch.no_grad(), replacing(llava.sites, writes.__getitem__):
        assert torch.equal(llava.model(**batch.inputs).logits, logits)


def test_a_transcoder_that_writes_constants_is_a_model_whose_mlps_do(double):
    """An oracle without our hooks: MLPs whose last projection is nothing but a bias."""
    coder = finished_coder(Wiring.full(3)).double()
    for W in coder.W_dec:
        W.data.zero_()
    coder.first_write.copy_(coder.b_dec)
    batch = batch_of(double)
    logits = ReplacementModel(double, coder).logits(batch)
    for bias, site in zip(coder.b_dec, double.sites.layers, strict=True):
        site.mlp.down_proj.weight.data.zero_()
        site.mlp.down_proj.bias = torch.nn.Parameter(bias.clone())
    torch.testing.assert_close(double.model(**batch.inputs).logits, logits)


def test_mlps_that_do_nothing_are_replaced_perfectly(double):
    for site in double.sites.layers:
        site.mlp.down_proj.weight.data.zero_()
    coder = finished_coder(Wiring.full(3))
    for tensor in (*coder.W_dec, coder.b_dec, coder.first_write):
        tensor.data.zero_()
    batch = batch_of(double)
    assert torch.equal(ReplacementModel(double, coder).logits(batch), double.model(**batch.inputs).logits)


def test_the_original_mlps_are_not_computed(double):
    replacement, batch = ReplacementModel(double, finished_coder(Wiring.full(3))), batch_of(double)
    logits = replacement.logits(batch)
    for site in double.sites.layers:
        for parameter in site.mlp.parameters():
            parameter.data.fill_(torch.nan)
    assert torch.equal(replacement.logits(batch), logits)
    assert logits.isfinite().all()
    assert double.model(**batch.inputs).logits.isnan().any()


@pytest.mark.parametrize("kind", ["llama", "llava"])
@pytest.mark.parametrize(
    ("settings", "cached"),
    [
        ({}, {}),
        ({"num_beams": 3}, {}),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20, "num_return_sequences": 2}, {}),
        ({}, {"cache_implementation": "static"}),
    ],
    ids=["greedy", "beams", "sampling", "static cache"],
)
def test_cached_generation_is_uncached_generation(kind, settings, cached, request):
    model = request.getfixturevalue(kind)
    examples = pictured() if kind == "llava" else text_examples(4)
    generated = []
    with ReplacementModel(model, finished_coder(Wiring.full(3))).replaced():
        for cache in ({"use_cache": False}, {"use_cache": True, **cached}):
            torch.manual_seed(0)
            generated.append(generate_tokens(model, examples, max_new_tokens=12, min_new_tokens=6, **settings, **cache))
    assert torch.equal(*generated)
    assert len(generated[0].unique()) > 3


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_batched_generation_is_generation_one_at_a_time(kind, request):
    model = request.getfixturevalue(kind)
    examples = pictured() if kind == "llava" else text_examples(4)
    with ReplacementModel(model, finished_coder(Wiring.full(3))).replaced():
        together = generate_tokens(model, examples, max_new_tokens=12)
        for row, example in zip(together, examples, strict=True):
            alone = generate_tokens(model, [example], max_new_tokens=12)[0]
            assert torch.equal(row[: len(alone)], alone)
            assert (row[len(alone) :] == model.model.generation_config.pad_token_id).all()


def test_generation_sees_the_logits_of_one_pass_over_all_of_it(llama):
    replacement, batch = ReplacementModel(llama, finished_coder(Wiring.full(3))), batch_of(llama)
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    with replacement.replaced():
        out = llama.model.generate(**batch.inputs, **settings, output_logits=True, return_dict_in_generate=True)
    mask = torch.cat([batch.attention, torch.ones(4, 6, dtype=torch.bool)], 1)
    whole = replacement.logits(replace(batch, inputs={"input_ids": out.sequences, "attention_mask": mask.long()}))
    found = torch.stack(out.logits, 1)
    torch.testing.assert_close(found, whole[:, -7:-1], atol=1e-4, rtol=1e-4)
    assert torch.equal(found.argmax(2), out.sequences[:, -6:])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("cut", [1, 3])
def test_a_prompt_in_pieces_through_the_cache_is_the_prompt_at_once(llama, cut, masked):
    replacement, batch = ReplacementModel(llama, finished_coder(Wiring.full(3))), batch_of(llama, text_examples(1))
    mask = batch.attention.long() if masked else None
    cache = DynamicCache(config=llama.model.config)
    with torch.no_grad(), replacement.replaced():
        whole = llama.model(batch.tokens, attention_mask=mask).logits
        llama.model(
            batch.tokens[:, :cut], attention_mask=None if mask is None else mask[:, :cut], past_key_values=cache
        )
        rest = llama.model(batch.tokens[:, cut:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, cut:], atol=1e-4, rtol=1e-4)


def test_text_comes_out(llava):
    replacement, examples = ReplacementModel(llava, finished_coder(Wiring.full(3))), pictured()
    texts = replacement.generate_batch(examples, max_new_tokens=5)
    assert replacement.generate(examples[0].prompt, examples[0].picture(), max_new_tokens=5) == texts[0]
    with replacement.replaced():
        tokens = generate_tokens(llava, examples, max_new_tokens=5)
    assert texts == [t.strip() for t in llava.processor.batch_decode(tokens, skip_special_tokens=True)]


def test_responses_are_not_shown_to_the_generating_model(llama):
    told = [replace(example, response="a tiger") for example in text_examples(2)]
    assert torch.equal(generate_tokens(llama, told), generate_tokens(llama, text_examples(2)))


def test_nothing_is_left_after_use_or_an_exception(llama):
    batch, before = batch_of(llama), traces(llama.model)
    logits = llama.model(**batch.inputs).logits
    replacement = ReplacementModel(llama, finished_coder(Wiring.full(3)))
    assert not torch.allclose(replacement.logits(batch), logits)
    replacement.generate("a cat", max_new_tokens=3)
    with pytest.raises(RuntimeError, match="inside"), replacement.replaced():
        raise RuntimeError("inside")
    assert traces(llama.model) == before
    assert torch.equal(llama.model(**batch.inputs).logits, logits)


def test_a_transcoder_that_fails_in_the_middle_of_a_pass_leaves_nothing(llama):
    coder = random_coder(Wiring.full(3), D=32)  # joint TopK, not calibrated
    batch, before = batch_of(llama), traces(llama.model)
    with pytest.raises(UserError, match="calibrate"):
        ReplacementModel(llama, coder).logits(batch)
    assert traces(llama.model) == before


def test_half_precision_models_are_replaced_too(llama, llama_folder):
    half = load_model(llama_folder)
    half.model.bfloat16()
    batch, coder = batch_of(llama), finished_coder(Wiring.full(3))
    exact = ReplacementModel(llama, deepcopy(coder)).logits(batch)[batch.attention]
    rough = ReplacementModel(half, deepcopy(coder)).logits(batch)[batch.attention]
    assert rough.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(exact, rough.float(), dim=-1).min() > 0.9


@pytest.mark.parametrize(
    ("coder", "named"),
    [
        (finished_coder(Wiring.full(4)), "the transcoder has n_layers 4, the model .* has 3"),
        (finished_coder(Wiring.full(3), D=16), "the transcoder has d_model 16, the model .* has 32"),
        (finished_coder(Wiring.full(3), read="mlp_in"), "read mlp_in, .* has resid; .* was trained on tiny"),
    ],
)
def test_a_transcoder_of_another_model_is_refused(llama, coder, named):
    with pytest.raises(UserError, match=named):
        ReplacementModel(llama, coder)


def test_a_picture_may_be_given_by_its_path(llava, tmp_path):
    picture, path = Image.new("RGB", (96, 96), "red"), tmp_path / "red.png"
    picture.save(path)
    model = ReplacementModel(llava, finished_coder(Wiring.full(3)))
    assert model.generate("a cat", image=str(path)) == model.generate("a cat", image=picture)
    assert model.generate("a cat", image=path) == model.generate("a cat", image=picture)
