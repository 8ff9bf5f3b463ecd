"""Processes that train one transcoder together, as the code sees them that computes: sums over a group of them.

A process alone is a team of one, for which all of this is the identity; `crosslayer.distributed` has teams of several.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from crosslayer.errors import UserError


@runtime_checkable
class Group(Protocol):
    """Processes that tell each other what they hold; each of them must make the same calls in the same order."""

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    @property
    def rank(self) -> int:
        """Place of this one among them."""
        ...

    def sum(self, part: Tensor) -> Tensor:
        """The sum of all parts, on all of them; a gradient goes back to each part as it is."""
        ...

    def smallest(self, part: Tensor) -> Tensor:
        """The smallest of all parts, entry by entry."""
        ...

    def gather(self, rows: Tensor) -> list[Tensor]:
        """Everybody's rows, by rank; their numbers may differ."""
        ...

    def sum_back(self, parts: Sequence[Tensor]) -> Tensor:
        """The way back from `gather`: the sum, over all, of what each has as the part of this process."""
        ...

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Give these parameters, in place, the sum of everybody's gradients."""
        ...


class Alone:
    """The group of a process that has no others."""

    size, rank = 1, 0

    def sum(self, part: Tensor) -> Tensor:
        """See `Group.sum`."""
        return part

    def smallest(self, part: Tensor) -> Tensor:
        """See `Group.smallest`."""
        return part

    def gather(self, rows: Tensor) -> list[Tensor]:
        """See `Group.gather`."""
        return [rows]

    def sum_back(self, parts: Sequence[Tensor]) -> Tensor:
        """See `Group.sum_back`."""
        return parts[0]

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """See `Group.sum_gradients`."""


@dataclass(frozen=True)
class Team:
    """The groups that a process belongs to."""

    tokens: Group
    """Those that hold the same features and look at other tokens."""
    features: Group
    """Those that look at the same tokens and hold other features."""
    everyone: Group
    """All, those of one `features` group next to each other."""

    def on_the_same_tokens(self) -> "Team":
        """The team for tokens that all processes look at."""
        return Team(_ALONE, self.features, self.features)


_ALONE = Alone()
ALONE = Team(_ALONE, _ALONE, _ALONE)
"""The team of a process that has no others."""


@dataclass(frozen=True)
class Places:
    """Where the tokens that a process looks at stand in a batch that its team shares."""

    numbers: Int[Tensor, " N"]
    """The place of each in the whole batch, ascending; in main memory."""
    total: int
    """Tokens of the whole batch."""

    @staticmethod
    def whole(n: int) -> "Places":
        """Of a batch that is all here."""
        return Places(torch.arange(n), n)

    def first(self, share: float) -> int:
        """How many of the first tokens here are among the first `share` of the batch, which are one at least."""
        return int((self.numbers < self.n_first(share)).sum())

    def n_first(self, share: float) -> int:
        """Tokens in the first `share` of the batch."""
        return max(1, round(share * self.total))


def share(group: Group, n: int) -> range:
    """Which of n things fall to this process, if each takes as many of those next to each other."""
    return shares(group.size, n)[group.rank]


def shares(size: int, n: int) -> list[range]:
    """Which of n things fall to each of so many processes."""
    return [range(rank * n // size, (rank + 1) * n // size) for rank in range(size)]


def count(group: Group, n: int) -> int:
    """The sum of a number over a group."""
    return int(group.sum(torch.tensor(n)))


class LostError(RuntimeError):
    """Another process of the team is gone or does not answer."""


@contextmanager
def together(group: Group) -> Iterator[None]:
    """What all processes of a group do, each for itself; they leave it together, or with the same error.

    Raises:
        UserError: as `agree` does.
    """
    error = None
    try:
        yield
    except UserError as found:
        error = found
    agree(group, error)


def agree(group: Group, error: UserError | None) -> None:
    """Raise, on all processes of a group, the error that the first of those has that have one.

    Raises:
        UserError: that error.
    """
    for rank, text in enumerate(tell(group, "" if error is None else str(error))):
        if text:
            raise error if error is not None and rank == group.rank else UserError(text)


def check_alike(facts: Sequence[Mapping[str, Any]]) -> None:
    """Refuse processes that were given different things.

    Args:
        facts: of each process, by rank: JSON values by what to call them.

    Raises:
        UserError: naming what differs, on the first rank where it does.
    """
    first, *others = facts
    for rank, found in enumerate(others, 1):
        for name, value in found.items():
            if value != first.get(name):
                raise UserError(
                    f"rank {rank} has another {name.removeprefix('the ')} than rank 0{_shown(value, first.get(name))}"
                )


def tell(group: Group, value: Any) -> list[Any]:
    """What each process of a group has to say, by rank: JSON values; empty ones cost a single small message."""
    text = json.dumps(value).encode() if value else b""
    heard = group.gather(torch.tensor(list(text), dtype=torch.uint8))
    return [json.loads(bytes(words.tolist())) if len(words) else type(value)() for words in heard]


def _shown(value: Any, wanted: Any) -> str:
    """The two values; of records, those of the first entry that differs."""
    name = ""
    if isinstance(value, dict) and isinstance(wanted, dict):
        entry = min(name for name in value | wanted if value.get(name) != wanted.get(name))
        name, value, wanted = f"{entry} is ", value.get(entry), wanted.get(entry)
    return f": {name}{value}, not {wanted}; give all ranks the same"
