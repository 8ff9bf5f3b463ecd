"""Pictures of a batch in one pass: the bits that the stock processor gives, and hands off all others."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaNextImageProcessorPil, SiglipImageProcessorPil
from transformers.image_processing_backends import PilBackend

from crosslayer.models.pixels import in_one_pass

SQUARE = {"height": 200, "width": 200}
SIZES = {"as the model reads": [(96, 96)] * 3, "others": [(96, 96), (40, 30), (33, 200)]}


def pictures(sizes: list[tuple[int, int]]) -> list[Image.Image]:
    """Noise, given as width and height."""
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def same(image_processor, sizes: list[tuple[int, int]]) -> None:
    """Asserts that one pass gives the same bits in the same layout."""
    given = pictures(sizes)
    stock = image_processor(given, return_tensors="pt")["pixel_values"]
    quick = in_one_pass(SimpleNamespace(image_processor=image_processor)).image_processor
    found = quick(given, return_tensors="pt")["pixel_values"]
    assert found.dtype == stock.dtype
    assert found.stride() == stock.stride()
    assert torch.equal(found.view(torch.uint8), stock.view(torch.uint8))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_bundled_processor_gives_the_same_bits(llava, sizes):
    same(llava.processor.image_processor, sizes)


@pytest.mark.parametrize(
    "image_processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 50}, crop_size={"height": 48, "width": 40}),
        SiglipImageProcessorPil(size={"height": 32, "width": 96}),
        CLIPImageProcessorPil(do_resize=False, crop_size={"height": 48, "width": 40}, rescale_factor=1 / 128),
        CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_normalize=False),
        CLIPImageProcessorPil(do_center_crop=False, do_resize=False, do_pad=True, pad_size=SQUARE),
    ],
    ids=["CLIP", "SigLIP", "not resized", "not normalised", "padded"],
)
def test_settings_of_stock_processors_give_the_same_bits(image_processor):
    same(image_processor, SIZES["others"])


def test_a_batch_is_normalised_once(llava, monkeypatch):
    calls, stock = [], PilBackend.normalize
    monkeypatch.setattr(PilBackend, "normalize", lambda *given, **named: calls.append(1) or stock(*given, **named))
    quick = in_one_pass(llava.processor)
    quick.image_processor(pictures(SIZES["others"]), return_tensors="pt")
    assert len(calls) == 1


def test_the_processor_that_was_given_stays_as_it_was(llava):
    before = dict(vars(llava.processor.image_processor))
    assert in_one_pass(llava.processor).image_processor is not llava.processor.image_processor
    assert vars(llava.processor.image_processor) == before


class Own(CLIPImageProcessorPil):
    """With a step of its own."""

    def normalize(self, image, mean, std, **settings):
        return super().normalize(image.round(1), mean, std, **settings)


class Grey(CLIPImageProcessorPil):
    """That turns pictures grey."""

    def convert_to_rgb(self, image, **settings):
        return super().convert_to_rgb(image.convert("L"), **settings)


def test_other_processors_go_their_own_way(llava):
    for image_processor in (Own(), Grey(), LlavaNextImageProcessorPil(), object()):
        processor = SimpleNamespace(image_processor=image_processor)
        assert in_one_pass(processor) is processor
    assert in_one_pass(llava.processor.tokenizer) is llava.processor.tokenizer
