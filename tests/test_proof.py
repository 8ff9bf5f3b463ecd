"""The proof of a model's sites: it passes where it should, and fails naming the layer where it should not."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from crosslayer import UserError
from crosslayer.models.prompts import prepare
from crosslayer.models.proof import prove_sites
from crosslayer.models.sites import find_sites
from making import text_examples, traces


@pytest.fixture
def model(llama):
    return deepcopy(llama.model)


@pytest.fixture
def inputs(llama):
    return prepare(llama.model, llama.processor, text_examples(3)).inputs


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_a_stock_model_passes(kind, request):
    proof = request.getfixturevalue(kind).proof
    assert len(proof.residual_gaps) == 3
    assert max(proof.residual_gaps) < 1e-5
    assert proof.self_replacement_gap < 1e-5


def test_the_choice_of_read_changes_nothing(llama, inputs):
    proofs = [prove_sites(llama.model, find_sites(llama.model, read), inputs)[1] for read in ("resid", "mlp_in")]
    assert proofs[0] == proofs[1]


def test_a_layer_that_adds_something_else_is_named(model, inputs):
    layer, forward = model.model.layers[1], model.model.layers[1].forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 1.01
    with pytest.raises(UserError, match=r"^model.layers.1.mlp: stream read \+ MLP write differs .* by 0.0099"):
        prove_sites(model, find_sites(model), inputs)


def test_a_norm_that_does_not_read_the_stream_of_its_mlp_is_named(model, inputs):
    sites = find_sites(model)
    wrong = [replace(site, norm=site.layer.input_layernorm) for site in sites.layers]
    with pytest.raises(UserError, match="model.layers.0.mlp"):
        prove_sites(model, replace(sites, layers=tuple(wrong)), inputs)


def test_a_massive_activation_hides_nothing(model, inputs):
    """A small addition at all positions, beside one token whose stream is a million times as large."""
    model.model.embed_tokens.weight.data[inputs["input_ids"][0, 0]] *= 1e6
    layer, forward = model.model.layers[1], model.model.layers[1].forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs) + 0.01
    with pytest.raises(UserError, match="^model.layers.1.mlp"):
        prove_sites(model, find_sites(model), inputs)


def test_an_mlp_used_in_another_way_too_is_refused(model, inputs):
    """The logits depend on what happens inside the MLP: only the second check can see it."""
    inside = [0.0]
    model.register_forward_pre_hook(lambda _, args: inside.append(0.0))
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda _, args, out: inside.append(out.mean()))
    model.lm_head.register_forward_hook(lambda _, args, out: out + inside[-1])
    with pytest.raises(UserError, match="writing each MLP's own output back changes the logits"):
        prove_sites(model, find_sites(model), inputs)


def test_a_model_of_nans_is_refused(model, inputs):
    model.model.layers[1].mlp.down_proj.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="model.layers.1.mlp"):
        prove_sites(model, find_sites(model), inputs)


def test_nothing_is_left_on_the_model(model, inputs):
    before = traces(model)
    prove_sites(model, find_sites(model), inputs)
    assert traces(model) == before
