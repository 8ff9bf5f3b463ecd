"""smollm2: a real text model from a package, or one line on how to get it."""

import importlib.util

import pytest

from crosslayer import Example, UserError, load_model
from crosslayer.replacement.model import generate
from crosslayer.zoo import smollm2

needs_package = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, smollm2.PACKAGES)), reason="pip install 'crosslayer[smollm2]'"
)


@pytest.mark.parametrize("missing", smollm2.PACKAGES)
def test_what_is_missing_is_named(monkeypatch, missing):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == missing else importlib.util.find_spec("os"))
    with pytest.raises(UserError, match=r"smollm2: .* pip install 'crosslayer\[smollm2\]'"):
        load_model("smollm2")


@needs_package
def test_it_knows_the_capital_of_france():
    model = load_model("smollm2")
    assert (model.n_layers, model.d_model, model.proof.self_replacement_gap) == (30, 576, 0)
    asked = [Example("a", "What is the capital of France?")]
    assert generate(model, asked, max_new_tokens=8) == ["The capital of France is Paris."]
