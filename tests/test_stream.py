"""The stream: every usable token once a chunk, in an order that any place can be resumed from."""

from itertools import islice

import pytest
import torch

from crosslayer.activations.record import Activations
from crosslayer.activations.usable import usable
from crosslayer.training.stream import ChunkSource, Place, shuffled_batches, usable_tokens
from making import random_activations


class Chunks:
    """Chunks of different sizes whose tokens have numbers of their own."""

    def chunk(self, index: int) -> Activations:
        n = (50, 37, 64)[index % 3]
        activations = random_activations(n, 2, 4, seed=index)
        activations.x[5] *= 1000  # an outlier
        return Activations(**{**vars(activations), "sample": 1000 * index + torch.arange(n)})


def take(n: int, place: Place | None = None, seed: int = 0) -> list:
    return list(islice(shuffled_batches(Chunks(), 10, seed, place or Place()), n))


def tokens(batches) -> list[int]:
    return torch.cat([batch.batch.tokens.sample for batch in batches]).tolist()


def test_the_source_is_one():
    assert isinstance(Chunks(), ChunkSource)


def test_any_place_continues_the_uninterrupted_stream():
    whole = take(20)
    for done in range(1, 12):
        resumed = take(20 - done, whole[done - 1].following)
        assert tokens(resumed) == tokens(whole[done:])
        assert [batch.following for batch in resumed] == [batch.following for batch in whole[done:]]


def test_a_chunk_loses_only_what_is_not_usable():
    chunk = Chunks().chunk(0)
    batches = [batch for batch in take(8) if batch.batch.tokens.sample[0] < 1000]
    assert sorted(tokens(batches)) == chunk.sample[usable(chunk).keep].tolist()
    assert {len(batch.batch.tokens) for batch in batches} <= {10, 11}
    assert batches[-1].following == Place(chunk=1)


def test_batches_carry_their_tokens_whole():
    chunk, batch = Chunks().chunk(0), take(1)[0].batch.tokens
    rows = chunk[batch.sample]
    assert all(torch.equal(getattr(rows, name), value) for name, value in vars(batch).items())


def test_what_is_left_out_is_counted_once_a_chunk():
    batches = take(8)
    of_first = [batch for batch in batches if batch.batch.tokens.sample[0] < 1000]
    assert sum(batch.n_first for batch in of_first) == 7
    assert sum(batch.n_outliers for batch in of_first) == 1
    assert sum(len(batch.batch.tokens) for batch in of_first) == 50 - 7 - 1


def test_seeds_and_chunks_have_orders_of_their_own():
    assert tokens(take(4, seed=0)) == tokens(take(4, seed=0))
    assert tokens(take(4, seed=0)) != tokens(take(4, seed=1))
    assert sorted(tokens(take(4, seed=0))) == sorted(tokens(take(4, seed=1)))
    orders = [[number % 1000 for number in tokens(take(4, Place(chunk)))] for chunk in (0, 3)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


@pytest.mark.parametrize("n", [1, 30, 100])
def test_usable_tokens_follow_the_place(n):
    found = usable_tokens(Chunks(), Place(1, 2), 10, n, seed=0)
    assert n <= len(found) < n + 12
    batches = take(11, Place(1, 2))
    assert found.sample.tolist() == tokens(batches)[: len(found)]
