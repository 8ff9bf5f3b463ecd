"""The search: candidates that add up, the simplest first, and nothing that the proof would not look at."""

import pytest

from crosslayer.models.probe import random_inputs
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


def test_searching_leaves_nothing_on_the_model():
    model = family("gpt2")
    before = traces(model)
    assert list(search(model, random_inputs(model)))
    assert traces(model) == before
