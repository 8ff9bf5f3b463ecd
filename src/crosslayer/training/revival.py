"""Dead features: two ways to give them a gradient again."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import linear

from crosslayer.coders.codes import Codes
from crosslayer.coders.sparsity import Encoded, encode_patterns, split_by_source
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.team import ALONE, Group, Team, count


@dataclass(frozen=True)
class AuxK:
    """Dead features predict what the living left unexplained, through all their decoders.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", appendix A.2. Looking at a sample of the
    batch's tokens instead of all revives as many features at a fraction of the cost.
    """

    k: int = 32
    """Dead features used a token, over all layers."""
    coefficient: float = 1 / 4
    """Weight in the loss, relative to the residual's own size; 0 switches it off."""
    token_share: float = 0.25
    """Share of the batch's tokens that it looks at."""

    def codes(self, coder: CrossLayerTranscoder, encoded: Encoded, dead: Bool[Tensor, "S F"]) -> list[Codes]:
        """The k largest dead features of the first tokens, as if they had been selected.

        Empty while nothing is dead or the coefficient is 0.
        """
        features = coder.team.features
        if not self.coefficient or not features.sum(dead.sum()):
            return []
        n = encoded.places.first(self.token_share)
        x, pre = encoded.x[:n], encoded.pre[:n].detach()
        where = dead.flatten().nonzero().squeeze(1)
        sleeping = [
            layer.index_select(1, row.nonzero().squeeze(1)) for layer, row in zip(pre.unbind(1), dead, strict=True)
        ]
        top = torch.cat(sleeping, 1).topk(min(self.k, len(where)), sorted=False)
        best = torch.cat(features.gather(top.values.T.contiguous()))  # a row of them each, as numbers may differ
        cut = best.topk(min(self.k, len(best)), 0, sorted=False).values.amin(0)
        keep = (top.values > 0) & (top.values >= cut[:, None])
        patterns = split_by_source(where[top.indices], keep, *dead.shape)
        return encode_patterns(coder, x, pre, patterns)

    def loss(
        self,
        explained: Float[Tensor, "M L C"],
        residual: Float[Tensor, "N L C"],
        tokens: Group = ALONE.tokens,
        columns: Group = ALONE.features,
    ) -> Tensor:
        """The weighted auxiliary loss of what these codes write, beside the residual of the same tokens.

        Where others look at other tokens, it is these tokens' part of the whole. `columns` have other columns.
        """
        target = residual[: len(explained)].detach()
        size = columns.sum(tokens.sum(target.square().sum((0, 2)))).clamp_min(1e-12)
        error = columns.sum((explained - target).square().sum((0, 2))) / size
        return self.coefficient * error.mean()


@dataclass(frozen=True)
class DeadPenalty:
    """Lifts the scores of dead features towards those of the least active ones: mean of sum max(0, cut - score).

    A score is pre-activation x decoder norm; the cut is the mean over tokens of the smallest active one. The idea of
    the pre-activation loss of "Circuit Tracing" (Anthropic, 2025) and of EleutherAI's `dead_latent_penalty`, on dead
    features only and with decoder norms held fixed.
    """

    coefficient: float = 0.0
    """Weight in the loss; 0 switches it off."""
    token_share: float = 0.125
    """Share of the batch's tokens that it looks at."""

    def loss(self, coder: CrossLayerTranscoder, encoded: Encoded, dead: Bool[Tensor, "S F"]) -> Tensor | float:
        """The weighted penalty, these tokens' part of it; 0 while nothing is dead or the coefficient is 0."""
        features = coder.team.features
        if not self.coefficient or not features.sum(dead.sum()):
            return 0.0
        n = encoded.places.first(self.token_share)
        with torch.no_grad():
            norms = coder.decoder_norms()
            cut = _mean_smallest(encoded.codes, norms, len(encoded.x), coder.team)
        below = encoded.x.new_zeros(())
        for i, source in enumerate(coder.sources):
            rows = dead[i].nonzero().squeeze(1)
            pre = linear(encoded.x[:n, source], coder.W_enc[i][rows], coder.b_enc[i][rows])
            below = below + (cut - pre * norms[i, rows]).relu().sum()
        return self.coefficient * features.sum(below) / encoded.places.n_first(self.token_share)


def _mean_smallest(codes: list[Codes], norms: Tensor, n_tokens: int, team: Team) -> Tensor:
    """The smallest active score of each token, averaged over the tokens that have one."""
    smallest = norms.new_full((n_tokens,), torch.inf)
    for source_codes, row in zip(codes, norms, strict=True):
        tokens, features, values = source_codes.pairs()
        smallest.scatter_reduce_(0, tokens, values.detach() * row[features], "amin")
    smallest = team.features.smallest(smallest)
    smallest = smallest[smallest.isfinite()]
    return (team.tokens.sum(smallest.sum()) / count(team.tokens, len(smallest))).nan_to_num(nan=0.0)
