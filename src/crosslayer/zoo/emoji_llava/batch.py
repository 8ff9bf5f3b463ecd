"""Turns as training batches, the same numbers that the shipped processor makes of them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaProcessor

from crosslayer.zoo.emoji_llava.architecture import IMAGE, IMAGE_TOKENS
from crosslayer.zoo.emoji_llava.conversation import Turn
from crosslayer.zoo.emoji_llava.picture import pixels
from crosslayer.zoo.emoji_llava.scene import Scene

IGNORED = -100
"""The label of positions that the loss leaves out."""


def collate(turns: Sequence[Turn], processor: LlavaProcessor) -> dict[str, Tensor]:
    """input_ids and labels [turns, positions], pixel_values [turns, 3, 96, 96].

    Padded on the right, where causal attention needs no mask. Only the response and `</s>` have labels.
    """
    tokenizer = processor.tokenizer
    prompts = tokenizer([IMAGE * IMAGE_TOKENS + turn.prompt for turn in turns])["input_ids"]
    responses = tokenizer([turn.response for turn in turns], add_special_tokens=False)["input_ids"]
    responses = [[*response, tokenizer.eos_token_id] for response in responses]
    ids = [torch.tensor(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]
    labels = [torch.tensor([IGNORED] * len(p) + r) for p, r in zip(prompts, responses, strict=True)]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        "pixel_values": pixel_values([turn.scene for turn in turns], processor),
    }


def pixel_values(scenes: Sequence[Scene], processor: LlavaProcessor) -> Tensor:
    """The scenes' pictures as float32 [scenes, 3, 96, 96], normalised as the processor does."""
    rules = processor.image_processor
    scaled = np.stack([pixels(scene) for scene in scenes]) * np.float32(rules.rescale_factor)
    scaled = (scaled - np.array(rules.image_mean, np.float32)) / np.array(rules.image_std, np.float32)
    return torch.from_numpy(scaled).permute(0, 3, 1, 2)
