"""One job by many processes that torchrun started: each takes the next piece, and all see all results, in order.

Results go through the store by which the processes of torch.distributed meet. Nothing in it outlives the job, so what
an earlier one left behind can mislead nobody, and no clock is compared with another's. That two make the same piece
costs time and changes nothing.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch.distributed import Store  # pyright: ignore

from crosslayer.distributed.results import Result, decode, encode
from crosslayer.errors import UserError
from crosslayer.team import check_alike

PATIENCE = 60.0
"""Seconds after which a piece that somebody else has begun is made again by whoever has nothing left to do ..."""
TIMES = 10.0
"""... or as many times what the longest piece of his own took, if that is more."""
PAUSE = 0.02
"""Seconds between two looks at what others have done."""
PART_BYTES = 2**22
"""Length of a value in the store, which refuses more than 8 MiB."""


class Stopped(UserError):
    """Another rank has met an error."""


@dataclass(frozen=True, kw_only=True)
class Crew:
    """The processes that do one job; one alone where torchrun started no others."""

    rank: int = 0
    size: int = 1
    store: Store | None = None
    """What they meet by; None of one alone."""
    patience: float = PATIENCE
    times: float = TIMES
    _calls: Iterator[int] = field(default_factory=count, init=False, repr=False)

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.store is None

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    @property
    def restarted(self) -> bool:
        """Whether torchrun started the whole job anew after a failure."""
        return not self.alone and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"

    def map(self, make: Callable[[int], Result], n: int = sys.maxsize) -> Iterator[Result]:
        """What `make` gives of each number below n, in order and on every rank, made by whoever is free.

        All ranks must use up the results alike. A piece that does not come, as its rank has died or hangs, is made
        again by another.

        Raises:
            UserError: what `make` raised of a number, in its place and on every rank.
        """
        if self.alone:
            yield from map(make, range(n))
            return
        call, longest, number = next(self._calls), 0.0, 0
        for due in range(n):
            while not self._is_there(f"{call}/{due}"):
                if number < n:
                    number = self._add(f"{call}/next") - 1
                if number < n:
                    longest = max(longest, self._publish(f"{call}/{number}", make, number))
                else:
                    self._wait(f"{call}/{due}", max(self.patience, self.times * longest), make, due)
            yield self._take(f"{call}/{due}")

    def first(self, function: Callable[[], Any]) -> Any:
        """What rank 0 gets from `function`, as JSON brings it over; the others wait for it, and do nothing.

        Raises:
            UserError: what it raised there, on every rank.
        """
        if self.alone:
            return function()
        key = str(next(self._calls))
        if self.leads:
            self._publish(key, lambda _: {"value": function()}, 0)
        return self._take(key)["value"]

    def agree(self, facts: Callable[[], Mapping[str, Any]]) -> None:
        """Make sure that all ranks are at work on the same: that `facts`, JSON values, are the same on all of them.

        Raises:
            UserError: as `check_alike` does, on every rank.
        """
        if self.alone:
            return
        call = next(self._calls)
        self._set(f"{call}/{self.rank}", json.dumps(facts()).encode())
        self.first(lambda: check_alike([json.loads(self._get(f"{call}/{rank}")) for rank in range(self.size)]))

    def dismiss(self) -> None:
        """End all processes but rank 0, which writes down what came out.

        Raises:
            SystemExit: on the others.
        """
        if not self.leads:
            sys.exit(0)

    def stop(self, message: str) -> bool:
        """Tell the others of an error; whether this rank was the first to do so."""
        if self.store is None:
            return True
        first = self._add("stopping") == 1
        if first:
            self.store.set("stop", message)
        return first

    def leave(self) -> None:
        """Part; rank 0 goes last, as it keeps the store where torchrun does not."""
        if self.alone:
            return
        self._add("left")
        end = time.monotonic() + self.patience
        while self.leads and self._there.add("left", 0) < self.size and time.monotonic() < end:
            time.sleep(PAUSE)

    def _wait(self, key: str, patience: float, make: Callable[[int], Result], number: int) -> None:
        """Wait for another's result; when patience ends, one of those who wait makes it."""
        began, waited = time.monotonic(), 0
        while not self._is_there(key):
            periods = int((time.monotonic() - began) / patience)
            if periods > waited and self._add(f"{key}/again/{periods}") == 1:
                self._publish(key, make, number)
            waited = periods
            time.sleep(PAUSE)

    def _publish(self, key: str, make: Callable[[int], Result], number: int) -> float:
        """Let all have what `make` gives, or the error that it raises; the seconds that it took."""
        began = time.monotonic()
        try:
            result = encode(make(number))
        except UserError as error:
            result = encode({"error": str(error)})
        took = time.monotonic() - began
        self._set(key, result)
        return took

    def _take(self, key: str) -> Result:
        """A result, which is gone when the last has taken it."""
        result = decode(self._get(key))
        if self._add(f"{key}/taken") == self.size:
            for name in (*self._parts(key), f"{key}/taken", key):
                self._there.delete_key(name)
        if result.keys() == {"error"}:
            raise UserError(result["error"])
        return result

    def _set(self, key: str, data: bytes) -> None:
        """Put a value of any length under a key, which is there once all of it is; the first that comes stays."""
        n = -(-len(data) // PART_BYTES)
        for i in range(n):
            self._there.set(f"{key}/{self.rank}/{i}", data[i * PART_BYTES : (i + 1) * PART_BYTES])  # pyright: ignore
        self._there.compare_set(key, "", f"{self.rank} {n}")

    def _get(self, key: str) -> bytes:
        """What is under a key, once it is there."""
        while not self._is_there(key):
            time.sleep(PAUSE)
        return b"".join(map(self._there.get, self._parts(key)))

    def _parts(self, key: str) -> list[str]:
        """Where the parts of a value are that is there."""
        rank, n = self._there.get(key).decode().split()
        return [f"{key}/{rank}/{i}" for i in range(int(n))]

    def _is_there(self, key: str) -> bool:
        if self._there.check(["stop"]):
            raise Stopped(self._there.get("stop").decode())
        return self._there.check([key])

    def _add(self, key: str) -> int:
        return self._there.add(key, 1)

    @property
    def _there(self) -> Store:
        assert self.store is not None
        return self.store


ALONE = Crew()
"""A process that has the whole job to itself."""
