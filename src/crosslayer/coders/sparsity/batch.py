"""The largest of a whole batch, over all layers: the budget moves to the tokens and layers that need it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from crosslayer.coders.pattern import Pattern
from crosslayer.coders.sparsity.largest import LargestK, check_available
from crosslayer.coders.sparsity.protocol import Encoder
from crosslayer.coders.sparsity.selection import pattern_of
from crosslayer.coders.sparsity.topk import kth_of_group, patterns_at, reaching
from crosslayer.errors import UserError
from crosslayer.team import ALONE, Group, count

MARGIN = 0.7
"""The search looks at what scores above this share of the last cuts; lower, when that is too little."""


@dataclass(frozen=True)
class BatchTopK(LargestK):
    """The k x N largest features of N tokens over *all* layers together, by activation x decoder norm.

    The score of the smallest one selected, its moving average kept in the coder as `cut`, becomes the threshold at
    inference, where a token must not depend on the batch that it comes in. Source: Bussmann et al. 2024, "BatchTopK
    sparse autoencoders"; jointly over layers as in "Circuit Tracing" (Anthropic, 2025), appendix.
    """

    cut_decay: float = 0.99
    """What is left of the cut's moving average after a step."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.cut_decay < 1:
            raise UserError(f"cut_decay is {self.cut_decay}; choose 0 up to, but not, 1")

    def check(self, n_sources: int, n_features: int) -> None:
        """See `Sparsity.check`."""
        check_available(self.k, n_sources * n_features, f"{n_sources} layers of {n_features} features")

    def budget(self, n_sources: int, n_features: int) -> int:
        """See `Sparsity.budget`: k over all, on average."""
        return self.k

    def patterns(self, coder: Encoder, pre: Tensor, n_tokens: int) -> list[Pattern]:
        """See `Selecting.patterns`; moves `coder.cut` while the coder is in training mode."""
        scores = pre.transpose(0, 1) * coder.decoder_norms()[:, None]
        chosen, cut = largest_of_all(scores, self.k * n_tokens, coder.cut, coder.team.everyone)
        if coder.training and cut.isfinite():  # it is not where nothing is active
            coder.cut.copy_(torch.lerp(cut, coder.cut, self.cut_decay if coder.cut > 0 else 0.0))
        return patterns_at(chosen, scores.shape)

    def pattern(self, coder: Encoder, i: int, pre: Tensor) -> Pattern:
        """See `Selecting.pattern`: by the moving average of the cuts."""
        self._check_trained(coder)
        return pattern_of(pre * coder.decoder_norms()[i] >= coder.cut)

    def thresholds(self, coder: Encoder) -> Tensor:
        """See `Sparsity.thresholds`: the cut, in each feature's own units."""
        self._check_trained(coder)
        return coder.cut / coder.decoder_norms()

    def _check_trained(self, coder: Encoder) -> None:
        if not coder.cut > 0:
            raise UserError("this BatchTopK transcoder has no threshold yet; train it for a step first")


def largest_of_all(scores: Tensor, n: int, near: Tensor, group: Group = ALONE.everyone) -> tuple[Tensor, Tensor]:
    """Places, in the flattened scores, of those among a group's n largest, and the smallest of the n.

    As far as they are positive. Only what lies above a bound is looked at: it starts below `near`, a good guess, and
    falls until enough does. The smallest is infinite where nothing is positive.
    """
    smallest = scores.new_tensor(torch.finfo(scores.dtype).tiny)
    bound = torch.maximum(MARGIN * near, smallest)
    while True:
        places = reaching(scores, bound)
        found = count(group, len(places))
        if found >= n or bound == smallest:
            break
        bound = bound / 4 if bound > 1e-6 else smallest
    values = scores.flatten().index_select(0, places)
    if not found:
        return places, scores.new_tensor(torch.inf)
    cut = kth_of_group(values, min(n, found), group)
    return places.index_select(0, reaching(values, cut)), cut
