"""Random weights that come out the same whoever holds which part of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 4096
"""Rows drawn at a time."""


@dataclass(frozen=True)
class Draw:
    """Draws for a process that holds some rows and columns of every parameter.

    All are drawn, a block of rows at a time, and those of others forgotten, so that nobody ever holds a whole layer.
    """

    generator: torch.Generator
    rows: range
    """Those that are kept, on the first axis."""
    n_rows: int
    """All that there are."""
    columns: range
    """Those that are kept, on the last axis."""
    n_columns: int
    """All that there are."""

    @torch.no_grad()
    def __call__(self, parameter: Tensor, bound: float) -> None:
        """Fill a parameter of the rows and columns that are kept from U(+-bound)."""
        columns = slice(self.columns.start, self.columns.stop)
        for start in range(0, self.n_rows, BLOCK):
            rows = range(start, min(start + BLOCK, self.n_rows))
            block = torch.empty(len(rows), *parameter.shape[1:-1], self.n_columns, dtype=parameter.dtype)
            block.uniform_(-bound, bound, generator=self.generator)
            first, last = max(rows.start, self.rows.start), min(rows.stop, self.rows.stop)
            if first < last:
                here = slice(first - self.rows.start, last - self.rows.start)
                parameter[here] = block[first - start : last - start, ..., columns].to(parameter.device)
