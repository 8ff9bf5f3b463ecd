"""Dense products, by the quickest library that PyTorch carries."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode


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


def product(x: Float[Tensor, "N M"], W: Float[Tensor, "M K"]) -> Float[Tensor, "N K"]:
    """x @ W, not differentiable; in fp32 on a CPU by oneDNN, without the copies that `affine` makes.

    That is private to PyTorch; where it is missing or takes other arguments, the usual product is used.
    """
    return QUICK(x, W.T, None, "none", [], "") if QUICK is not None and _by_onednn(x) else x @ W


def _quick_product() -> Callable[..., Tensor] | None:
    """PyTorch's own way to oneDNN; None where it is not as known here."""
    try:
        found = torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return None
    return found if str(found._schema).startswith(KNOWN) else None


KNOWN = "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm)"
QUICK = _quick_product()


class QuickProducts(TorchDispatchMode):
    """Inside, every plain product of matrices is a `product`; for passes back, whose products are not ours to write."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """See `torch.utils._python_dispatch.TorchDispatchMode`."""
        return product(*args) if func is torch.ops.aten.mm.default else func(*args, **(kwargs or {}))


def quick_products() -> AbstractContextManager[Any]:
    """`QuickProducts`, but on a processor of Intel's, whose MKL is quicker on it by itself."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return nullcontext() if "Intel" in capabilities.get("cpu_name", "") else QuickProducts()


def _by_onednn(x: Tensor) -> bool:
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return on_cpu and len(x) > 0 and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")
