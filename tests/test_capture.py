"""Capture: what is kept of a frozen model's pass, and which of its tokens are trained on."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from crosslayer import Example, UserError
from crosslayer.activations.capture import ModelSource, capture, capture_all
from crosslayer.activations.record import Activations
from crosslayer.activations.usable import usable
from crosslayer.models.prompts import prepare
from crosslayer.models.sites import find_sites
from making import random_activations, text_examples


def captured(model, *examples: Example) -> Activations:
    return capture(model, examples, range(len(examples)))


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (96, 96), (shade, 255 - shade, 90))


def same(a: Activations, b: Activations) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))


def test_writes_are_the_mlps_of_the_normed_reads(llava):
    found = captured(llava, Example("a", "a cat", image=picture(3)), Example("b", "a dog and a cat ."))
    for layer, site in enumerate(llava.sites.layers):
        by_hand = site.mlp(site.norm(found.x[:, layer]))
        torch.testing.assert_close(found.y[:, layer], by_hand, atol=1e-5, rtol=1e-5)


def test_reads_at_mlp_in_are_the_normed_stream(llama):
    at_input = replace(llama, sites=find_sites(llama.model, "mlp_in"))
    stream, normed = captured(llama, *text_examples(3)), captured(at_input, *text_examples(3))
    for layer, site in enumerate(llama.sites.layers):
        torch.testing.assert_close(site.norm(stream.x[:, layer]), normed.x[:, layer])
    assert torch.equal(stream.y, normed.y)


def test_padding_is_left_out_and_prompts_are_told_apart(llama):
    examples = text_examples(5)
    numbers = [13, 2, 8, 11, 5]
    together, alone = capture(llama, examples, numbers), [captured(llama, e) for e in examples]
    assert len(together) == sum(len(part) for part in alone)
    for number, part in zip(numbers, alone, strict=True):
        rows = together[together.sample == number]
        assert torch.equal(rows.position, torch.arange(len(part)))
        torch.testing.assert_close(rows.x, part.x, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(rows.y, part.y, atol=1e-4, rtol=1e-4)


def test_image_tokens_are_tagged(llava):
    found = captured(llava, Example("a", "a cat"), Example("b", "a dog", image=picture(3)))
    assert found.image.sum() == 9
    assert found.sample[found.image].unique().tolist() == [1]


def test_capture_all_keeps_the_shape_of_the_batch(llama):
    batch = prepare(llama.model, llama.processor, text_examples(4))
    x, y = capture_all(llama, batch)
    assert x.shape == y.shape == (*batch.tokens.shape, 3, 32)
    assert torch.equal(x[batch.attention], captured(llama, *text_examples(4)).x)


def test_a_chunk_is_the_same_whenever_it_is_asked_for(llama):
    source = ModelSource(llama, text_examples(10), seed=1, chunk_prompts=4, batch_prompts=3)
    chunks = [source.chunk(i) for i in range(4)]
    assert all(same(source.chunk(i), chunks[i]) for i in (3, 0, 2, 1))
    again = ModelSource(llama, text_examples(10), seed=1, chunk_prompts=4, batch_prompts=3)
    assert same(again.chunk(2), chunks[2])


def test_a_chunk_lies_token_by_token_in_memory(llama):
    chunk = ModelSource(llama, text_examples(4), chunk_prompts=2).chunk(0)
    assert chunk.x.is_contiguous()
    assert chunk.y.is_contiguous()


def test_a_chunk_that_is_asked_for_again_at_once_costs_no_forward_pass(llama):
    source, passes = ModelSource(llama, text_examples(8), chunk_prompts=4), []
    handle = llama.body.register_forward_hook(lambda *_: passes.append(1))
    first = source.chunk(0)
    assert source.chunk(0) is first
    assert len(passes) == 1
    assert torch.equal(source.chunk(1).sample.unique().sort().values, torch.tensor(sorted(source._order[4:])))
    assert torch.equal(source.chunk(0).x, first.x)
    assert len(passes) == 3
    handle.remove()


def test_every_epoch_visits_every_example_in_a_new_order(llama):
    source = ModelSource(llama, text_examples(10), seed=1, chunk_prompts=5, batch_prompts=2)
    orders = [source.chunk(i).sample.unique_consecutive().tolist() for i in range(6)]
    epochs = [orders[i] + orders[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    other = ModelSource(llama, text_examples(10), seed=2, chunk_prompts=5, batch_prompts=2)
    assert other.chunk(0).sample.unique_consecutive().tolist() != orders[0]


def test_samples_are_numbers_of_examples(llama):
    examples = text_examples(7)
    chunk = ModelSource(llama, examples, chunk_prompts=9, batch_prompts=4).chunk(0)
    for number in (0, 3, 6):
        alone, rows = captured(llama, examples[number]), chunk[chunk.sample == number]
        torch.testing.assert_close(rows.x[: len(alone)], alone.x, atol=1e-4, rtol=1e-4)


def test_an_empty_data_set_is_refused(llama):
    with pytest.raises(UserError, match="data set is empty"):
        ModelSource(llama, [])


def test_first_positions_and_outliers_are_left_out_and_counted():
    activations = random_activations(64, 3, 8)
    activations.x[[9, 30], 1] *= 500  # at one layer only
    activations.x[8] *= 500  # a first position counts as that
    chosen = usable(activations)
    assert (chosen.n_first, chosen.n_outliers) == (8, 2)
    left_out = set(range(0, 64, 8)) | {9, 30}
    assert chosen.keep.nonzero().squeeze(1).tolist() == [n for n in range(64) if n not in left_out]


def test_first_positions_do_not_move_the_bar_for_outliers():
    activations = random_activations(64, 3, 8, first_every=2)
    activations.x[::2] *= 1000
    activations.x[1, 2] *= 300
    assert usable(activations).n_outliers == 1


def test_prompts_of_one_token_leave_nothing():
    chosen = usable(random_activations(16, 3, 8, first_every=1))
    assert (chosen.keep.sum(), chosen.n_first, chosen.n_outliers) == (0, 16, 0)


def test_activations_are_cut_and_joined():
    activations = random_activations(20, 2, 4)
    parts = [activations[:7], activations[torch.arange(7, 20)]]
    assert same(Activations.concatenate(parts), activations)
    assert same(activations[activations.image], activations[activations.image.nonzero().squeeze(1)])


def test_a_chunk_keeps_to_its_memory(llama):
    budget = 100_000
    source = ModelSource(llama, text_examples(40), chunk_bytes=budget)
    chunk = source.chunk(0)
    assert 1 < source.chunk_prompts < 40
    assert chunk.x.nbytes + chunk.y.nbytes <= 1.5 * budget
    assert ModelSource(llama, text_examples(40)).chunk_prompts == 512


def test_a_token_that_is_not_finite_is_no_outlier():
    activations = random_activations(32, 3, 8)
    activations.x[5, 1, 2] = torch.inf
    chosen = usable(activations)
    assert chosen.keep[5]
    assert chosen.n_outliers == 0
