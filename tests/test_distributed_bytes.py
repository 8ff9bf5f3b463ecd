"""What feature ranks tell each other in a step: reconstructions and k scores a token, and next to nothing else."""

from typing import Any
from unittest.mock import patch

import torch

from crosslayer import AuxK, JointTopK, TrainConfig, Wiring
from crosslayer.distributed.group import RankGroup, team_of
from crosslayer.distributed.mesh import join
from crosslayer.training.scales import estimate_scales
from crosslayer.training.trainer import Trainer
from making import random_activations

L, D, F, N, K = 3, 8, 64, 512, 4


def counted() -> tuple[int, int]:
    """Bytes that a step sums, and bytes that it gathers from each rank."""
    team = team_of(join(2))
    settings = {"sparsity": JointTopK(K, anneal_share=0.0), "auxk": AuxK(coefficient=0), "d_transcoder": F}
    scales = estimate_scales(random_activations(200, L, D))
    coach = Trainer(TrainConfig(wiring=Wiring.full(L), **settings), scales, team=team)
    reduce, gather = RankGroup.reduce, RankGroup._all
    told = [0, 0]

    def reduced(self: RankGroup, part: torch.Tensor, *how: Any) -> None:
        told[0] += part.nbytes
        reduce(self, part, *how)

    def gathered(self: RankGroup, part: torch.Tensor) -> list[torch.Tensor]:
        told[1] += part.nbytes
        return gather(self, part)

    with patch.object(RankGroup, "reduce", reduced), patch.object(RankGroup, "_all", gathered):
        coach.step(random_activations(N, L, D))
    return told[0], told[1]


def test_a_step_tells_reconstructions_and_candidates_alone(ranks):
    for summed, gathered in ranks.run(2, counted):
        reconstructions, bias, scores = 4 * N * L * D, 4 * L * D, 4 * N * K
        assert reconstructions + bias <= summed < reconstructions + bias + 100
        assert scores <= gathered < scores + 100
