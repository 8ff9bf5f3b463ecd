"""Resolving sites: proved by the table or by search, or refused with what was tried."""

import pytest
import torch

from crosslayer import UserError
from crosslayer.models import resolve
from crosslayer.models.probe import random_inputs
from crosslayer.models.resolve import resolve_sites
from families import family


def refused(model, match: str) -> None:
    with pytest.raises(UserError, match=match):
        resolve_sites(model, "resid", random_inputs(model))


def test_what_a_layer_adds_beside_everything_is_not_overlooked(monkeypatch):
    """A layer that adds a constant: nothing adds up, and the refusal says so."""
    model = family("llama")
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, out: out + 1.0)
    monkeypatch.setattr(resolve, "BLOCKS", {})
    refused(model, r"'llama' \(LlamaForCausalLM\): no place .* Tried 0 patterns .*: no stream .* adds up")


def test_an_mlp_that_sees_other_positions_is_refused():
    model = family("llama")
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, out: out + out.mean(1, keepdim=True))
    refused(model, "model.layers.0.mlp: the write depends on more than the stream")


def test_additions_between_layers_are_refused_unless_the_family_is_known_for_them():
    model = family("llama")
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + torch.ones(16), *args[1:]))
    refused(model, "model.layers.0.mlp: something that this family is not known for is added")


def test_a_layer_that_runs_twice_is_refused():
    model = family("llama")
    model.model.layers[1] = model.model.layers[0]
    refused(model, "its layer ran 2 times in one forward pass")


def test_the_pattern_that_does_not_hold_gives_way_to_the_one_that_does():
    model = family("gpt_neox, sequential")
    sites, _ = resolve_sites(model, "resid", random_inputs(model))
    assert sites.layers[0].adds == ()
