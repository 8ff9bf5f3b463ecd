"""A job shared by processes: the same results in the same order on every rank, and no piece is made twice."""

from itertools import islice

import pytest
import torch

from crosslayer.distributed.crew import ALONE
from crosslayer.distributed.joining import joined


def squares(n: int) -> list[int]:
    """The numbers below n that were squared here."""
    made = []

    def make(i: int):
        made.append(i)
        return {"square": torch.tensor(i) ** 2, "number": (i,)}

    with joined() as here:
        found = [(r["square"].item(), *r["number"]) for r in here.map(make, n)]
    assert found == [(i * i, i) for i in range(n)]
    return made


@pytest.mark.parametrize("n", [2, 4])
def test_every_rank_sees_all_results_in_order_and_each_is_made_once(ranks, n):
    made = ranks.run(n, squares, 23)
    assert sorted(number for some in made for number in some) == list(range(23))


def test_one_alone_makes_each_when_it_is_asked_for():
    made = []
    found = ALONE.map(lambda i: {"made": made.append(i)})
    assert made == []
    next(found), next(found)
    assert made == [0, 1]


def test_endless_work_ends_where_all_have_enough(ranks):
    assert ranks.run(2, enough) == [list(range(5))] * 2


def enough() -> list[int]:
    with joined() as here:
        return [r["i"] for r in islice(here.map(lambda i: {"i": i}), 5)]


def test_large_results_come_whole(ranks):
    assert ranks.run(2, large) == [True] * 2


def large() -> bool:
    with joined() as here:
        (found,) = here.map(lambda i: {"bytes": torch.arange(2**22 + 3).bitwise_and(255).byte()}, 1)
    return torch.equal(found["bytes"], torch.arange(2**22 + 3).bitwise_and(255).byte())
