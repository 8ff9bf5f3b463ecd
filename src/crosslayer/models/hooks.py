"""Reading and replacing at the sites of a stock Hugging Face model. Whatever is put on a model is taken off again."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Size, Tensor, nn

from crosslayer.models.sites import Site, Sites

OnRead = Callable[[int, Tensor], Any]
"""Called with the layer and the tensor [B, P, D] seen there; what it returns is ignored."""
Write = Callable[[int], Tensor]
"""Called with the layer; gives the tensor [B, P, D] to use as its MLP's write."""


@contextmanager
def reading(sites: Sites, on_read: OnRead, only: Collection[int] | None = None) -> Iterator[None]:
    """Call `on_read` whenever a layer's MLP, of all layers or only some, is about to read."""
    with ExitStack() as stack:
        for index, site in enumerate(sites.layers):
            if only is not None and index not in only:
                continue
            call = stack.enter_context(_shaped(site, on_read))
            if sites.read == "resid" or site.norm is None:
                handle = site.reader.register_forward_pre_hook(_on_input(call, index), with_kwargs=True)
            else:
                handle = site.norm.register_forward_hook(_on_output(call, index))
            stack.callback(handle.remove)
        yield


@contextmanager
def recording(sites: Sites, on_read: OnRead, on_write: OnRead) -> Iterator[None]:
    """Call `on_read` with what every MLP reads and `on_write` with what it writes."""
    with reading(sites, on_read), ExitStack() as stack:
        for index, site in enumerate(sites.layers):
            call = stack.enter_context(_shaped(site, on_write))
            stack.callback(site.write.register_forward_hook(_on_output(call, index, site.scale)).remove)
        yield


@contextmanager
def watching(modules: Sequence[nn.Module], on_output: OnRead) -> Iterator[None]:
    """Call `on_output` with each module's number and output."""
    with ExitStack() as stack:
        for index, module in enumerate(modules):
            stack.callback(module.register_forward_hook(_on_output(on_output, index)).remove)
        yield


@contextmanager
def entering(modules: Sequence[nn.Module], on_input: OnRead) -> Iterator[None]:
    """Call `on_input` with each module's number and first tensor, before it runs."""
    with ExitStack() as stack:
        for index, module in enumerate(modules):
            hook = _on_input(on_input, index)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def calling(modules: Sequence[nn.Module], on_call: Callable[[int, tuple, dict[str, Any]], None]) -> Iterator[None]:
    """Call `on_call` with each module's number and all its arguments, before it runs."""
    with ExitStack() as stack:
        for index, module in enumerate(modules):

            def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any], index: int = index) -> None:
                on_call(index, args, kwargs)

            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def changing(modules: Sequence[nn.Module], change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Let each module get `change(its number, tensor)` in the place of its first tensor."""
    with ExitStack() as stack:
        for index, module in enumerate(modules):

            def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any], index: int = index) -> tuple[Any, Any]:
                old = _first(*args, **kwargs)
                new = change(index, old)
                kwargs = {name: new if value is old else value for name, value in kwargs.items()}
                return tuple(new if value is old else value for value in args), kwargs

            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def feeding(sites: Sites, stream: Write) -> Iterator[None]:
    """Let every MLP, through its norm, see `stream(layer)`; the residual stream itself stays as it is."""
    with ExitStack() as stack:
        for index, site in enumerate(sites.layers):

            def hook(_: nn.Module, args: tuple, index: int = index) -> tuple:
                return (stream(index).reshape(args[0].shape), *args[1:])

            stack.callback(site.reader.register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def replacing(sites: Sites, write: Write, kept: Collection[int] = ()) -> Iterator[None]:
    """Use `write(layer)` for every MLP's write but those of the layers kept; the MLPs themselves are not computed."""
    with ExitStack() as stack:
        for index, site in enumerate(sites.layers):
            if index in kept:
                continue
            if site.mlp is not site.write:
                stack.enter_context(shadowing(site.mlp, "forward", _first))
            stack.enter_context(shadowing(site.write, "forward", _written(site, write, index)))
        yield


@contextmanager
def adding(sites: Sites, addition: Callable[[int, Tensor], Tensor], only: Collection[int]) -> Iterator[None]:
    """Add `addition(layer, write)` to the MLP's write of some layers."""
    with ExitStack() as stack:
        for index in only:
            site = sites.layers[index]
            call = stack.enter_context(_shaped(site, addition))
            stack.callback(site.write.register_forward_hook(_added(site, call, index)).remove)
        yield


@contextmanager
def before_forward(model: nn.Module, call: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Call `call` with the keyword arguments of every forward pass of the whole model, before it starts."""
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: call(kwargs), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _shaped(site: Site, call: OnRead) -> Iterator[OnRead]:
    """`call`, but with tensors in the shape [B, P, D] that the layer got: some MLPs see B and P as one."""
    shape = Size()

    def note(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal shape
        shape = _first(*args, **kwargs).shape

    handle = site.layer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield lambda index, tensor: call(index, _reshaped(tensor, shape))
    finally:
        handle.remove()


def _on_input(call: OnRead, index: int) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call(index, _first(*args, **kwargs))

    return hook


def _on_output(
    call: OnRead, index: int, scale: float | Tensor | None = None
) -> Callable[[nn.Module, tuple, Any], None]:
    def hook(_: nn.Module, args: tuple, output: Any) -> None:
        tensor = output if isinstance(output, Tensor) else output[0]
        call(index, tensor if scale is None else tensor * scale)

    return hook


def _written(site: Site, write: Write, index: int) -> Callable[..., Any]:
    """A forward that gives the write as the module would: divided by the scale to come, in its shape and tuple."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        like, output = _first(*args, **kwargs), write(index)
        output = output if site.scale is None else output / site.scale
        output = output.to(like).reshape(like.shape).clone()  # a copy, as Falcon adds to it in place
        return (output, *[None] * (site.n_returned - 1)) if site.n_returned else output

    return forward


def _added(site: Site, addition: OnRead, index: int) -> Callable[[nn.Module, tuple, Any], Any]:
    """A hook that adds in the module's own units: before the scale to come, in its shape and tuple."""

    def hook(_: nn.Module, args: tuple, output: Any) -> Any:
        tensor = output if isinstance(output, Tensor) else output[0]
        more = addition(index, tensor if site.scale is None else tensor * site.scale)
        more = more if site.scale is None else more / site.scale
        total = tensor + _reshaped(more.to(tensor), tensor.shape)
        return total if isinstance(output, Tensor) else (total, *output[1:])

    return hook


def _first(*args: Any, **kwargs: Any) -> Tensor:
    """The first tensor among the arguments of a module."""
    if args and isinstance(args[0], Tensor):
        return args[0]
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _reshaped(tensor: Tensor, shape: Size) -> Tensor:
    """In this shape, at no cost where it has it already."""
    return tensor if tensor.shape == shape else tensor.reshape(shape)


@contextmanager
def shadowing(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Put a function in the place of a method, on the instance; its class, weights and hooks stay as they are."""
    shadowed = vars(module).get(name)
    setattr(module, name, function)
    try:
        yield
    finally:
        if shadowed is None:
            delattr(module, name)
        else:
            setattr(module, name, shadowed)
