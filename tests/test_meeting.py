"""Ranks that meet agree on a name, and never on that of an earlier life whose words are still in the store."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from crosslayer.distributed.meeting import meet


def test_every_life_has_a_name_of_its_own_whoever_died_in_the_one_before():
    store, names = HashStore(), set()
    with ThreadPoolExecutor(3) as ranks:
        for _ in range(4):
            found = set(ranks.map(lambda rank: meet(store, rank, 3, 10.0), range(3)))
            assert len(found) == 1
            names |= found
            with pytest.raises(RuntimeError, match="not all 3 ranks came"):
                meet(store, 1, 3, 0.1)  # of a life that the others never begin
    assert len(names) == 4
