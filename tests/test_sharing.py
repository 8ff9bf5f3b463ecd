"""Two ways to share a coder: the same gradients, and what each of them sends, counted."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from crosslayer import AuxK, BatchTopK, CrossLayerTranscoder, DeadPenalty, JointTopK, JumpReLU, ReLU, TopK, Wiring
from crosslayer.coders.codes import SparseCodes
from crosslayer.coders.gathered import gathered
from crosslayer.coders.pattern import Pattern
from crosslayer.coders.sharing import ByColumns, ByRows, Sharing, better
from crosslayer.coders.sparsity import Sparsity, Thresholds
from crosslayer.coders.sparsity.topk import DIGIT
from crosslayer.distributed.group import team_of
from crosslayer.distributed.mesh import join
from crosslayer.distributed.sharding import whole
from crosslayer.team import Group, Team
from crosslayer.training.objective import Reconstruction
from crosslayer.training.part import Part
from making import random_activations

L, D, F, N, AUX_SHARE = 3, 8, 16, 40, 0.25
M = int(N * AUX_SHARE)


class Counting:
    """A group that counts its calls and the bytes of what they are about."""

    def __init__(self, group: Group):
        self.group, self.size, self.rank, self.calls = group, group.size, group.rank, Counter[tuple[str, int]]()

    def sum(self, part: Tensor) -> Tensor:
        self.calls["all-reduce", part.nbytes] += 1
        return self.group.sum(part)

    def smallest(self, part: Tensor) -> Tensor:
        self.calls["all-reduce", part.nbytes] += 1
        return self.group.smallest(part)

    def gather(self, rows: Tensor) -> list[Tensor]:
        parts = self.group.gather(rows)
        self.calls["all-gather", self.size * max(part.nbytes for part in parts)] += 1  # shorter ones are filled up
        return parts

    def sum_back(self, parts: Sequence[Tensor]) -> Tensor:
        self.calls["reduce-scatter", sum(part.nbytes for part in parts)] += 1
        return self.group.sum_back(parts)

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        self.group.sum_gradients(parameters)


def step(n_feature: int, sparsity: Sparsity, way: type[Sharing]) -> dict[str, Any]:
    """Loss and gradients of one pass forward and back, the calls that it made, and the pairs that this rank told."""
    team = team_of(join(n_feature))
    group = Counting(team.features)
    team = Team(team.tokens, group, group)
    coder = CrossLayerTranscoder(Wiring.full(L), D, F, sparsity, team=team, sharing=way).initialise(1)
    dead = torch.arange(F).lt(6).expand(L, F)[:, coder.held.start : coder.held.stop]
    objective = Reconstruction(torch.ones(L), AuxK(k=3, token_share=AUX_SHARE), DeadPenalty())
    tokens = random_activations(N, L, D)
    outcome = objective(coder, Part.of(tokens), 1.0, dead)
    outcome.loss.backward()
    calls = Counter(group.calls)
    encoded = coder.encode_for_training(tokens.x, 1.0)
    codes = [*encoded.codes, *objective.auxk.codes(coder, encoded, dead)]
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    found = {"terms": outcome.detached().terms, "calls": calls, "pairs": sum(len(part.pairs()[0]) for part in codes)}
    return found | {"gradients": {name: p.detach() for name, p in whole(coder).named_parameters()}}


@pytest.mark.parametrize(
    ("P", "sparsity", "n_bytes"),
    [(2, BatchTopK(4), 8 * 2**DIGIT), (4, JointTopK(4), 4 * 4 * 4 * N)],
    ids=["histograms", "candidates"],
)
def test_what_is_sent_for_a_step_is_one_dense_sum_or_pairs_and_their_gradients(ranks, P, sparsity, n_bytes):
    rows, columns = (ranks.run(P, step, P, sparsity, way) for way in (ByRows, ByColumns))
    assert_close(columns[0]["terms"], rows[0]["terms"])
    assert_close(columns[0]["gradients"], rows[0]["gradients"])
    assert columns[0]["terms"]["auxk"] > 0
    pairs = [found["pairs"] for found in columns]
    assert 4 * N < sum(pairs) <= 4 * N + 3 * M
    by_rows, by_columns = rows[0]["calls"], columns[0]["calls"]
    assert max(size for _, size in by_rows & by_columns) == n_bytes  # of the selection
    assert by_rows - by_columns == {("all-reduce", 4 * (N + M) * L * D): 1}
    assert by_columns - by_rows == {
        ("all-gather", 8 * P * max(pairs)): 1,
        ("reduce-scatter", 4 * sum(pairs)): 1,
        ("reduce-scatter", 4 * L * F): 1,  # lengths of write vectors, by which features are chosen
        ("all-reduce", 4 * L): 3,  # squared errors of each layer, and for AuxK those and their scale
    }


def test_columns_are_for_what_selects():
    ways = [better(sparsity) for sparsity in (TopK(2), BatchTopK(2), Thresholds(torch.zeros(1, 1)))]
    assert ways == [ByColumns] * 3
    assert [better(sparsity) for sparsity in (ReLU(), JumpReLU())] == [ByRows] * 2


def far(n_tokens: int, n_features: int) -> list[Any]:
    """What all know of a pair that each rank has at the end of the last of 2 sources."""
    group = team_of(join(2)).features
    held = n_features // 2
    none = SparseCodes(Pattern.from_pairs(*torch.empty(2, 0, dtype=torch.long), n_tokens, held), torch.empty(0))
    last = Pattern.from_pairs(torch.tensor([n_tokens - 1]), torch.tensor([held - 1]), n_tokens, held)
    own = torch.tensor([float(group.rank)], requires_grad=True)
    found = gathered([none, SparseCodes(last, own)], n_features, group)
    (found[1].values * torch.tensor([2.0, 3.0])).sum().backward()
    return [[part.tolist() for part in codes.pairs()] for codes in found] + [own.grad.tolist()]


@pytest.mark.parametrize("n_features", [8, 2**30])
def test_pairs_are_told_however_many_there_may_be(ranks, n_features):
    pairs = [[], [], []], [[4, 4], [n_features // 2 - 1, n_features - 1], [0.0, 1.0]]
    assert ranks.run(2, far, 5, n_features) == [[*pairs, [4.0]], [*pairs, [6.0]]]
