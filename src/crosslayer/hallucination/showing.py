"""Where features fire the most: the response, and the token or the patch of its picture."""

from collections.abc import Sequence
from dataclasses import asdict
from math import isqrt
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.distributed.crew import ALONE, Crew
from crosslayer.distributed.results import Result
from crosslayer.hallucination.feature_table import Shown, read_shown
from crosslayer.hallucination.firing import answered, watch
from crosslayer.hallucination.responses import Response
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch

Box = tuple[float, float, float, float]


def top_examples(
    model: LoadedModel,
    coder: CrossLayerTranscoder,
    responses: Sequence[Response],
    features: Sequence[tuple[int, int]],
    folder: Path,
    *,
    n: int,
    batch_prompts: int = 16,
    crew: Crew = ALONE,
) -> list[tuple[Shown, ...]]:
    """The responses in which each feature fires the most, the strongest first, with its strongest position in each.

    Args:
        model: the language model.
        coder: its transcoder.
        responses: to look through.
        features: source number and feature.
        folder: that of the responses' file.
        n: responses at most for each feature.
        batch_prompts: responses run together.
        crew: the processes that share the work.
    """
    batches = [responses[first : first + batch_prompts] for first in range(0, len(responses), batch_prompts)]
    found: list[list[Shown]] = [[] for _ in features]
    with tqdm(total=len(responses), unit="response", desc="examples", disable=None, leave=False) as bar:
        looked = crew.map(lambda i: _look(model, coder, batches[i], features, folder), len(batches))
        for batch, seen in zip(batches, looked, strict=True):
            for shown, new in zip(found, seen["shown"], strict=True):
                shown[:] = sorted([*shown, *map(read_shown, new)], key=lambda one: -one.activation)[:n]
            bar.update(len(batch))
    return [tuple(shown) for shown in found]


def _look(
    model: LoadedModel,
    coder: CrossLayerTranscoder,
    responses: Sequence[Response],
    features: Sequence[tuple[int, int]],
    folder: Path,
) -> Result:
    """Of each feature, where it fires the most in each response of a batch, as JSON values."""
    batch = answered(model, responses, folder)
    return {
        "shown": [
            [
                asdict(_shown(model, batch, responses, row, int(p), float(v)))
                for row, (v, p) in enumerate(zip(values, places, strict=True))
                if v > 0
            ]
            for values, places in _strongest(model, coder, batch, features)
        ]
    }


def _strongest(
    model: LoadedModel, coder: CrossLayerTranscoder, batch: Batch, features: Sequence[tuple[int, int]]
) -> list[tuple[Float[Tensor, " B"], Tensor]]:
    """Of each feature, the largest activation in each prompt and its column."""
    best: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(features)

    def keep(i: int, acts: Float[Tensor, "B P F"]) -> None:
        for k, (source, feature) in enumerate(features):
            if source == i:
                largest = acts[:, :, feature].max(1)
                best[k] = largest.values, largest.indices

    watch(model, coder, batch, keep)
    return best


def _shown(
    model: LoadedModel, batch: Batch, responses: Sequence[Response], row: int, column: int, activation: float
) -> Shown:
    tokenizer, response = getattr(model.processor, "tokenizer", model.processor), responses[row]
    of_image = bool(batch.image[row, column])
    return Shown(
        response=response.id,
        image=response.image,
        position=int(batch.position[row, column]),
        token=None if of_image else tokenizer.decode([int(batch.tokens[row, column])]),
        box=patch_box(batch.image[row], column) if of_image else None,
        activation=activation,
        said=response.response,
        hallucinated=tuple(mention.object for mention in response.mentions if mention.hallucinated),
    )


def patch_box(image: Bool[Tensor, " P"], column: int) -> Box | None:
    """Where a patch lies, in shares of the picture; None where patches are no square grid."""
    side = isqrt(int(image.sum()))
    if side * side != int(image.sum()):
        return None
    down, across = divmod(int(image[:column].sum()), side)
    return across / side, down / side, (across + 1) / side, (down + 1) / side
