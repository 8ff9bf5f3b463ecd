"""The tokens of a batch that one process looks at."""

from dataclasses import dataclass

import torch

from crosslayer.activations.record import Activations
from crosslayer.team import Group, Places


@dataclass(frozen=True)
class Part:
    """Some tokens of a batch, in the batch's order; all of them where no other process has any."""

    tokens: Activations
    places: Places

    @staticmethod
    def of(tokens: "Activations | Part") -> "Part":
        """A batch that is all here, unless it is said to be a part already."""
        return tokens if isinstance(tokens, Part) else Part(tokens, Places.whole(len(tokens)))

    def split(self, n: int) -> "list[Part]":
        """The batch in up to n batches, none of them empty; each process has its tokens of each."""
        n, total, numbers = min(n, self.places.total), self.places.total, self.places.numbers
        if n <= 1:
            return [self]
        parts = []
        for rows in torch.arange(total).tensor_split(n):
            first, last = torch.searchsorted(numbers, torch.tensor([rows[0], rows[-1] + 1])).tolist()
            places = Places(numbers[first:last] - rows[0], len(rows))
            parts.append(Part(self.tokens[first:last], places))
        return parts

    def whole(self, group: Group) -> Activations:
        """All tokens of the batch, in order, from the processes of a group that have them."""
        if group.size == 1:
            return self.tokens
        order = torch.cat(group.gather(self.places.numbers)).argsort()
        return self.tokens.gather(group)[order.to(self.tokens.x.device)]
