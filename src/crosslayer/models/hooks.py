"""Reading and replacing at the sites of a stock Hugging Face model. Whatever is put on a model is taken off again."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from crosslayer.models.sites import Sites

OnRead = Callable[[int, Tensor], Any]
"""Called with the layer and the tensor [B, P, D] seen there; what it returns is ignored."""
Write = Callable[[int], Tensor]
"""Called with the layer; gives the tensor [B, P, D] to use as its MLP's write."""


@contextmanager
def reading(sites: Sites, on_read: OnRead) -> Iterator[None]:
    """Call `on_read` whenever a layer's MLP is about to read."""
    with ExitStack() as stack:
        for index, site in enumerate(sites.layers):
            if sites.read == "resid":
                handle = site.norm.register_forward_pre_hook(_on_input(on_read, index))
            else:
                handle = site.norm.register_forward_hook(_on_output(on_read, index))
            stack.callback(handle.remove)
        yield


@contextmanager
def recording(sites: Sites, on_read: OnRead, on_write: OnRead) -> Iterator[None]:
    """Call `on_read` with what every MLP reads and `on_write` with what it writes."""
    with reading(sites, on_read), watching([site.mlp for site in sites.layers], on_write):
        yield


@contextmanager
def watching(modules: Sequence[nn.Module], on_output: OnRead) -> Iterator[None]:
    """Call `on_output` with each module's number and output."""
    with ExitStack() as stack:
        for index, module in enumerate(modules):
            stack.callback(module.register_forward_hook(_on_output(on_output, index)).remove)
        yield


@contextmanager
def replacing(sites: Sites, write: Write, kept: Collection[int] = ()) -> Iterator[None]:
    """Use `write(layer)` for every MLP's output but those of the layers kept; the MLPs themselves are not computed."""
    with ExitStack() as stack:
        for index, site in enumerate(sites.layers):
            if index not in kept:
                stack.enter_context(_forward(site.mlp, lambda *_, i=index, **__: write(i)))
        yield


@contextmanager
def before_forward(model: nn.Module, call: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Call `call` with the keyword arguments of every forward pass of the whole model, before it starts."""
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: call(kwargs), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _on_input(call: OnRead, index: int) -> Callable[[nn.Module, tuple], None]:
    def hook(_: nn.Module, args: tuple) -> None:
        call(index, args[0])

    return hook


def _on_output(call: OnRead, index: int) -> Callable[[nn.Module, tuple, Any], None]:
    def hook(_: nn.Module, args: tuple, output: Any) -> None:
        call(index, output if isinstance(output, Tensor) else output[0])

    return hook


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Shadow a module's `forward` on the instance; its class, weights and hooks stay as they are."""
    shadowed = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if shadowed is None:
            del module.forward
        else:
            module.forward = shadowed
