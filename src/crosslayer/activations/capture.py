"""Running a frozen model on examples and keeping what its MLPs read and write."""

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property
from math import ceil
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.activations.ahead import one_ahead
from crosslayer.activations.record import Activations, Padded
from crosslayer.data.examples import Example, Examples, apart
from crosslayer.data.skipped import Apart
from crosslayer.distributed.crew import Crew
from crosslayer.distributed.mesh import hearing
from crosslayer.errors import UserError
from crosslayer.models.hooks import recording
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch, prepare, prepare_good
from crosslayer.team import ALONE, Team, share, together

CHUNK_BYTES = 2**30
"""Captured activations that are held at a time, at most."""


@torch.no_grad()
def capture_all(model: LoadedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """What every MLP read and wrote, as two tensors [B, P, L, D], padding included."""
    x, y, _ = _recorded(model, batch, model.body, model.model.dtype)
    return x.unflatten(0, batch.tokens.shape), y.unflatten(0, batch.tokens.shape)


def _recorded(model: LoadedModel, batch: Batch, forward: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Any]:
    """What every MLP read and wrote in a forward pass, [B P, L, D] with padding; and what that gave.

    In memory a layer's rows lie side by side, as they come: recording costs the pass less than token by token.
    """
    x = torch.empty(model.n_layers, batch.tokens.numel(), model.d_model, dtype=dtype, device=model.device)
    y = torch.empty_like(x)

    def keep(store: Tensor):
        return lambda layer, tensor: store[layer].copy_(tensor.flatten(0, 1))

    with recording(model.sites, keep(x), keep(y)):
        output = forward(**batch.inputs, use_cache=False)
    return x.transpose(0, 1), y.transpose(0, 1), output


def _padded(model: LoadedModel, batch: Batch, forward: Any, sample: Tensor, dtype: torch.dtype) -> tuple[Padded, Any]:
    """All tokens, each prompt under its number [B] in `sample`; and what the forward pass gave."""
    x, y, output = _recorded(model, batch, forward, dtype)
    columns = (batch.image, batch.position, sample[:, None].expand_as(batch.tokens), batch.tokens)
    activations = Activations(x, y, *(column.flatten() for column in columns))
    return Padded(activations, batch.attention.flatten().nonzero().squeeze(1)), output


def capture(model: LoadedModel, examples: Sequence[Example], numbers: Sequence[int]) -> Activations:
    """Activations of all tokens of the examples but padding, first positions included.

    `numbers` are the examples' own in their data set.
    """
    return _captured(model, prepare(model.model, model.processor, examples), numbers, model.model.dtype).tokens()


@torch.no_grad()
def _captured(model: LoadedModel, batch: Batch | None, numbers: Sequence[int], dtype: torch.dtype) -> Padded:
    if batch is None:
        return Padded(none := _nothing(model, dtype), none.sample)
    return _padded(model, batch, model.body, torch.tensor(numbers, device=model.device), dtype)[0]


def _nothing(model: LoadedModel, dtype: torch.dtype) -> Activations:
    x = torch.empty(0, model.n_layers, model.d_model, dtype=dtype, device=model.device)
    none = torch.empty(0, dtype=torch.long, device=model.device)
    return Activations(x, x, none.bool(), none, none, none)


@torch.no_grad()
def capture_batch(model: LoadedModel, batch: Batch) -> tuple[Activations, Float[Tensor, "B P V"]]:
    """Activations of all tokens of prepared prompts but padding, and the logits of the same forward pass."""
    sample = torch.arange(len(batch.tokens), device=model.device)
    padded, output = _padded(model, batch, model.model, sample, model.model.dtype)
    return padded.tokens(), output.logits


class ModelSource:
    """Chunks of activations captured from a model on demand: the same index always gives the same tokens.

    Examples are visited in an order drawn anew for each epoch from `seed`. A chunk is the next few hundred of them,
    or as many as fit into `chunk_bytes`, captured in batches of `batch_prompts`. In a team every process runs the model
    on its share of them, and those that look at the same tokens tell each other what they captured; `in_step`, each as
    often as the others, which a model that they hold together needs.
    """

    def __init__(
        self,
        model: LoadedModel,
        examples: Sequence[Example],
        *,
        seed: int = 0,
        chunk_prompts: int = 512,
        chunk_bytes: int = CHUNK_BYTES,
        batch_prompts: int = 64,
        team: Team = ALONE,
        in_step: bool = False,
    ):
        if not len(examples):
            raise UserError("the data set is empty; give at least one example")
        self.team, self.in_step = team, in_step
        self.model, self.examples, self.seed, self.device = model, examples, seed, model.device
        self.tokens_a_prompt = _tokens_a_prompt(model, examples)
        bytes_a_token = 2 * model.n_layers * model.d_model * model.model.dtype.itemsize
        fitting = max(1, chunk_bytes // (self.tokens_a_prompt * bytes_a_token))
        self.chunk_prompts, self.batch_prompts = min(chunk_prompts, fitting), min(batch_prompts, fitting)
        self._epoch, self._order = -1, list[int]()
        self._last: tuple[int, Activations] | None = None

    def chunk(self, index: int) -> Activations:
        """All tokens of chunk `index` but padding; the last is kept, as scales, batches and calibration share it.

        In a team, those of this process, after those of the ranks below it.
        """
        if self._last is None or self._last[0] != index:
            self._last = None  # so that two are never in memory
            parts = [_nothing(self.model, self.model.model.dtype)]
            with together(self.team.everyone):
                parts += (part.tokens() for part in self.captured(self._own_batches(index)))
            self._share_skipped()
            self._last = (index, Activations.concatenate(parts).gather(self.team.features))
        return self._last[1]

    def apart(self, crew: Crew) -> "tuple[ModelSource, Apart]":
        """The same with notes of its own about bad examples, and these; see `crosslayer.data.examples.apart`."""
        other = copy(self)
        other.examples, notes = apart(self.examples, crew)
        return other, notes

    def batches(self, index: int, n: int | None = None) -> list[list[int]]:
        """Numbers of the examples of chunk `index`, or of its first n, batch by batch."""
        return self._in_batches(index * self.chunk_prompts, self.chunk_prompts if n is None else n)

    def captured(self, batches: Iterable[list[int]], dtype: torch.dtype | None = None) -> Iterator[Padded]:
        """Activations of each batch of examples, the next one prepared meanwhile; x and y in `dtype` if given.

        Examples that turn out to be bad are left out; a batch of nothing else is empty.
        """
        everyone = self.team.everyone if self.in_step else ALONE.everyone
        prepared = one_ahead(self._prepared, batches)
        while True:
            following = None
            with together(everyone):  # one that has none would leave the others waiting inside of the model
                following = next(prepared, None)
            if following is None:
                return
            yield self._captured(*following, dtype or self.model.model.dtype)

    def _captured(self, batch: Batch | None, numbers: list[int], dtype: torch.dtype) -> Padded:
        if not self.in_step:
            return _captured(self.model, batch, numbers, dtype)
        with hearing():
            if batch is None:
                _captured(self.model, *self._some_good, dtype)
            return _captured(self.model, batch, numbers, dtype)

    def prompts(self, start: int, n: int) -> list[Example]:
        """This process's share of n examples visited from number `start` on, counted over epochs, without bad ones."""
        good: list[int] = []
        with together(self.team.everyone):
            mine = share(self.team.tokens, n)
            good = self._prepared([self._example(start + i) for i in mine])[1]
        self._share_skipped()
        return [self.examples[number] for number in good]

    def count_tokens(self, n: int) -> int:
        """Tokens of the first n examples visited, without those that turn out to be bad."""
        batch = self._prepared([self._example(i) for i in range(n)])[0]
        return 0 if batch is None else int(batch.attention.sum())

    def _share_skipped(self) -> None:
        if isinstance(self.examples, Examples):
            self.examples.skipped.spread(self.team.everyone)

    def _own_batches(self, index: int) -> list[list[int]]:
        """This process's share of a chunk; `in_step`, as many batches as anybody has, the last ones empty."""
        mine, everyone = share(self.team.everyone, self.chunk_prompts), self.team.everyone
        batches = self._in_batches(index * self.chunk_prompts + mine.start, len(mine))
        most = ceil(ceil(self.chunk_prompts / everyone.size) / self.batch_prompts) if self.in_step else 0
        return batches + [[]] * (most - len(batches))

    @cached_property
    def _some_good(self) -> tuple[Batch, list[int]]:
        """A prompt that is not bad, and its number."""
        for number in range(len(self.examples)):
            batch, numbers = self._prepared([number])
            if batch is not None:
                return batch, numbers
        raise UserError("all examples of the data set are bad")

    def _in_batches(self, start: int, n: int) -> list[list[int]]:
        chosen = [self._example(i) for i in range(start, start + n)]
        return [chosen[first : first + self.batch_prompts] for first in range(0, n, self.batch_prompts)]

    def _prepared(self, numbers: list[int]) -> tuple[Batch | None, list[int]]:
        if not numbers:
            return None, []
        return prepare_good(self.model.model, self.model.processor, self.examples, numbers)

    def _example(self, n: int) -> int:
        """Number of the n-th example visited, counted over epochs."""
        epoch, place = divmod(n, len(self.examples))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.examples), generator=generator).tolist()
        return self._order[place]


def _tokens_a_prompt(model: LoadedModel, examples: Sequence[Example], n: int = 8) -> int:
    """Length of the longest of the first few prompts that are not bad."""
    for start in range(0, len(examples), n):
        numbers = range(start, min(start + n, len(examples)))
        batch, _ = prepare_good(model.model, model.processor, examples, numbers)
        if batch is not None:
            return int(batch.attention.sum(1).max())
    raise UserError("all examples of the data set are bad")
