"""Stock processors of pictures, quicker: the arithmetic on the pixels of a batch in one pass, to the same bits."""

from copy import copy
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers.image_processing_backends import PilBackend

STOCK = (
    *("preprocess", "_preprocess_image_like_inputs", "_preprocess", "resize", "rescale", "normalize"),
    *("process_image", "convert_to_rgb"),
)
"""Methods that a processor must share with transformers' own to be quickened."""


def in_one_pass(processor: Any) -> Any:
    """The same processor, but one that rescales and normalises all pictures of a batch at once.

    Transformers treats one picture after the other, and keeps Python's other threads waiting meanwhile. A processor
    with steps of its own, or on torchvision, is given back as it is.
    """
    stock = getattr(processor, "image_processor", None)
    if not isinstance(stock, PilBackend) or any(getattr(type(stock), n) is not getattr(PilBackend, n) for n in STOCK):
        return processor
    quick, pictures = copy(processor), cast(Any, copy(stock))
    pictures._preprocess = partial(_preprocess, stock)
    pictures.do_convert_rgb = False  # those of examples are RGB
    quick.image_processor = pictures
    return quick


def _preprocess(stock: PilBackend, images: list[np.ndarray], **settings: Any) -> Any:
    """What `stock._preprocess` gives.

    Resizing to the size that a picture has leaves it as it is. Rescaling and normalising, the last steps without
    padding, treat each pixel alone, so they are looked up in what the processor makes of the 256 levels of a channel.
    """
    last = settings["do_rescale"] and settings["do_normalize"] and not settings["do_pad"]
    if not last or settings["return_tensors"] != "pt" or any(image.dtype != np.uint8 for image in images):
        return stock._preprocess(images, **settings)
    sizes = {image.shape[1:] for image in images}
    resize = settings["do_resize"] and sizes != {(settings["size"].height, settings["size"].width)}
    found = stock._preprocess(images, **settings | {"do_resize": resize, "do_rescale": False, "do_normalize": False})
    pixels = found["pixel_values"]
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (pixels.shape[1], 1, 256))
    values = stock.rescale(levels, settings["rescale_factor"])
    table = stock.normalize(values, settings["image_mean"], settings["image_std"])
    found["pixel_values"] = _looked_up(torch.from_numpy(table[:, 0].copy()), pixels)
    return found


def _looked_up(table: Float[Tensor, "C 256"], pixels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    starts = 256 * torch.arange(len(table), dtype=torch.int32)
    places = pixels.int().add_(starts[:, None, None])
    return table.flatten().index_select(0, places.flatten()).view(pixels.shape)
