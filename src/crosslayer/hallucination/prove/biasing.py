"""A constant added to the logits of some tokens: the plainest way to say less, which an edit must beat.

Axes: V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from crosslayer.models.load import LoadedModel

LIMIT = 8.0
"""Logits within which a bias is looked for."""
HALVINGS = 8
"""Of that range."""


@contextmanager
def biased(model: LoadedModel, tokens: Collection[int], bias: float) -> Iterator[None]:
    """Inside, the logits of these token ids are higher by `bias`, at every position."""

    def hook(_: nn.Module, __: tuple, logits: Tensor) -> Tensor:
        added = logits.new_zeros(logits.shape[-1])
        added[sorted(tokens)] = bias
        return logits + added

    head = model.model.get_output_embeddings()
    assert head is not None, "a language model has a head"
    handle = head.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def bias_for(figure: Callable[[float], float], wanted: float) -> float:
    """The bias within +- `LIMIT` at which a monotone figure is nearest to the one wanted, by bisection.

    Args:
        figure: of a bias; rising or falling.
        wanted: what it should be.
    """
    low, high = -LIMIT, LIMIT
    rises = figure(high) >= figure(low)
    tried = {}
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried[middle] = figure(middle)
        if (tried[middle] < wanted) == rises:
            low = middle
        else:
            high = middle
    return min(tried, key=lambda bias: (abs(tried[bias] - wanted), abs(bias)))
