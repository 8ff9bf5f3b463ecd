"""Sites: found by the table, refused by name when they are not there."""

from copy import deepcopy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    MambaConfig,
    MambaForCausalLM,
)

from crosslayer import UserError
from crosslayer.models.sites import check_family, find_sites, table_sites
from crosslayer.models.sites_table import BLOCKS
from families import SMALL, TEXT, VISION, VISUAL, family


def test_sites_are_the_models_own_modules(llama):
    sites, layers = find_sites(llama.model), llama.model.model.layers
    assert sites.names == tuple(f"model.layers.{i}.mlp" for i in range(3))
    assert all(site.layer is layer for site, layer in zip(sites.layers, layers, strict=True))
    assert all(site.mlp is site.write is site.layer.mlp for site in sites.layers)
    assert all(site.norm is site.reader is site.layer.post_attention_layernorm for site in sites.layers)
    assert (sites.d_model, sites.read) == (32, "resid")


def test_sites_of_a_llava_are_those_of_its_language_model(llava):
    sites = find_sites(llava.model, "mlp_in")
    assert sites.names[0] == "model.language_model.layers.0.mlp"
    assert [site.layer for site in sites.layers] == list(llava.model.model.language_model.layers)
    assert (sites.d_model, sites.read) == (32, "mlp_in")


def test_a_family_with_several_patterns_gives_all_that_fit():
    names = [sites.layers[0].adds for sites in table_sites(family("gpt_neox"))]
    assert [len(adds) for adds in names] == [1, 0]
    assert len(table_sites(family("falcon"))) == 1


def test_the_table_has_no_row_that_no_test_builds():
    models = [family(name) for name in (*TEXT, *VISUAL)]
    assert {model.config.get_text_config().model_type for model in models} == set(BLOCKS)
    assert len({name.split(",")[0] for name in TEXT}) >= 20
    assert len({name.split(",")[0] for name in VISUAL}) >= 12


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("jamba", "Mamba in layers 0: attention patterns cannot be frozen there"),
        ("jamba", "MoE in layers 1: router and experts are replaced as one"),
        ("qwen3_next", "linear attention in layers 0: attention patterns cannot be frozen there"),
        ("lfm2", "short convolution in layers 0: attention patterns cannot be frozen there"),
        ("phi", "parallel attention: a layer's features cannot see the same layer's attention"),
        ("olmo2", "post-norm: MLPs read the raw stream, so resid and mlp_in are the same"),
        ("granite", "scaled write: the MLP's output counts residual_multiplier times"),
        ("gemma4", "third write: a layer's own embedding of the token is added after the MLP"),
        ("qwen3_vl", "DeepStack: visual features are added to the stream after early layers"),
        ("gemma3", "attention goes both ways inside an image"),
    ],
)
def test_what_is_unusual_is_noted(name, note):
    assert [found for found in find_sites(family(name)).notes if found.startswith(note)]


def test_nothing_is_noted_of_a_plain_family(llama):
    assert find_sites(llama.model).notes == ()


def test_mllama_is_refused_by_name():
    text = {**SMALL, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision = {**VISION, "num_global_layers": 1, "max_num_tiles": 4, "intermediate_layers_indices": [0]}
    config = AutoConfig.for_model("mllama", text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(UserError, match="'mllama' .* is not supported: its cross-attention layers gate"):
        check_family(model, "resid")


def test_gemma3n_is_refused_by_name_without_its_towers_too():
    config = AutoConfig.for_model(
        "gemma3n_text", **{**SMALL, "intermediate_size": [8, 8], "num_hidden_layers": 2, "num_kv_shared_layers": 0}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="'gemma3n_text' .* is not supported: AltUp"):
        check_family(model, "resid")


def test_a_family_outside_the_table_is_named():
    model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=2))
    with pytest.raises(UserError, match="'mamba' .* is not in the table"):
        find_sites(model)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("model.layers.1.mlp", "LlamaDecoderLayer has no module 'mlp'.* it has self_attn, input_layernorm"),
        ("model.layers.2.post_attention_layernorm", "no module 'post_attention_layernorm'"),
        ("model.layers", "LlamaForCausalLM has no list of decoder layers"),
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
