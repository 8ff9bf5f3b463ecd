"""Which features fire where: at a mention, where it is decided, at the prompt's end, on the picture.

Of each mention and place one number a feature is kept, and of these only those that are not zero.

Axes: N mentions, S sources, F features a source, B prompts, P positions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from scipy.sparse import csr_array, vstack
from torch import Tensor
from tqdm import tqdm

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.distributed.crew import ALONE, Crew
from crosslayer.distributed.results import Result
from crosslayer.errors import UserError
from crosslayer.hallucination.decisions import Decision
from crosslayer.hallucination.responses import Response
from crosslayer.models.hooks import reading
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch, prepare

Pool = Callable[[Float[Tensor, "Q F"]], Float[Tensor, " F"]]
PLACES: dict[str, Pool] = {
    "mention": lambda acts: acts.amax(0),
    "decision": lambda acts: acts.amax(0),
    "prompt_end": lambda acts: acts.amax(0),
    "image_max": lambda acts: acts.amax(0),
    "image_mean": lambda acts: acts.mean(0),
}
"""What is made of the activations at the positions of each place. `mention`: the tokens that name the object, which the
model reads once it has named it. `decision`: where the token that decides is predicted. `prompt_end`: the last position
before the response. `image_max` and `image_mean`: over the picture's patches."""
OnActs = Callable[[int, Float[Tensor, "B P F"]], None]


@dataclass(frozen=True)
class Firing:
    """Activations of every feature, by mention and place."""

    acts: Mapping[str, tuple[csr_array, ...]]
    """By place and source, N by F."""
    image: Float64[np.ndarray, "S F"]
    """Mean activation on image tokens."""
    text: Float64[np.ndarray, "S F"]
    """Mean activation on text tokens."""

    @property
    def modality(self) -> Float64[np.ndarray, "S F"]:
        """E_img / (E_img + E_txt): 1 for a feature of pictures alone, 0 for one of text alone, NaN where it is dead."""
        total = self.image + self.text
        return np.divide(self.image, total, out=np.full_like(total, np.nan), where=total > 0)


def fire(
    model: LoadedModel,
    coder: CrossLayerTranscoder,
    made: Sequence[Decision],
    folder: Path,
    *,
    batch_prompts: int = 16,
    crew: Crew = ALONE,
) -> Firing:
    """Run the model over the responses and keep what fires.

    Args:
        model: the language model.
        coder: its transcoder.
        made: decisions, those of a response one after the other.
        folder: that of the responses' file.
        batch_prompts: responses run together.
        crew: the processes that share the work.

    Raises:
        UserError: when a response's tokens are not those of this model, or a picture cannot be read.
    """
    groups = [list(group) for _, group in groupby(made, key=lambda decision: decision.response.id)]
    batches = [groups[first : first + batch_prompts] for first in range(0, len(groups), batch_prompts)]
    sources = range(len(coder.sources))
    sums = {name: np.zeros((len(sources), coder.d_transcoder)) for name in ("image", "text")}
    tokens, acts = dict.fromkeys(sums, 0), {place: [list[csr_array]() for _ in sources] for place in PLACES}
    with tqdm(total=len(groups), unit="response", desc="fire", disable=None, leave=False) as bar:
        found = crew.map(lambda i: _fire(model, coder, batches[i], folder), len(batches))
        for batch, part in zip(batches, found, strict=True):
            for name in sums:
                sums[name] += part[name].numpy()
                tokens[name] += part["tokens"][name]
            for place, rows in acts.items():
                for i in sources:
                    rows[i].append(part[f"{place}.{i}"])
            bar.update(len(batch))
    means = {name: total / max(1, tokens[name]) for name, total in sums.items()}
    return Firing({place: tuple(csr_array(vstack(some)) for some in rows) for place, rows in acts.items()}, **means)


def _fire(
    model: LoadedModel, coder: CrossLayerTranscoder, groups: Sequence[Sequence[Decision]], folder: Path
) -> Result:
    """What fires in a batch: by place and source an array [N, F], by kind of token their number and a sum [S, F]."""
    batch = answered(model, [group[0].response for group in groups], folder)
    wanted = [(row, places(batch, row, decision)) for row, group in enumerate(groups) for decision in group]
    kinds = {"image": batch.image, "text": (batch.position > 0) & ~batch.image}
    shape = (len(coder.sources), coder.d_transcoder)
    found: dict[str, Any] = {name: torch.zeros(shape, dtype=torch.float64) for name in kinds}
    found["tokens"] = {name: int(kind.sum()) for name, kind in kinds.items()}

    def keep(i: int, acts: Float[Tensor, "B P F"]) -> None:
        for name, kind in kinds.items():
            found[name][i] = acts[kind].sum(0).double()
        for place, pool in PLACES.items():
            rows = [
                pool(acts[row, at[place]]) if at[place].any() else acts.new_zeros(acts.shape[2]) for row, at in wanted
            ]
            found[f"{place}.{i}"] = csr_array(torch.stack(rows).float().cpu().numpy())

    watch(model, coder, batch, keep)
    return found


def answered(model: LoadedModel, responses: Sequence[Response], folder: Path) -> Batch:
    """Prompts with their responses as one batch.

    Raises:
        UserError: when the model's tokenizer cuts a response otherwise than it was labelled.
    """
    batch = prepare(model.model, model.processor, [response.answered(folder) for response in responses])
    for row, response in enumerate(responses):
        start, wanted = begins(batch, row), list(response.token_ids or ())
        found = batch.tokens[row, start : start + len(wanted)].tolist()
        if found != wanted:
            raise UserError(
                f"{response.id}: its response has the tokens {wanted[:8]} in its labels, and {found[:8]} with the "
                f"tokenizer of {model.id}; label the responses of this model"
            )
    return batch


def begins(batch: Batch, row: int) -> int:
    """The position of a response's first token."""
    return int(batch.response[row].long().argmax())


def places(batch: Batch, row: int, decision: Decision) -> dict[str, Bool[Tensor, " P"]]:
    """The positions of each of a decision's places."""
    assert decision.mention.tokens is not None
    start, at = begins(batch, row), torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    first, end = decision.mention.tokens
    return {
        "mention": (at >= start + first) & (at < start + end),
        "decision": at == start + decision.place - 1,
        "prompt_end": at == start - 1,
        "image_max": batch.image[row],
        "image_mean": batch.image[row],
    }


@torch.no_grad()
def watch(model: LoadedModel, coder: CrossLayerTranscoder, batch: Batch, on_acts: OnActs) -> None:
    """Call `on_acts` with each source's number and its activations; 0 at padding and at a prompt's first position."""
    live = (batch.position > 0)[..., None]

    def read(layer: int, x: Tensor) -> None:
        if layer in coder.sources:
            acts = coder.encode_layer(layer, x.flatten(0, 1).to(coder.b_dec)).dense()
            on_acts(coder.sources.index(layer), acts.view(*x.shape[:2], -1) * live)

    with reading(model.sites, read):
        model.model(**batch.inputs, use_cache=False)
