"""Running a frozen model on examples and keeping what its MLPs read and write."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.activations.record import Activations
from crosslayer.data.examples import Example
from crosslayer.errors import UserError
from crosslayer.models.hooks import recording
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch, prepare

CHUNK_BYTES = 2**30
"""Captured activations that are held at a time, at most."""


@torch.no_grad()
def capture_all(model: LoadedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """What every MLP read and wrote, as two tensors [B, P, L, D], padding included."""
    x, y, _ = _recorded(model, batch, model.body)
    return x, y


def _recorded(model: LoadedModel, batch: Batch, forward: Any) -> tuple[Tensor, Tensor, Any]:
    """What every MLP read and wrote in a forward pass, and what that gave."""
    shape = (*batch.tokens.shape, model.n_layers, model.d_model)
    x = torch.empty(shape, dtype=model.model.dtype, device=model.device)
    y = torch.empty_like(x)

    def keep(store: Tensor):
        return lambda layer, tensor: store[:, :, layer].copy_(tensor)

    with recording(model.sites, keep(x), keep(y)):
        output = forward(**batch.inputs, use_cache=False)
    return x, y, output


def _unpadded(batch: Batch, x: Tensor, y: Tensor, sample: Tensor) -> Activations:
    keep = batch.attention
    return Activations(
        x[keep],
        y[keep],
        batch.image[keep],
        batch.position[keep],
        sample[:, None].expand_as(keep)[keep],
    )


def capture(model: LoadedModel, examples: Sequence[Example], numbers: Sequence[int]) -> Activations:
    """Activations of all tokens of the examples but padding, first positions included.

    `numbers` are the examples' own in their data set.
    """
    batch = prepare(model.model, model.processor, examples)
    x, y = capture_all(model, batch)
    return _unpadded(batch, x, y, torch.tensor(numbers, device=x.device))


@torch.no_grad()
def capture_batch(model: LoadedModel, batch: Batch) -> tuple[Activations, Float[Tensor, "B P V"]]:
    """Activations of all tokens of prepared prompts but padding, and the logits of the same forward pass."""
    x, y, logits = _recorded(model, batch, model.model)
    return _unpadded(batch, x, y, torch.arange(len(x), device=x.device)), logits.logits


class ModelSource:
    """Chunks of activations captured from a model on demand: the same index always gives the same tokens.

    Examples are visited in an order drawn anew for each epoch from `seed`. A chunk is the next few hundred of them,
    or as many as fit into `chunk_bytes`, captured in batches of `batch_prompts`.
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
    ):
        if not len(examples):
            raise UserError("the data set is empty; give at least one example")
        self.model, self.examples, self.seed = model, examples, seed
        self.tokens_a_prompt = _tokens_a_prompt(model, examples)
        bytes_a_token = 2 * model.n_layers * model.d_model * model.model.dtype.itemsize
        fitting = max(1, chunk_bytes // (self.tokens_a_prompt * bytes_a_token))
        self.chunk_prompts, self.batch_prompts = min(chunk_prompts, fitting), min(batch_prompts, fitting)
        self._epoch, self._order = -1, list[int]()

    def chunk(self, index: int) -> Activations:
        """All tokens of chunk `index` but padding."""
        return Activations.concatenate(list(self.captured(index)))

    def captured(self, index: int) -> Iterator[Activations]:
        """The same, batch by batch."""
        chosen = [self._example(n) for n in range(index * self.chunk_prompts, (index + 1) * self.chunk_prompts)]
        for start in range(0, len(chosen), self.batch_prompts):
            numbers = chosen[start : start + self.batch_prompts]
            yield capture(self.model, [self.examples[n] for n in numbers], numbers)

    def prompts(self, start: int, n: int) -> list[Example]:
        """The examples visited from number `start` on, counted over epochs."""
        return [self.examples[self._example(i)] for i in range(start, start + n)]

    def _example(self, n: int) -> int:
        """Number of the n-th example visited, counted over epochs."""
        epoch, place = divmod(n, len(self.examples))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.examples), generator=generator).tolist()
        return self._order[place]


def _tokens_a_prompt(model: LoadedModel, examples: Sequence[Example], n: int = 8) -> int:
    """Length of the longest of the first few prompts."""
    batch = prepare(model.model, model.processor, [examples[i] for i in range(min(n, len(examples)))])
    return int(batch.attention.sum(1).max())
