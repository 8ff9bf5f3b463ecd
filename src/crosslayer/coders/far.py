"""Weights that may lie elsewhere than what they act on, on the CPU or on disk for one: what is used of them is brought.

Where both lie on one device nothing is moved or copied.
"""

from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.coders.pattern import Pattern


def fetch_rows(W: Float[Tensor, "F *K"], features: Int[Tensor, " U"]) -> Float[Tensor, "U *K"]:
    """Some rows of W, where `features` is."""
    return W.index_select(0, features.to(W.device)).to(features.device)


def near(pattern: Pattern, W: Float[Tensor, "F K"]) -> tuple[Pattern, Float[Tensor, "U K"]]:
    """A pattern and weights in one place: of weights that lie elsewhere, the rows of its active features alone."""
    if W.device == pattern.features.device:
        return pattern, W
    features, compact = pattern.compact()
    return compact, fetch_rows(W, features)
