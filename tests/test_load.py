"""Loading models: what comes with one, and what is refused."""

import json
from copy import deepcopy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, T5Config

from crosslayer import Example, ReplacementModel, UserError, Wiring, load_model
from crosslayer.files import read_tensors, write_tensors
from crosslayer.models import load
from crosslayer.models.probe import PIXELS
from crosslayer.models.prompts import prepare
from making import finished_coder


def test_a_folder_is_loaded_frozen_with_its_sites(llava_folder):
    model = load_model(llava_folder, read="mlp_in")
    assert (model.id, model.revision, model.n_layers, model.d_model) == (str(llava_folder), "", 3, 32)
    assert model.sites.read == "mlp_in"
    assert not model.model.training
    assert not any(p.requires_grad for p in model.model.parameters())
    assert hasattr(model.processor, "image_processor")


def test_the_body_is_the_model_without_its_head(llama):
    assert llama.body is llama.model.model
    assert llama.device == torch.device("cpu")
    assert not hasattr(llama.processor, "image_processor")


def test_a_folder_without_configuration_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: holds no config.json, so it is no Hugging Face model"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/model", "./models/clip", "~/llava", "a/b/c"])
def test_a_folder_that_does_not_exist_is_named(name):
    with pytest.raises(UserError, match=f"{name}: no such model folder; bundled names are emoji-llava"):
        load_model(name)


@pytest.mark.parametrize("name", ["emoji-lava", "nobody/no-such-model"])
def test_a_hub_id_that_cannot_be_had_is_named(name):
    with pytest.raises(UserError, match=rf"^{name}: no such model, .* bundled name \(emoji-llava, smollm2\)") as raised:
        load_model(name)
    assert "\n" not in str(raised.value)


def test_an_unknown_model_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "zork"}))
    with pytest.raises(UserError, match="cannot be loaded.*zork"):
        load_model(tmp_path)


def test_a_model_that_norms_its_stream_is_refused_with_what_was_tried(tmp_path):
    """As facebook/opt-350m does."""
    size = {"vocab_size": 16, "hidden_size": 8, "ffn_dim": 8, "word_embed_proj_dim": 8, "num_attention_heads": 2}
    config = OPTConfig(**size, num_hidden_layers=2, do_layer_norm_before=False, pad_token_id=0)
    OPTForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'opt' \(OPTForCausalLM\): no place where .* Tried 1 patterns .*fc2: "):
        load_model(tmp_path)


def test_an_encoder_decoder_model_is_refused_by_name(tmp_path):
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: t5 is an encoder-decoder model"):
        load_model(tmp_path)


def test_damaged_weights_are_named(tmp_path, llama):
    llama.model.save_pretrained(tmp_path)
    llama.processor.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match=f"{tmp_path}: no such model, or it cannot be loaded"):
        load_model(tmp_path)


def test_weights_of_another_shape_are_named(tmp_path, llama):
    llama.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 56}))
    with pytest.raises(
        UserError, match=r"model.layers.0.mlp.down_proj.weight is \[32, \d+\] on disk, \[32, 56\] by config"
    ):
        load_model(tmp_path)


def test_weights_that_are_not_used_are_noted(tmp_path, llama):
    llama.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    assert (
        "9 tensors on disk have no place in the model, the first: model.layers.2.input"
        in load_model(tmp_path).sites.notes[-1]
    )


def test_code_that_comes_with_a_model_is_not_run_unasked(tmp_path, llama):
    llama.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    mapped = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": mapped}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match=f"{tmp_path}: comes with model code of its own, .* --trust-remote-code"):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_missing_weights_are_named(tmp_path, llama):
    llama.model.save_pretrained(tmp_path)
    llama.processor.save_pretrained(tmp_path)
    tensors, metadata = read_tensors(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_tensors(tmp_path / "model.safetensors", tensors, metadata)
    with pytest.raises(UserError, match=r"lacks the weights model.layers.1.mlp.up_proj.weight, which would be random"):
        load_model(tmp_path)


def test_tied_weights_are_not_missing(tmp_path, llama):
    config = LlamaConfig(**{**llama.model.config.to_dict(), "tie_word_embeddings": True})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    llama.processor.save_pretrained(tmp_path)
    assert load_model(tmp_path).n_layers == 3


def test_configuration_and_weights_are_enough_to_inspect(tmp_path, llama):
    llama.model.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.processor is None
    assert max(model.proof.residual_gaps) < 1e-5
    with pytest.raises(UserError, match="LlamaForCausalLM came without a tokenizer; add its files"):
        prepare(model.model, model.processor, [Example("a", "a cat")])


def test_a_vision_model_proved_on_text_alone_says_so(tmp_path, llava, monkeypatch):
    llava.model.save_pretrained(tmp_path)
    assert load_model(tmp_path).sites.notes == ()
    monkeypatch.delitem(PIXELS, "llava")
    assert load_model(tmp_path).sites.notes == ("proved on text alone: it came without a processor",)


def test_a_broken_tokenizer_is_named(tmp_path, llama):
    llama.model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded.* AutoTokenizer said"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "found"), [("auto", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_weights_come_in_the_dtype_asked_for(llama_folder, dtype, found):
    model = load_model(llama_folder, dtype=dtype)
    assert model.model.dtype == found
    assert model.proof.self_replacement_gap == 0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"dtype": "fp8"}, "dtype is 'fp8'; choose one of auto, fp32, bf16, fp16"),
        ({"load_in": "2bit"}, "load-in is '2bit'; choose one of 4bit, 8bit"),
        ({"device": "cuda:99"}, "device is 'cuda:99', which is not there"),
        ({"device": "gpu"}, "device is 'gpu', which is not there"),
        ({"device": "cpu", "device_map": "auto"}, "device cpu and device-map auto are both given"),
    ],
)
def test_settings_that_cannot_work_are_named(llama_folder, settings, named):
    with pytest.raises(UserError, match=named):
        load_model(llama_folder, **settings)


@pytest.mark.parametrize(
    ("there", "settings", "named"),
    [
        ([], {"load_in": "4bit"}, r"needs bitsandbytes; pip install 'crosslayer\[bitsandbytes\]'"),
        (["bitsandbytes"], {"load_in": "8bit"}, "load-in 8bit needs a CUDA GPU, and torch sees none"),
        ([], {"device_map": "auto"}, r"needs accelerate; pip install 'crosslayer\[accelerate\]'"),
    ],
)
def test_what_is_missing_is_named(llama_folder, monkeypatch, there, settings, named):
    monkeypatch.setattr(load, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=named):
        load_model(llama_folder, **settings)


def test_layers_are_spread_by_accelerate(llama_folder, llama):
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "lm_head"), "cpu")
    model = load_model(llama_folder, device_map={**places, "model.rotary_emb": "cpu", "model.layers.1": "disk"})
    assert next(model.sites.layers[1].mlp.parameters()).is_meta  # fetched when its layer runs
    prompts = [Example("a", "a cat and")]
    coder = finished_coder(Wiring.full(3))
    answers = [ReplacementModel(m, deepcopy(coder)).generate_batch(prompts, max_new_tokens=5) for m in (model, llama)]
    assert answers[0] == answers[1]


def test_a_configuration_alone_gives_a_sketch(tmp_path, llama):
    llama.model.config.save_pretrained(tmp_path)
    assert not load.has_weights(tmp_path)
    sketch = load.sketch_model(tmp_path)
    assert (sketch.n_layers, sketch.d_model, sketch.proof, sketch.processor) == (3, 32, None, None)
    assert all(parameter.is_meta for parameter in sketch.model.parameters())
    assert sketch.device.type in ("cpu", "cuda")
