"""Every family that the table knows, tiny and random: proved, read, replaced, trained on, evaluated, generating."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from crosslayer import BatchTopK, Example, LoadedModel, ReplacementModel, TrainConfig, Wiring, evaluate, train, workflow
from crosslayer.activations.capture import ModelSource, capture_all
from crosslayer.models import resolve
from crosslayer.models.hooks import replacing
from crosslayer.models.probe import random_inputs
from crosslayer.models.prompts import prepare
from crosslayer.models.resolve import resolve_sites
from crosslayer.models.sites import find_sites
from crosslayer.replacement.model import generate_tokens
from families import PICTURE, TEXT, VISUAL, FamilyProcessor, family
from making import finished_coder, traces

FAMILIES = [*TEXT, *VISUAL]
NOT_FOUND = {"gemma4_text", "gemma4"}
"""The search knows nothing of third writes."""
PREFIX = {"paligemma", "paligemma, gemma2"}
"""Without a cache, their attention takes what was generated for a part of the prompt, and goes both ways in it."""
FEW = {"tokens": 40, "batch_tokens": 20, "calibration_tokens": 20}
every_family = pytest.mark.parametrize("name", FAMILIES)


def loaded(name: str) -> LoadedModel:
    model = family(name)
    sites, proof = resolve_sites(model, "resid", random_inputs(model))
    return LoadedModel(name, "", model, FamilyProcessor(model), sites, proof)


def examples(model: LoadedModel) -> list[Example]:
    prompts = ("a cat and a", "is there a dog", "a dog or a")
    pictures = PICTURE if model.sees else None
    return [Example(p, p, "a cat .", image=pictures) for p in prompts]


@every_family
def test_sites_are_proved(name):
    model = family(name)
    inputs = random_inputs(model)
    model(**inputs)  # vision towers put hooks of their own on at their first pass
    before = traces(model)
    sites, proof = resolve_sites(model, "resid", inputs)
    assert sites.names == find_sites(model).names
    assert len(proof.residual_gaps) == len(proof.locality_gaps) == 2
    assert max(*proof.residual_gaps, *proof.input_gaps, *proof.locality_gaps, proof.self_replacement_gap) < 1e-5
    assert traces(model) == before


@every_family
def test_families_outside_the_table_are_found_by_search(name, monkeypatch):
    model = family(name)
    if name in NOT_FOUND:
        pytest.skip("refused outside the table")
    inputs = random_inputs(model)
    known, _ = resolve_sites(model, "resid", inputs)
    monkeypatch.setattr(resolve, "BLOCKS", {})
    found, _ = resolve_sites(model, "resid", inputs)
    assert found.names == known.names
    for a, b in zip(found.layers, known.layers, strict=True):
        assert (a.norm, a.mlp, a.write, a.adds) == (b.norm, b.mlp, b.write, b.adds)


@every_family
def test_a_replacement_model_trains_evaluates_and_generates(name, tmp_path, monkeypatch):
    model = loaded(name)
    monkeypatch.setattr(workflow, "ModelSource", partial(ModelSource, chunk_prompts=6))
    data = examples(model)
    config = TrainConfig(wiring=Wiring.full(2), d_transcoder=16, sparsity=BatchTopK(4), **FEW)
    coder = train(model, data, config, tmp_path / "run")
    assert evaluate(model, coder, data[:2], max_new_tokens=3).kl.value > 0
    with ReplacementModel(model, coder).replaced():
        answers = [generate_tokens(model, data, max_new_tokens=4, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*answers) or name in PREFIX


@every_family
def test_the_original_mlps_are_not_computed(name):
    model = loaded(name)
    coder = finished_coder(Wiring.full(2), D=16)
    coder.provenance = replace(coder.provenance, model_id=name)
    batch, replacement = prepare(model.model, model.processor, examples(model)), ReplacementModel(model, coder)
    logits = replacement.logits(batch)
    for site in model.sites.layers:
        for module in {site.mlp, site.write}:
            for parameter in module.parameters():
                parameter.data.fill_(torch.nan)
    assert logits.isfinite().all()
    assert torch.equal(replacement.logits(batch), logits)


@every_family
def test_writes_of_zero_take_the_mlps_out(name):
    """An oracle without hooks on the write: MLPs whose parameters of the write are 0."""
    model = loaded(name)
    batch = prepare(model.model, model.processor, examples(model))
    _, y = capture_all(model, batch)
    with torch.no_grad(), replacing(model.sites, lambda layer: torch.zeros_like(y[:, :, layer])):
        logits = model.model(**batch.inputs, use_cache=False).logits
    for site in model.sites.layers:
        site.write.register_forward_hook(lambda _, args, out: _zero(out))
    torch.testing.assert_close(model.model(**batch.inputs, use_cache=False).logits, logits)


def _zero(output):
    return output * 0 if isinstance(output, torch.Tensor) else (output[0] * 0, *output[1:])
