"""Hooks: what they see and change while they are on, and that nothing is left of them."""

from contextlib import contextmanager

import pytest
import torch

from crosslayer.models.hooks import before_forward, feeding, reading, recording, replacing
from crosslayer.models.probe import random_inputs
from crosslayer.models.prompts import prepare
from crosslayer.models.resolve import resolve_sites
from crosslayer.models.sites import find_sites
from families import family
from making import text_examples, traces


@pytest.fixture
def inputs(llama):
    return prepare(llama.model, llama.processor, text_examples(3)).inputs


@contextmanager
def everything_on(llama):
    """Each of the context managers at once, with writes that change the logits."""
    shape = None

    def note(layer, x):
        nonlocal shape
        shape = x.shape

    with (
        recording(llama.sites, note, lambda layer, y: None),
        before_forward(llama.model, lambda kwargs: None),
        replacing(llama.sites, lambda layer: torch.ones(shape)),
    ):
        yield


def test_nothing_is_left_after_use(llama, inputs):
    before, logits = traces(llama.model), llama.model(**inputs).logits
    with everything_on(llama):
        changed = llama.model(**inputs).logits
        assert traces(llama.model) != before
    assert not torch.allclose(changed, logits)
    assert traces(llama.model) == before
    assert torch.equal(llama.model(**inputs).logits, logits)


def test_nothing_is_left_after_an_exception(llama, inputs):
    before, logits = traces(llama.model), llama.model(**inputs).logits

    def fail(layer):
        raise RuntimeError(f"layer {layer}")

    with pytest.raises(RuntimeError, match="layer 0"), everything_on(llama), replacing(llama.sites, fail):
        llama.model(**inputs)
    assert traces(llama.model) == before
    assert torch.equal(llama.model(**inputs).logits, logits)


def test_a_forward_that_was_shadowed_before_is_put_back(llama, inputs):
    mlp = llama.sites.layers[1].mlp
    shadow = mlp.forward = type(mlp).forward.__get__(mlp)
    try:
        with replacing(llama.sites, lambda layer: torch.zeros(1)):
            assert mlp.forward is not shadow
        assert vars(mlp)["forward"] is shadow
    finally:
        del mlp.forward


def test_resid_is_the_stream_and_mlp_in_the_norm_of_it(llama, inputs):
    stream, normed = {}, {}
    with reading(find_sites(llama.model, "resid"), stream.__setitem__):
        states = llama.model(**inputs, output_hidden_states=True).hidden_states
    with reading(find_sites(llama.model, "mlp_in"), normed.__setitem__):
        llama.model(**inputs)
    assert list(stream) == list(normed) == [0, 1, 2]
    for layer, site in enumerate(llama.sites.layers):
        assert torch.equal(site.norm(stream[layer]), normed[layer])
    after_layer_0 = stream[0] + llama.sites.layers[0].mlp(normed[0])
    torch.testing.assert_close(after_layer_0, states[1])


def test_recorded_writes_are_the_outputs_of_the_mlps(llama, inputs):
    normed, writes = {}, {}
    with recording(find_sites(llama.model, "mlp_in"), normed.__setitem__, writes.__setitem__):
        llama.model(**inputs)
    for layer, site in enumerate(llama.sites.layers):
        assert torch.equal(writes[layer], site.mlp(normed[layer]))


def test_replaced_mlps_are_not_computed(llama, inputs):
    computed = []
    handle = llama.sites.layers[1].mlp.down_proj.register_forward_hook(lambda *_: computed.append(1))
    reads = {}
    with handle, reading(llama.sites, reads.__setitem__), replacing(llama.sites, lambda i: torch.zeros_like(reads[i])):
        llama.model(**inputs)
        assert not computed
    assert len(reads) == 3


def test_what_is_fed_is_what_mlps_see_and_the_stream_stays(llama, inputs):
    stream, writes = {}, {}
    with reading(llama.sites, stream.__setitem__):
        llama.model(**inputs)
    fed = {layer: -x for layer, x in stream.items()}
    with recording(llama.sites, lambda *_: None, writes.__setitem__), feeding(llama.sites, fed.__getitem__):
        states = llama.model(**inputs, output_hidden_states=True).hidden_states
    for layer, site in enumerate(llama.sites.layers):
        torch.testing.assert_close(writes[layer], site.mlp(site.norm(-stream[layer])))
    torch.testing.assert_close(states[1], stream[0] + writes[0])


@pytest.mark.parametrize("name", ["granite", "opt", "gpt_oss", "llama4_text"])
def test_reads_and_writes_have_the_shape_of_the_stream_and_count_as_added(name):
    model = family(name)
    tokens = random_inputs(model)
    sites, _ = resolve_sites(model, "resid", tokens)
    reads, writes = {}, {}
    with recording(sites, reads.__setitem__, writes.__setitem__):
        states = model(**tokens, output_hidden_states=True).hidden_states
    assert reads[0].shape == writes[0].shape == states[0].shape
    torch.testing.assert_close(reads[0] + writes[0], states[1])


def test_before_forward_sees_the_arguments_first(llama, inputs):
    order = []
    with (
        before_forward(llama.model, lambda kwargs: order.append(sorted(kwargs))),
        reading(llama.sites, lambda layer, x: order.append(layer)),
    ):
        llama.model(**inputs)
    assert order == [["attention_mask", "input_ids"], 0, 1, 2]
