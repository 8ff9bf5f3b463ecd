"""Loading models: what comes with one, and what is refused."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from crosslayer import UserError, load_model
from crosslayer.files import read_tensors, write_tensors


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
    with pytest.raises(UserError, match=rf"^{name}: no such model, .* bundled name \(emoji-llava\)") as raised:
        load_model(name)
    assert "\n" not in str(raised.value)


def test_an_unknown_model_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "zork"}))
    with pytest.raises(UserError, match="cannot be loaded.*zork"):
        load_model(tmp_path)


def test_a_family_that_is_not_in_the_table_is_refused(tmp_path, llama_folder, llama):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=70)).save_pretrained(tmp_path)
    llama.processor.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'gpt2'.* not supported yet"):
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
    with pytest.raises(UserError, match="cannot be loaded.* AutoModelForCausalLM said: .*mismatch"):
        load_model(tmp_path)


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


def test_a_model_without_its_tokenizer_is_named(tmp_path, llama):
    llama.model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded.* AutoTokenizer said"):
        load_model(tmp_path)
