"""Ranks on a mesh: who stands where, and who is in a group with whom."""

import pytest
import torch
import torch.distributed as dist

from crosslayer import UserError
from crosslayer.distributed.mesh import join


def place(n_feature: int) -> tuple[tuple[int, ...], float, float]:
    mesh = join(n_feature)
    sums = []
    for group in (mesh.data, mesh.feature):
        total = torch.tensor(float(mesh.rank))
        dist.all_reduce(total, group=group)
        sums.append(total.item())
    return (mesh.rank, mesh.size, mesh.n_data, mesh.n_feature, mesh.data_rank, mesh.feature_rank), *sums


def test_neighbours_share_features_and_ranks_of_one_column_share_the_data_axis(ranks):
    assert ranks.run(4, place, 2) == [
        ((0, 4, 2, 2, 0, 0), 0 + 2, 0 + 1),
        ((1, 4, 2, 2, 0, 1), 1 + 3, 0 + 1),
        ((2, 4, 2, 2, 1, 0), 0 + 2, 2 + 3),
        ((3, 4, 2, 2, 1, 1), 1 + 3, 2 + 3),
    ]


def test_a_mesh_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 processes cannot be split into groups of 3"):
        join(3)
