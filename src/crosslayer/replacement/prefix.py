"""What comes before all that edits touch: computed once, and continued under one edit after another.

An edit at text positions leaves an image that stands before them as it is, as a position depends on earlier ones
alone. So the model runs on these columns of a batch once, and its keys and values serve every edit.

Axes: B prompts, P positions, M columns of the first part, R of the second, V vocabulary.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch
from crosslayer.replacement.model import continuation
from crosslayer.replacement.where import Everywhere, Places, Where

SAME = 1e-3
"""Share of the largest logit by which logits may differ when a pass is split in two; of models in bfloat16 50 times."""
KEPT = 2**28
"""Bytes of keys and values that are kept from one edit to the next."""


@dataclass(frozen=True)
class Under:
    """An edit: what is put on the model for the passes over a batch, and where alone it acts."""

    on: Callable[[Batch], AbstractContextManager[object]]
    wheres: tuple[Where, ...] = (Everywhere(),)


AS_IT_IS = Under(lambda _: nullcontext(), ())
"""No edit."""


@dataclass(frozen=True)
class _Parts:
    """A batch in two parts, with padding between them where rows are of different lengths."""

    batch: Batch
    """M + R columns."""
    first: int
    """M."""
    dropped: int
    """Columns of the batch as it was before the first of the second part."""


class Prefixes:
    """Runs a model on batches under edits, what comes before them computed once.

    A model that answers otherwise when its pass is split (one whose positions depend on the image, for one) is run as
    a whole; the first batch that could be split decides, and a warning says so.

    Args:
        model: the language model.
        kept: bytes of keys and values that stay from one edit to the next; 0 where no batch comes twice.
    """

    def __init__(self, model: LoadedModel, kept: int = KEPT):
        self.model, self.room = model, kept
        self.splits: bool | None = None
        self.known: dict[tuple[int, tuple[int, ...]], tuple[Batch, Any]] = {}

    def logits(self, batch: Batch, edit: Under, first: Int[Tensor, " B"]) -> Float[Tensor, "B P V"]:
        """Logits under an edit, with gradients; those of a row before its column `first` may be 0, and never count."""
        before = self._before(batch, edit, batch.response, first)
        if before is None:
            with edit.on(batch):
                return self.model.model(**batch.inputs, use_cache=False).logits
        parts, cache = _in_parts(batch, before), self._cache(batch, before)
        with edit.on(parts.batch):
            found = self._rest(parts, cache)
        return torch.nn.functional.pad(found, (0, 0, parts.dropped, 0))

    def continuation(self, batch: Batch, edit: Under, **sampling: Any) -> Tensor:
        """What the model generates after prompts under an edit; see `crosslayer.replacement.model.continuation`."""
        last = torch.full((len(batch.tokens),), batch.tokens.shape[1] - 1, device=batch.tokens.device)
        before = self._before(batch, edit, torch.zeros_like(batch.response), last)
        if before is None:
            with edit.on(batch):
                return continuation(self.model, batch, **sampling)
        parts, cache = _in_parts(batch, before).batch, self._cache(batch, before)
        inputs = {name: parts.inputs[name] for name in ("input_ids", "attention_mask")}
        with edit.on(parts):
            return continuation(self.model, replace(parts, inputs={**inputs, "past_key_values": cache}), **sampling)

    def _before(
        self, batch: Batch, edit: Under, answer: Bool[Tensor, "B P"], first: Int[Tensor, " B"]
    ) -> Int[Tensor, " B"] | None:
        """Columns of each row before what an edit touches and before `first`; None where a pass is not split."""
        if self.splits is False:
            return None
        before = torch.minimum(first, _untouched(batch, edit.wheres, answer))
        column = torch.arange(batch.tokens.shape[1], device=before.device)
        if (before < 2).any() or (batch.image & (column >= before[:, None])).any():
            return None
        if self.splits is None:
            self.splits = self._alike(batch, before)
        return before if self.splits else None

    @torch.no_grad()
    def _alike(self, batch: Batch, before: Int[Tensor, " B"]) -> bool:
        """Whether the model says the same when its pass is split."""
        whole, parts = self.model.model(**batch.inputs, use_cache=False).logits, _in_parts(batch, before)
        try:
            rest = self._rest(parts, self._computed(parts))
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            rest = whole.new_full(whole[:, parts.dropped :].shape, torch.inf)
        seen = parts.batch.attention[:, parts.first :]
        share = SAME * (1 if whole.dtype in (torch.float32, torch.float64) else 50)
        same = bool((rest - whole[:, parts.dropped :])[seen].abs().max() <= share * whole.abs().max())
        if not same:
            warnings.warn(f"{self.model.id}: its passes cannot be split, so every edit runs them whole", stacklevel=2)
        return same

    def _cache(self, batch: Batch, before: Int[Tensor, " B"]) -> Any:
        """Keys and values of the first part, to be extended."""
        key = id(batch), tuple(before.tolist())
        if key in self.known:
            return deepcopy(self.known[key][1])
        cache = self._computed(_in_parts(batch, before))
        size = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        if size <= self.room:
            self.room -= size
            self.known[key] = batch, deepcopy(cache)  # with the batch, so that its id stays its own
        return cache

    @torch.no_grad()
    def _computed(self, parts: _Parts) -> Any:
        inputs, M = parts.batch.inputs, parts.first
        ours = {
            name: value[:, :M] if isinstance(value, Tensor) and value.shape[:2] == parts.batch.tokens.shape else value
            for name, value in inputs.items()
        }
        position = parts.batch.position.clamp_min(0)[:, :M]
        return self.model.model(**ours, position_ids=position, use_cache=True).past_key_values

    def _rest(self, parts: _Parts, cache: Any) -> Float[Tensor, "B R V"]:
        return self.model.model(
            input_ids=parts.batch.tokens[:, parts.first :],
            attention_mask=parts.batch.inputs["attention_mask"],
            position_ids=parts.batch.position.clamp_min(0)[:, parts.first :],
            past_key_values=cache,
            use_cache=True,
        ).logits


def _in_parts(batch: Batch, before: Int[Tensor, " B"]) -> _Parts:
    """The batch with the columns before `before` of every row first, then the others.

    Columns that belong to the first part of some rows and to the second of others come twice, as padding where they
    do not belong.
    """
    first, dropped, P = int(before.max()), int(before.min()), batch.tokens.shape[1]
    column = torch.arange(P, device=before.device)
    ours = torch.cat([column[:first] < before[:, None], column[dropped:] >= before[:, None]], 1)

    def twice(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.shape[:2] == batch.tokens.shape
        return torch.cat([value[:, :first], value[:, dropped:]], 1) if whole else value

    inputs = {name: twice(value) for name, value in batch.inputs.items()}
    tokens = torch.where(ours, inputs["input_ids"], batch.tokens[:, -1:])  # no image may stand where none is looked at
    inputs |= {"input_ids": tokens, "attention_mask": inputs["attention_mask"] * ours}
    masks = {name: twice(getattr(batch, name)) & ours for name in ("attention", "image", "response")}
    return _Parts(Batch(inputs, tokens, **masks), first, dropped)


def _untouched(batch: Batch, wheres: Sequence[Where], answer: Bool[Tensor, "B P"]) -> Int[Tensor, " B"]:
    """Columns of each row before the first that an edit touches."""
    places = Places(batch.position, batch.image, answer)
    touched = torch.zeros_like(batch.attention)
    for where in wheres:
        touched |= where.mask(places) & (batch.position > 0)
    return torch.where(touched.any(1), touched.long().argmax(1), batch.tokens.shape[1])
