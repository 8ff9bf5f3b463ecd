"""Probes without a processor: ordinary words, and pixels that fill the image tokens exactly."""

import pytest
import torch

from crosslayer import UserError
from crosslayer.models.probe import PIXELS, n_image_tokens, probe, random_inputs
from families import IMAGE, SPECIAL, VISUAL, family


def test_random_words_are_ordinary_and_always_the_same():
    model = family("llama")
    inputs = random_inputs(model)
    assert inputs.keys() == {"input_ids"}
    assert not set(inputs["input_ids"].flatten().tolist()) & {*SPECIAL.values()}
    assert torch.equal(inputs["input_ids"], random_inputs(model)["input_ids"])


@pytest.mark.parametrize("name", VISUAL)
def test_image_tokens_are_as_many_as_features(name):
    model = family(name)
    inputs = random_inputs(model)
    pixels = PIXELS[name.split(",")[0]](model.config)
    assert (inputs["input_ids"] == IMAGE).sum() == n_image_tokens(model, pixels) > 0
    assert pixels.keys() < inputs.keys()


def test_every_family_with_pixels_is_tested():
    assert {name.split(",")[0] for name in VISUAL} == set(PIXELS)


def test_a_family_whose_pixels_are_unknown_gets_words(monkeypatch):
    monkeypatch.delitem(PIXELS, "llava")
    assert random_inputs(family("llava")).keys() == {"input_ids"}


def test_a_model_that_does_not_run_on_random_inputs_asks_for_its_processor(monkeypatch):
    monkeypatch.delitem(PIXELS, "blip-2")  # which cannot do without pixels
    with pytest.raises(UserError, match="'blip-2' came without .* put the processor's files beside .*pixel_values"):
        probe(family("blip-2"), None, True)


def test_with_a_processor_the_probe_is_a_real_prompt(llava):
    inputs = probe(llava.model, llava.processor, True)
    assert (inputs["input_ids"] == llava.model.config.image_token_id).sum() == 9
    assert inputs["pixel_values"].shape[:2] == (1, 3)
