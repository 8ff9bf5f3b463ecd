"""The local replacement model: the model itself, linear in all that is written, for all families but those refused."""

from dataclasses import replace

import pytest
import torch

from crosslayer import CrossLayerTranscoder, Example, LoadedModel, UserError, Wiring
from crosslayer.coders.input_norm import LayerNorm
from crosslayer.models.probe import probe
from crosslayer.models.prompts import Batch, prepare
from crosslayer.models.resolve import resolve_sites
from crosslayer.replacement.carrying import Sources, Step
from crosslayer.replacement.local import LocalReplacement, trace
from families import PICTURE, TEXT, VISUAL, FamilyProcessor, family
from making import random_coder, traces

PROMPT = "a cat and a dog ."
CROOKED = ("gemma4", "jamba", "lfm2", "qwen3_5", "qwen3_next")
"""Families whose mixers, or third write, are no fixed linear map once patterns and norms are frozen."""
IN_FLOAT32 = ("moe", "gpt_oss", "mixtral", "olmoe", "llama4", "glm4v", "jamba", "qwen3_next", "gemma4")
"""Families with kernels that know no float64."""

EXACT = [name for name in (*TEXT, *VISUAL) if not name.startswith(CROOKED) or "no third write" in name]


def loaded(name: str, read: str = "resid") -> LoadedModel:
    """A tiny model, in float64 where it has all it needs."""
    model = family(name).requires_grad_(False)
    model = model if any(part in name for part in IN_FLOAT32) else model.double()
    sites, proof = resolve_sites(model, read, probe(model, None, name in VISUAL))
    return LoadedModel(name, "", model, FamilyProcessor(model), sites, proof)


def prompt_of(model: LoadedModel, text: str = PROMPT) -> Batch:
    picture = PICTURE if model.id in VISUAL else None
    batch = prepare(model.model, model.processor, [Example("prompt", text, image=picture)])
    dtype = model.model.dtype
    floats = {k: v.to(dtype) for k, v in batch.inputs.items() if torch.is_tensor(v) and v.is_floating_point()}
    return replace(batch, inputs={**batch.inputs, **floats})


def coder_of(model: LoadedModel, skip: Wiring | None = None, **settings) -> CrossLayerTranscoder:
    coder = random_coder(Wiring.full(model.n_layers), D=model.d_model, F=20)
    if skip is not None or settings:
        wiring, sparsity = coder.wiring, coder.sparsity
        coder = CrossLayerTranscoder(wiring, model.d_model, 20, sparsity, skip=skip, **settings).initialise(0)
        for parameter in coder.parameters():
            parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    coder.with_thresholds(torch.rand(model.n_layers, 20))
    return coder.to(model.model.dtype).requires_grad_(False)


def at(layer: int, n: int) -> torch.Tensor:
    """A layer as that of n rows."""
    return torch.full((n,), layer)


def onto(sources: Sources, writes: dict[int, torch.Tensor], entries: dict[int, torch.Tensor]) -> torch.Tensor:
    """What flows into each row, its biases left out: of writes, and of what is added as a layer is entered."""
    found = torch.zeros(sources.n_rows, dtype=writes[0].dtype)
    for step in sources.steps:
        for grad, what in ((step.write, writes), (step.entry, entries)):
            if step.layer in what:
                found[: len(grad)] += torch.einsum("rpd,pd->r", grad, what[step.layer][0, : grad.shape[1]])
    return found


def kept(sources: Sources) -> list[Step]:
    """All steps at once; each overwrites the gradients of the one before."""
    return [replace(step, entry=step.entry.clone(), write=step.write.clone()) for step in sources.steps]


def total(local: LocalReplacement, sources: Sources) -> torch.Tensor:
    """What all sources together amount to, for each row."""
    steps = kept(sources)
    found = onto(
        Sources(sources.n_rows, iter(steps)), dict(enumerate(local.writes)), {0: local.stream, **local.between}
    )
    for step in steps:
        for bias in step.biases.values():
            found[: len(bias)] += bias
    return found


@pytest.mark.parametrize("name", EXACT)
def test_all_that_is_written_adds_up_to_every_read_and_to_the_logits(name):
    model = loaded(name)
    local = trace(model, coder_of(model), prompt_of(model))
    tolerance = 1e-10 if model.model.dtype == torch.float64 and not local.between else 1e-5
    P, D = local.stream.shape[1:]
    for layer, read in enumerate(local.reads):
        vectors = torch.randn(P, D, dtype=read.dtype)
        found, wanted = (
            total(local, local.into_reads(at(layer, P), torch.arange(P), vectors)),
            (read[0] * vectors).sum(1),
        )
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
    vectors = torch.randn(3, local.logits.shape[2], dtype=local.logits.dtype)
    wanted = vectors @ local.logits[0, -1]
    assert (total(local, local.into_logits(P - 1, vectors)) - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert local.gap < 1e-5


@pytest.mark.parametrize("name", EXACT)
def test_logits_of_the_last_positions_alone_are_those_of_all(name):
    model = loaded(name)
    coder, batch = coder_of(model), prompt_of(model)
    P = batch.tokens.shape[1]
    whole, some = (trace(model, coder, batch, logits_from) for logits_from in (0, P - 2))
    assert some.logits.shape[1] == 2
    vectors = torch.randn(3, whole.logits.shape[2], dtype=whole.logits.dtype)
    for place in (P - 2, P - 1):
        torch.testing.assert_close(some.logits_at(place), whole.logits[0, place])
        found, wanted = (total(local, local.into_logits(place, vectors)) for local in (some, whole))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
        assert torch.equal(some.logits_at(place - P), some.logits_at(place))


@pytest.mark.parametrize("name", [name for name in (*TEXT, *VISUAL) if name not in EXACT])
def test_what_is_not_linear_is_refused_with_the_measure(name):
    model = loaded(name)
    with pytest.raises(UserError, match=r"it is not linear in the stream: .* relative"):
        trace(model, coder_of(model), prompt_of(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere", "llava", "gemma3", "bloom"])
def test_gradients_are_finite_differences_under_full_freeze(name):
    model = loaded(name)
    local = trace(model, coder_of(model), prompt_of(model))
    torch.manual_seed(1)
    stream = torch.randn_like(local.stream)
    writes = {layer: torch.randn_like(write) for layer, write in enumerate(local.writes)}
    (reads, logits), P = local.replay(stream, writes), stream.shape[1]
    for layer, (read, before) in enumerate(zip(reads, local.reads, strict=True)):
        vectors = torch.randn(P, model.d_model, dtype=read.dtype)
        predicted = onto(local.into_reads(at(layer, P), torch.arange(P), vectors), writes, {0: stream})
        torch.testing.assert_close(((read - before)[0] * vectors).sum(1), predicted, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(logits, local.logits)


@pytest.mark.parametrize("settings", [{"skip": Wiring.full(2)}, {"input_norm": LayerNorm()}], ids=["skip", "norm"])
def test_skips_and_norms_of_the_transcoders_own_are_paths_too(settings):
    model = loaded("llama")
    local = trace(model, coder_of(model, **settings), prompt_of(model))
    P, vectors = local.stream.shape[1], torch.randn(local.stream.shape[1], model.d_model).double()
    for layer, read in enumerate(local.reads):
        found = total(local, local.into_reads(at(layer, P), torch.arange(P), vectors))
        torch.testing.assert_close(found, (read[0] * vectors).sum(1), rtol=1e-9, atol=1e-9)


def test_a_transcoder_that_still_learns_gives_the_same():
    model = loaded("llama")
    coder, batch = coder_of(model, skip=Wiring.full(2)), prompt_of(model)
    vector = torch.ones(1, model.d_model).double()
    last = [
        kept(trace(model, coder.requires_grad_(learns), batch).into_reads(at(1, 1), torch.tensor([3]), vector))[-1]
        for learns in (False, True)
    ]
    assert torch.equal(last[0].entry, last[1].entry)
    assert last[0].entry.abs().max() > 0


def test_a_model_is_left_as_it_was():
    model = loaded("llava")
    batch, before, attention = prompt_of(model), traces(model.model), model.model.config._attn_implementation
    wanted = model.model(**batch.inputs).logits
    trace(model, coder_of(model), batch)
    assert traces(model.model) == before
    assert model.model.config._attn_implementation == attention
    assert torch.equal(model.model(**batch.inputs).logits, wanted)
    assert not any(p.requires_grad for p in model.model.parameters())


def test_an_image_block_that_attends_both_ways_lets_later_patches_flow_into_earlier_ones():
    model = loaded("gemma3")
    batch = prompt_of(model)
    local = trace(model, coder_of(model), batch)
    patches = batch.image[0].nonzero().squeeze(1)
    sources = local.into_reads(at(1, 1), patches[:1], torch.ones(1, model.d_model).double())
    *_, last = sources.steps
    assert 1 in local.layers.uncut
    assert last.entry[0, patches[-1]].abs().max() > 0
    assert last.entry[0, patches[-1] + 1 :].abs().max() == 0


def test_a_row_of_several_entries_is_the_sum_of_theirs():
    model = loaded("llama")
    local = trace(model, coder_of(model), prompt_of(model))
    layer, position, vectors = torch.tensor([1, 1, 0]), torch.tensor([2, 3, 1]), torch.randn(3, model.d_model).double()
    alone = kept(local.into_reads(layer, position, vectors))
    summed = kept(local.into_reads(layer[1:], position, vectors, torch.tensor([0, 0, 1])))
    for one, two in zip(alone, summed, strict=True):
        torch.testing.assert_close(two.entry, torch.cat([one.entry[:2].sum(0)[None], one.entry[2:]]))
