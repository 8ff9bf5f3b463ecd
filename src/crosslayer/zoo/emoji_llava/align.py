"""The first stage of training: patches learn to look like words before the language model reads them.

It stands in for the pretrained vision tower that a LLaVA starts from, and makes the second stage far shorter.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration

from crosslayer.zoo.emoji_llava.architecture import IMAGE_TOKENS, PAD, WORDS
from crosslayer.zoo.emoji_llava.scene import Scene


def alignment_loss(model: LlavaForConditionalGeneration, pixel_values: Tensor, words: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each patch's word, for pixels [scenes, 3, 96, 96], words [scenes, 9].

    A patch scores a word by the inner product of its projection with the word's input embedding.
    """
    features = model.get_image_features(pixel_values=pixel_values)
    patches = torch.stack(list(features.pooler_output))  # pyright: ignore
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    scores = patches @ embedding.weight.T
    return cross_entropy(scores.flatten(0, 1), words.flatten())


def patch_words(scenes: Sequence[Scene]) -> Tensor:
    """Token ids [scenes, 9] of what is seen in each patch: `<pad>`, whose embedding stays zero, for nothing."""
    words = torch.full((len(scenes), IMAGE_TOKENS), WORDS.index(PAD))
    for row, scene in zip(words, scenes, strict=True):
        for thing in scene.objects:
            if thing.visible:
                row[thing.cell] = WORDS.index(thing.name)
    return words
