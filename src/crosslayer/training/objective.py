"""What a training step minimises, and the revival of dead features."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from crosslayer.coders.codes import Codes
from crosslayer.coders.sparsity import encode_patterns, split_by_source
from crosslayer.coders.transcoder import CrossLayerTranscoder


def layer_fvu(
    y: Float[Tensor, "N L D"], y_hat: Float[Tensor, "N L D"], variance: Float[Tensor, " L"]
) -> Float[Tensor, " L"]:
    """Fraction of each layer's variance left unexplained: mean |y - y_hat|^2 / mean |y - mean y|^2.

    The loss is its mean over layers: every target counts alike, however much it varies.
    """
    return (y - y_hat).square().sum(2).mean(0) / variance


@dataclass(frozen=True)
class AuxK:
    """Dead features predict what the living left unexplained, through all their decoders.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", appendix A.2. Looking at a sample of the
    batch's tokens instead of all revives as many features at a fraction of the cost.
    """

    k: int = 32
    """Dead features used a token, over all layers."""
    coefficient: float = 1 / 32
    """Weight in the loss, relative to the residual's own size."""
    token_share: float = 0.25
    """Share of the batch's tokens that it looks at."""

    def loss(
        self,
        coder: CrossLayerTranscoder,
        x: Float[Tensor, "N L D"],
        pre: Float[Tensor, "N S F"],
        residual: Float[Tensor, "N L D"],
        dead: Bool[Tensor, "S F"],
    ) -> Tensor | float:
        """The weighted auxiliary loss; 0 while nothing is dead or the coefficient is 0."""
        if not self.coefficient or not dead.any():
            return 0.0
        n = max(1, round(self.token_share * len(x)))
        x, target = x[:n], residual[:n].detach()
        explained = coder.decode(self._dead_codes(coder, x, pre[:n].detach(), dead), n) - coder.b_dec
        error = (explained - target).square().sum((0, 2)) / target.square().sum((0, 2)).clamp_min(1e-12)
        return self.coefficient * error.mean()

    def _dead_codes(self, coder: CrossLayerTranscoder, x: Tensor, pre: Tensor, dead: Tensor) -> list[Codes]:
        """The k largest dead features of each token, as if they had been selected."""
        where = dead.flatten().nonzero().squeeze(1)
        top = pre.flatten(1)[:, where].topk(min(self.k, len(where)), sorted=False)
        patterns = split_by_source(where[top.indices], top.values > 0, *dead.shape)
        return encode_patterns(coder, x, pre, patterns)
