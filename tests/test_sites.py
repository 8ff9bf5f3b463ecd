"""Sites: found by the table, refused by name when they are not there."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GPT2Config, GPT2LMHeadModel

from crosslayer import UserError
from crosslayer.models.proof import prove_sites
from crosslayer.models.sites import find_sites
from crosslayer.models.sites_table import FAMILIES


def test_sites_are_the_models_own_modules(llama):
    sites, layers = find_sites(llama.model), llama.model.model.layers
    assert sites.names == tuple(f"model.layers.{i}.mlp" for i in range(3))
    assert all(site.layer is layer for site, layer in zip(sites.layers, layers, strict=True))
    assert all(site.mlp is site.layer.mlp for site in sites.layers)
    assert all(site.norm is site.layer.post_attention_layernorm for site in sites.layers)
    assert (sites.d_model, sites.read) == (32, "resid")


def test_sites_of_a_llava_are_those_of_its_language_model(llava):
    sites = find_sites(llava.model, "mlp_in")
    assert sites.names[0] == "model.language_model.layers.0.mlp"
    assert [site.layer for site in sites.layers] == list(llava.model.model.language_model.layers)
    assert (sites.d_model, sites.read) == (32, "mlp_in")


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_row_of_the_table_is_proved_on_a_stock_model(kind):
    small = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 40,
        "pad_token_id": 0,
    }
    sees = "text_config" in AutoConfig.for_model(kind).to_dict()
    towers = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    settings = {
        "text_config": {"model_type": "llama", **small},
        "vision_config": {"model_type": "clip_vision_model", **towers},
    }
    config = AutoConfig.for_model(kind, **(settings if sees else small))
    model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_config(config).eval()
    sites = find_sites(model)
    proof = prove_sites(model, sites, {"input_ids": torch.arange(1, 9)[None]})
    assert len(proof.residual_gaps) == 2
    assert max(*proof.residual_gaps, proof.self_replacement_gap) < 1e-5


def test_an_unknown_family_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10))
    with pytest.raises(UserError, match=r"'gpt2' \(GPT2LMHeadModel\) is not supported yet; supported: gemma, llama"):
        find_sites(model)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("model.layers.1.mlp", "LlamaDecoderLayer has no module 'mlp'.* it has self_attn, input_layernorm"),
        ("model.layers.2.post_attention_layernorm", "no module 'post_attention_layernorm'"),
        ("model.layers", "LlamaForCausalLM has no module 'model.layers'"),
    ],
)
def test_a_missing_module_is_named(llama, path, named):
    model = deepcopy(llama.model)
    parent, name = path.rsplit(".", 1)
    delattr(model.get_submodule(parent), name)
    with pytest.raises(UserError, match=named):
        find_sites(model)


def test_an_unknown_read_is_named(llama):
    with pytest.raises(UserError, match="read is 'mlp_out'; choose one of resid, mlp_in"):
        find_sites(llama.model, "mlp_out")
