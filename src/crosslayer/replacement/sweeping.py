"""Many edits of one prompt at once: copies of the prompt in one batch, each with its own."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch
from crosslayer.replacement.editing import Deltas
from crosslayer.replacement.interventions import Edit


@torch.no_grad()
def sweep(
    model: LoadedModel,
    coder: CrossLayerTranscoder,
    batch: Batch,
    sets: Sequence[Sequence[Edit]],
    *,
    position: int = -1,
    strength: float = 1.0,
    at_once: int = 32,
) -> Float[Tensor, "n V"]:
    """Logits of one prompt at one position under each set of edits, as `edited` makes them one by one.

    Args:
        model: the language model.
        coder: its transcoder.
        batch: one prompt.
        sets: n sets of edits; an empty one is the model itself.
        position: whose logits; the last by default.
        strength: share of the change that is made.
        at_once: copies of the prompt in a batch.

    Raises:
        UserError: for a batch of several prompts, or edits that do not fit.
    """
    if len(batch.tokens) != 1:
        raise UserError(f"a sweep is over edits of one prompt; the batch has {len(batch.tokens)}")
    logits = []
    for start in tqdm(range(0, len(sets), at_once), unit="batch", desc="sweep", disable=None, leave=False):
        some = sets[start : start + at_once]
        many = copies(batch, len(some))
        with Deltas(model, coder, some, strength, many).applied():
            logits.append(model.model(**many.inputs, use_cache=False).logits[:, position])
    return torch.cat(logits)


def copies(batch: Batch, n: int) -> Batch:
    """A batch of one prompt, n times; the parts of its picture follow one another as in any batch."""

    def repeated(value: object) -> object:
        return value.repeat(n, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) else value

    masks = {name: getattr(batch, name).expand(n, -1) for name in ("tokens", "attention", "image", "response")}
    return replace(batch, inputs={name: repeated(value) for name, value in batch.inputs.items()}, **masks)
