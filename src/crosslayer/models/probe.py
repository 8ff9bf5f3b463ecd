"""One small batch to prove sites on: real words and a grey picture, or random tokens and pixels without a processor."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from crosslayer.data.examples import Example
from crosslayer.errors import UserError
from crosslayer.models.prompts import prepare

LENGTH = 12
"""Random text tokens of a probe."""


def probe(model: PreTrainedModel, processor: Any, sees: bool) -> dict[str, Any]:
    """Keyword arguments of one forward pass, without padding.

    Raises:
        UserError: when the model came without a processor, and does not run on random tokens and pixels.
    """
    if processor is None:
        return _checked_random_inputs(model)
    picture = Image.new("RGB", (64, 64), "grey") if sees else None
    return prepare(model, processor, [Example("probe", "what is there in the picture ?", image=picture)]).inputs


def _checked_random_inputs(model: PreTrainedModel) -> dict[str, Any]:
    try:
        inputs = random_inputs(model)
        with torch.no_grad():
            model(**inputs, use_cache=False)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model type {model.config.model_type!r} came without tokenizer or processor and does not run on random "
            f"tokens and pixels; put the processor's files beside the weights ({type(error).__name__}: {reason})"
        ) from error
    return inputs


def random_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Random tokens, with random pixels of the shapes that the configuration asks for, for a family in `PIXELS`."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    ids = _words(config, generator)
    build = PIXELS.get(config.model_type)
    if build is None:
        return {"input_ids": ids.to(model.device)}
    pixels = {
        name: (value.to(model.dtype) if value.is_floating_point() else value).to(model.device)
        for name, value in build(config).items()
    }
    image = torch.full((1, n_image_tokens(model, pixels)), _image_token(config))
    ids = torch.cat([ids[:, :2], image, ids[:, 2:]], 1)
    inputs = {"input_ids": ids.to(model.device), **pixels}
    return inputs | EXTRAS.get(config.model_type, lambda inputs, config: {})(inputs, config)


def _words(config: PretrainedConfig, generator: torch.Generator) -> Tensor:
    """Token ids that mean nothing special."""
    special = {value for part in (config, config.get_text_config()) for value in _special(part)}
    ordinary = torch.tensor([i for i in range(min(config.get_text_config().vocab_size, 4096)) if i not in special])
    return ordinary[torch.randint(len(ordinary), (1, LENGTH), generator=generator)]


def _special(config: PretrainedConfig) -> list[int]:
    named = [value for name, value in config.to_dict().items() if name.endswith(("token_id", "token_index"))]
    return [i for value in named for i in (value if isinstance(value, list) else [value])]


def _image_token(config: PretrainedConfig) -> int:
    return getattr(config, "image_token_id", None) or config.image_token_index


def n_image_tokens(model: Any, pixels: dict[str, Tensor]) -> int:
    """As many as the vision tower gives features."""
    tower = model if hasattr(model, "get_image_features") else model.base_model
    with torch.no_grad():
        features = tower.get_image_features(**pixels)
    pooled = getattr(features, "pooler_output", None)
    features = getattr(features, "last_hidden_state", features) if pooled is None else pooled
    parts = features if isinstance(features, list | tuple) else [features]
    return sum(part.shape[:-1].numel() for part in parts)


def _size(config: PretrainedConfig) -> int:
    size = config.vision_config.image_size
    return size if isinstance(size, int) else size[0]


def _square(config: PretrainedConfig) -> dict[str, Tensor]:
    S = _size(config)
    return {"pixel_values": torch.randn(1, 3, S, S)}


def _square_for_video(config: PretrainedConfig) -> dict[str, Tensor]:
    return {"pixel_values_images": _square(config)["pixel_values"]}


def _sized(config: PretrainedConfig) -> dict[str, Tensor]:
    return {**_square(config), "image_sizes": torch.tensor([[_size(config)] * 2])}


def _tiles(config: PretrainedConfig) -> dict[str, Tensor]:
    """An overview and the tiles of the first of the grids."""
    S, (height, width) = _size(config), config.image_grid_pinpoints[0]
    n = 1 + (height // S) * (width // S)
    return {"pixel_values": torch.randn(1, n, 3, S, S), "image_sizes": torch.tensor([[height, width]])}


def _one_of_several(config: PretrainedConfig) -> dict[str, Tensor]:
    return {"pixel_values": _square(config)["pixel_values"][None]}


def _grid(config: PretrainedConfig) -> dict[str, Tensor]:
    """Patches of a picture two merged patches wide and high."""
    vision = config.vision_config
    side = 2 * vision.spatial_merge_size
    channels = getattr(vision, "in_channels", 3) or 3
    values = channels * vision.temporal_patch_size * vision.patch_size**2
    return {"pixel_values": torch.randn(side**2, values), "image_grid_thw": torch.tensor([[1, side, side]])}


def _patches(config: PretrainedConfig) -> dict[str, Tensor]:
    side, patch = 2 * config.vision_config.pooling_kernel_size, config.vision_config.patch_size
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    return {"pixel_values": torch.rand(1, side**2, 3 * patch**2), "image_position_ids": places.flip(1)[None]}


def _packed(config: PretrainedConfig) -> dict[str, Tensor]:
    side, patch = 2 * config.downsample_factor, config.vision_config.patch_size
    return {
        "pixel_values": torch.randn(1, side**2, 3 * patch**2),
        "spatial_shapes": torch.tensor([[side, side]]),
        "pixel_attention_mask": torch.ones(1, side**2, dtype=torch.long),
    }


def _pooled(config: PretrainedConfig) -> dict[str, Tensor]:
    """One crop, whose patches are pooled four by four."""
    vision = config.vision_config
    n = vision.num_position_embeddings
    return {
        "pixel_values": torch.randn(1, n, 3 * vision.patch_size**2),
        "image_token_pooling": torch.arange(n).view(-1, 4),
        "image_grids": torch.tensor([[1, n // 4, 0, 0]]),
    }


def _queried(config: PretrainedConfig) -> dict[str, Tensor]:
    return {**_square(config), "qformer_input_ids": torch.tensor([[3, 4, 5]])}


def _types(inputs: dict[str, Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
    """1 at image tokens, 0 at text."""
    return {"mm_token_type_ids": (inputs["input_ids"] == _image_token(config)).int()}


def _gemma_types(inputs: dict[str, Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
    """The same under another name; patches of one image attend both ways."""
    return {"token_type_ids": _types(inputs, config)["mm_token_type_ids"]}


PIXELS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "aya_vision": _square,
    "blip-2": _square,
    "deepseek_vl": _square,
    "gemma3": _square,
    "gemma4": _patches,
    "glm4v": _grid,
    "idefics2": _one_of_several,
    "idefics3": _one_of_several,
    "instructblip": _queried,
    "internvl": _square,
    "lfm2_vl": _packed,
    "llama4": _square,
    "llava": _square,
    "llava_next": _tiles,
    "llava_next_video": _tiles,
    "llava_onevision": _tiles,
    "mistral3": _sized,
    "molmo2": _pooled,
    "ovis2": _square,
    "paligemma": _square,
    "qwen2_5_vl": _grid,
    "qwen2_vl": _grid,
    "qwen3_5": _grid,
    "qwen3_vl": _grid,
    "qwen3_vl_moe": _grid,
    "smolvlm": _one_of_several,
    "video_llava": _square_for_video,
    "vipllava": _square,
}
"""By `config.model_type`: what a processor would make of a picture."""

EXTRAS: dict[str, Callable[[dict[str, Tensor], Any], dict[str, Tensor]]] = {
    **dict.fromkeys(("gemma4", "glm4v", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl", "qwen3_vl_moe"), _types),
    "gemma3": _gemma_types,
}
"""What else a processor gives, once it has the tokens."""
