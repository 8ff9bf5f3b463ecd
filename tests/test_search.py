"""The search: candidates that add up, the simplest first, and nothing that the proof would not look at."""

from copy import deepcopy

import pytest
import torch

from crosslayer import UserError
from crosslayer.models import resolve
from crosslayer.models.probe import random_inputs
from crosslayer.models.resolve import resolve_sites
from crosslayer.models.search import search
from crosslayer.models.sites_table import BLOCKS, Block
from families import family
from making import traces


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "olmo2", "granite", "bloom", "opt", "phi"])
def test_the_simplest_candidate_is_the_row_of_the_table(name):
    model = family(name)
    path, block = next(search(model, random_inputs(model)))
    assert block == BLOCKS[name][0]
    assert model.get_submodule(path)


def test_the_language_model_is_looked_at_before_the_vision_tower():
    model = family("llava, deep vision")
    paths = [path for path, _ in search(model, random_inputs(model))]
    assert paths[0] == "model.language_model.layers"


def test_attention_beside_an_mlp_is_not_taken_for_the_mlp():
    model = family("phi")
    found = [block for _, block in search(model, random_inputs(model))]
    assert Block("input_layernorm", adds=("self_attn",)) in found
    assert not [block for block in found if "attn" in (block.write or block.mlp)]


def test_what_a_layer_adds_beside_everything_is_not_overlooked(monkeypatch):
    """A layer that adds a constant: nothing adds up, and the refusal says so."""
    model = deepcopy(family("llama"))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, out: out + 1.0)
    monkeypatch.setattr(resolve, "BLOCKS", {})
    with pytest.raises(UserError, match=r"'llama' \(LlamaForCausalLM\): no place .* Tried 0 patterns"):
        resolve_sites(model, "resid", random_inputs(model))


def test_an_mlp_that_sees_other_positions_is_refused():
    model = family("llama")
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, out: out + out.mean(1, keepdim=True))
    with pytest.raises(UserError, match="model.layers.0.mlp: the write depends on more than the stream"):
        resolve_sites(model, "resid", random_inputs(model))


def test_additions_between_layers_are_refused_unless_the_family_is_known_for_them():
    model = family("llama")
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + torch.ones(16), *args[1:]))
    with pytest.raises(UserError, match="model.layers.0.mlp: something that this family is not known for is added"):
        resolve_sites(model, "resid", random_inputs(model))


def test_a_layer_that_runs_twice_is_refused():
    model = family("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(UserError, match="its layer ran 2 times in one forward pass"):
        resolve_sites(model, "resid", random_inputs(model))


def test_searching_leaves_nothing_on_the_model():
    model = family("gpt2")
    before = traces(model)
    assert list(search(model, random_inputs(model)))
    assert traces(model) == before
