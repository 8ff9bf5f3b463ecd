"""Per-layer scales that bring inputs and targets to norm sqrt(D), estimated once on many batches."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.activations.record import Activations
from crosslayer.activations.usable import usable
from crosslayer.errors import UserError


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


def estimate_scales(activations: Activations) -> Scales:
    """Measure the scales on one large chunk.

    Raises:
        UserError: when no usable token is among them, or a layer reads or writes nothing but zeros, or not a number.
    """
    chosen = activations[usable(activations).keep]
    if not len(chosen):
        raise UserError("no token is left to train on; the prompts need more than one token each")
    x, y = chosen.x.float(), chosen.y.float()  # a model in half precision is trained on in full
    root = x.shape[2] ** 0.5
    mean = y.mean(0)
    variance = (y - mean).square().sum(2).mean(0)
    first = activations.y[activations.position == 0].float()
    scales = Scales(
        input=x.norm(dim=2).mean(0) / root,
        output=y.norm(dim=2).mean(0) / root,
        output_mean=mean,
        output_variance=variance,
        first_write=first.mean(0) if len(first) else torch.zeros_like(mean),
    )
    for name, scale in (("reads", scales.input), ("writes", scales.output), ("varies by", scales.output_variance)):
        bad = ~((scale > 0) & scale.isfinite())
        if bad.any():
            layer = int(bad.nonzero()[0])
            raise UserError(
                f"layer {layer}'s MLP {name} {scale[layer].item()} on average; nothing can be trained on that"
            )
    return scales
