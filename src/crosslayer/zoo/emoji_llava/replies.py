"""What a model says to prompts about scenes."""

from collections.abc import Sequence

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from crosslayer.zoo.emoji_llava.architecture import IMAGE
from crosslayer.zoo.emoji_llava.picture import render
from crosslayer.zoo.emoji_llava.scene import Scene


@torch.inference_mode()
def replies(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    scenes: Sequence[Scene],
    prompts: Sequence[str],
    *,
    batch: int = 100,
) -> list[str]:
    """The greedy reply to each scene's prompt, without special tokens."""
    said: list[str] = []
    for start in range(0, len(scenes), batch):
        pictures = [render(scene) for scene in scenes[start : start + batch]]
        texts = [IMAGE + prompt for prompt in prompts[start : start + batch]]
        inputs = processor(images=pictures, text=texts, return_tensors="pt", padding=True)  # pyright: ignore
        generated = model.generate(**inputs.to(model.device))  # pyright: ignore
        new = generated[:, inputs["input_ids"].shape[1] :]
        said += processor.batch_decode(new, skip_special_tokens=True)
    return said
