"""Dense products, by the quickest library that PyTorch carries."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear


def affine(
    x: Float[Tensor, "N M"], W: Float[Tensor, "F M"], b: Float[Tensor, " F"] | None = None
) -> Float[Tensor, "N F"]:
    """x @ W.T + b, differentiable.

    In fp32 on a CPU by oneDNN, which PyTorch itself uses below fp32 only: MKL, its choice for fp32, leaves half of an
    AMD processor unused, and is no quicker than oneDNN on others.
    """
    if not _by_onednn(x):
        return linear(x, W, b)
    return linear(x.to_mkldnn(), W, b).to_dense()


def _by_onednn(x: Tensor) -> bool:
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return on_cpu and len(x) > 0 and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")
