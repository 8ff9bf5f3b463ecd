"""Chunks captured by another process, one ahead: while this one trains on a chunk, the model runs for the next."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from safetensors.torch import load, save

from crosslayer.activations.capture import ModelSource
from crosslayer.activations.record import Activations
from crosslayer.data.examples import Example, Examples, hear
from crosslayer.data.skipped import Apart
from crosslayer.memory import keep_freed_memory
from crosslayer.models.load import LoadedModel
from crosslayer.processes import working

Load = Callable[[], tuple[LoadedModel, Sequence[Example]]]
"""What another process has the same model and data set from."""


class Elsewhere:
    """The chunks of a source of a process alone; two of them are in memory at a time."""

    def __init__(self, source: ModelSource, pool: ProcessPoolExecutor):
        self.source, self.team, self.device = source, source.team, source.device
        self.tokens_a_prompt, self.prompts = source.tokens_a_prompt, source.prompts
        self._pool = pool
        self._last: tuple[int, Activations] | None = None
        self._coming: tuple[int, Future] | None = None

    def chunk(self, index: int) -> Activations:
        """See `ModelSource.chunk`; what the other process says of bad examples is heard here."""
        if self._last is None or self._last[0] != index:
            self._last = None
            if self._coming is None or self._coming[0] != index:
                self._ask(index)
            assert self._coming is not None
            columns, looks = self._coming[1].result()
            self._ask(index + 1)
            hear(self.source.examples, looks)
            self._last = (index, Activations(**{name: t.to(self.device) for name, t in load(columns).items()}))
        return self._last[1]

    def _ask(self, index: int) -> None:
        self._coming = (index, self._pool.submit(_chunk, index))


@contextmanager
def elsewhere(source: ModelSource, load: Load) -> Iterator[Elsewhere]:
    """A source whose chunks another process captures, until this ends.

    Raises:
        UserError: as capturing does, and when the other process dies.
    """
    with working(1, _begin, load, source.seed, source.chunk_prompts, source.batch_prompts) as pool:
        yield Elsewhere(source, pool)


_here: list[ModelSource] = []
"""Of the other process: its source."""


def _begin(load: Load, seed: int, chunk_prompts: int, batch_prompts: int) -> None:
    keep_freed_memory()
    model, data = load()
    _here.append(ModelSource(model, data, seed=seed, chunk_prompts=chunk_prompts, batch_prompts=batch_prompts))


def _chunk(index: int) -> tuple[bytes, list[Any]]:
    """The columns of a chunk, and what was noted of its examples; see `Apart`."""
    source, notes = _here[0], Apart()
    if isinstance(source.examples, Examples):
        source.examples = replace(source.examples, skipped=notes)
    return save(vars(source.chunk(index))), notes.looks
