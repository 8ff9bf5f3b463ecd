"""Work done one step ahead: the results of `map`, in order, errors included."""

import threading

import pytest

from crosslayer.activations.ahead import one_ahead


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_results_come_in_order(n):
    assert list(one_ahead(lambda i: i * i, range(n))) == [i * i for i in range(n)]


def test_the_next_item_is_begun_while_one_is_in_use_and_no_further():
    begun = [threading.Event() for _ in range(4)]
    results = one_ahead(lambda i: begun[i].set(), range(4))
    next(results)
    assert begun[1].wait(5)
    assert not begun[2].is_set()
    results.close()


def test_an_error_reaches_whoever_waits_for_its_item():
    results = one_ahead(lambda i: 1 // (2 - i), range(4))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
