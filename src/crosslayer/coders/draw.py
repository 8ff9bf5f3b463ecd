"""Random weights that come out the same whoever holds which rows of them."""

import torch
from torch import Tensor

BLOCK = 4096
"""Rows drawn at a time."""


class Draw:
    """Draws from one generator, for a process that holds some rows of every parameter.

    All rows are drawn, a block at a time, and those of others forgotten, so that nobody ever holds a whole layer.

    Args:
        seed: of the generator.
        held: the rows that are kept.
        n_rows: all that there are.
    """

    def __init__(self, seed: int, held: range, n_rows: int):
        self.generator, self.held, self.n_rows = torch.Generator().manual_seed(seed), held, n_rows

    @torch.no_grad()
    def __call__(self, parameter: Tensor, bound: float) -> None:
        """Fill a parameter, whose first axis is that of the rows held, from U(+-bound)."""
        for start in range(0, self.n_rows, BLOCK):
            rows = range(start, min(start + BLOCK, self.n_rows))
            block = torch.empty(len(rows), *parameter.shape[1:], dtype=parameter.dtype)
            block.uniform_(-bound, bound, generator=self.generator)
            first, last = max(rows.start, self.held.start), min(rows.stop, self.held.stop)
            if first < last:
                here = slice(first - self.held.start, last - self.held.start)
                parameter[here] = block[first - start : last - start].to(parameter.device)
