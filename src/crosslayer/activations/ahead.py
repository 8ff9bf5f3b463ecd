"""Work done one step ahead of whoever waits for it."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def one_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map`, with the next item's result worked out in a thread while the last one is in use."""
    with ThreadPoolExecutor(1) as worker:
        following = None
        for item in items:
            current, following = following, worker.submit(function, item)
            if current is not None:
                yield current.result()
        if following is not None:
            yield following.result()
