"""Per-layer scales that bring inputs and targets to norm sqrt(D), estimated once on many batches."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from crosslayer.activations.record import Activations
from crosslayer.activations.usable import usable
from crosslayer.errors import UserError
from crosslayer.team import ALONE, Group, count


@dataclass(frozen=True)
class Scales:
    """Statistics of the tokens trained on, by layer."""

    input: Float[Tensor, " L"]
    """x / input has mean norm sqrt(D)."""
    output: Float[Tensor, " L"]
    """y / output has mean norm sqrt(D)."""
    output_mean: Float[Tensor, "L D"]
    """Mean of y, unscaled."""
    output_variance: Float[Tensor, " L"]
    """Mean of |y - mean y|^2, unscaled."""
    first_write: Float[Tensor, "L D"]
    """Mean of y at first positions, unscaled."""


def estimate_scales(activations: Activations, tokens: Group = ALONE.tokens) -> Scales:
    """Measure the scales on one large chunk, of which the others of a group may have the rest.

    Raises:
        UserError: when no usable token is among them, or a layer reads or writes nothing but zeros, or not a number.
    """
    chosen = activations[usable(activations, tokens).keep]
    n = count(tokens, len(chosen))
    if not n:
        raise UserError("no token is left to train on; the prompts need more than one token each")
    x, y = chosen.x.float(), chosen.y.float()  # a model in half precision is trained on in full
    root = x.shape[2] ** 0.5
    mean = tokens.sum(y.sum(0)) / n
    first = activations.y[activations.position == 0].float()
    scales = Scales(
        input=tokens.sum(x.norm(dim=2).sum(0)) / n / root,
        output=tokens.sum(y.norm(dim=2).sum(0)) / n / root,
        output_mean=mean,
        output_variance=tokens.sum((y - mean).square().sum((0, 2))) / n,
        first_write=tokens.sum(first.sum(0)) / max(1, count(tokens, len(first))),
    )
    for name, scale in (("reads", scales.input), ("writes", scales.output), ("varies by", scales.output_variance)):
        bad = ~((scale > 0) & scale.isfinite())
        if bad.any():
            layer = int(bad.nonzero()[0])
            raise UserError(
                f"layer {layer}'s MLP {name} {scale[layer].item()} on average; nothing can be trained on that"
            )
    return scales
