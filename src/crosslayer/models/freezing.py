"""Holding a model's attention patterns and norm denominators at their values for one prompt.

What is left is linear in the residual stream: the definition of a local replacement model ("Circuit Tracing",
Anthropic 2025, section "Constructing an attribution graph for a prompt"). No module is named: the functions themselves
are watched, so that every attention and every norm is frozen, whatever the architecture.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class Frozen(TorchFunctionMode):
    """Records every frozen factor of the first forward pass inside it, and gives the same ones in later passes.

    Frozen are softmaxes (attention patterns), inverse roots (norm denominators), sigmoids (gates), and of a tanh
    (soft caps) its ratio to its input. Gradients pass through none of them.

    Raises:
        RuntimeError: when a later pass asks for other factors than the first.
    """

    def __init__(self) -> None:
        super().__init__()
        self._factors: list[Tensor] = []
        self._recorded = False
        self._place = 0

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Inside, one forward pass, with the factors of the first one."""
        self._place = 0
        with self:
            yield
        if self._recorded and self._place != len(self._factors):
            raise RuntimeError(f"a frozen pass used {self._place} factors of {len(self._factors)}")
        self._recorded = True

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Frozen":
        """For passes with every recorded factor changed, as for some of the positions."""
        other = Frozen()
        other._factors, other._recorded = [change(factor) for factor in self._factors], True
        return other

    def factor(self, make: Callable[[], Tensor]) -> Tensor:
        """The next factor: made in the first pass, the same again in later ones."""
        if not self._recorded:
            with torch.no_grad():
                self._factors.append(make())
        if self._place >= len(self._factors):
            raise RuntimeError("a frozen pass asks for more factors than the first one did")
        self._place += 1
        return self._factors[self._place - 1]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """See `torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        if func in CASTS and args[0].dtype == torch.float64 and _asks_for_less(func, args, kwargs):
            return args[0]  # norms compute in float32 whatever they are given, which would cost half of the digits
        if func in NORMS:
            return NORMS[func](self, *args, **kwargs)
        if func in FACTORS or (func in POWERS and _is_root(*args, **kwargs)):
            return self.factor(lambda: func(*args, **kwargs))
        if func in CAPS:
            x = args[0] if args else kwargs["input"]
            return x * self.factor(lambda: torch.where(x == 0, 1.0, func(x) / x))
        return func(*args, **kwargs)


def _asks_for_less(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    return func is Tensor.float or torch.float32 in (*args[1:], *kwargs.values())


def _is_root(*args: Any, **kwargs: Any) -> bool:
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
    return isinstance(exponent, float) and abs(exponent) == 0.5


def _layer_norm(
    frozen: Frozen, input: Tensor, normalized_shape: Any, weight=None, bias=None, eps: float = 1e-5
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, keepdim=True)
    out = centred * frozen.factor(lambda: (centred.square().mean(axes, keepdim=True) + eps).rsqrt())
    return _affine(out, weight, bias)


def _rms_norm(frozen: Frozen, input: Tensor, normalized_shape: Any, weight=None, eps: float | None = None) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    out = input * frozen.factor(lambda: (input.square().mean(axes, keepdim=True) + eps).rsqrt())
    return _affine(out, weight, None)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return (x if bias is None else x + bias).contiguous()  # as the fused kernels do


NORMS: dict[Any, Callable[..., Tensor]] = {
    functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
}
FACTORS = {
    functional.softmax, torch.softmax, Tensor.softmax,
    torch.rsqrt, Tensor.rsqrt, torch.sqrt, Tensor.sqrt,
    functional.sigmoid, torch.sigmoid, Tensor.sigmoid,
}  # fmt: skip
CASTS = {Tensor.float, Tensor.to}
POWERS = {torch.pow, Tensor.pow, Tensor.__pow__}
CAPS = {functional.tanh, torch.tanh, Tensor.tanh}


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Inside, attention patterns are computed by a softmax in the open, not within a fused kernel."""
    configs: dict[int, Any] = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    before = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
