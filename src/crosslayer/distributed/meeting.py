"""The ranks of one life of a job agree on a name for it.

torchrun keeps one key-value store over all its restarts, in which a rank would find the addresses that ranks of an
earlier life left (seen in torch 2.9). Under a name that is new in every life nothing is left over. torchrun's own
number of restarts will not do: it differs between machines, as each counts its own failures.
"""

import time
from uuid import uuid4

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

PAUSE = 0.02
"""Seconds between two looks at what the others say."""


def meet(store: Store, rank: int, size: int, timeout: float) -> str:
    """A name that all ranks of this life, and none of another, get.

    Everybody says a word of its own, made up anew. The first rank puts those that it hears together as a name, again
    and again, as some may be left over; a name is good once all have said that their own word is in it.

    Raises:
        RuntimeError: when the others do not come in time.
    """
    word, end = uuid4().hex, time.monotonic() + timeout
    _say(store, f"word/{rank}", word)
    while time.monotonic() < end:
        if rank == 0:
            name = " ".join(_heard(store, f"word/{r}") for r in range(size))
            _say(store, "name", name)
            if all(_heard(store, f"good/{r}") == name for r in range(1, size)):
                _say(store, "agreed", name)
                return name
        else:
            agreed, name = _heard(store, "agreed"), _heard(store, "name")
            if word in agreed:
                return agreed
            if word in name:
                _say(store, f"good/{rank}", name)
        time.sleep(PAUSE)
    raise RuntimeError(f"not all {size} ranks came within {timeout:.0f} s")


def _say(store: Store, key: str, text: str) -> None:
    store.set(f"crosslayer/{key}", text)


def _heard(store: Store, key: str) -> str:
    """What was said under a key; nothing where nobody has yet."""
    key = f"crosslayer/{key}"
    return store.get(key).decode() if store.check([key]) else ""
