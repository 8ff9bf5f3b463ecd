"""The sites of a model: for every decoder layer, where its MLP reads the residual stream and what it writes to it."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from crosslayer.errors import UserError
from crosslayer.models.sites_table import BETWEEN, BLOCKS, LAYERS, MIXERS, REFUSED, REMARKS, Block

READS = ("resid", "mlp_in")


@dataclass(frozen=True)
class Site:
    """One decoder layer's modules; see `crosslayer.models.sites_table.Block`."""

    layer: nn.Module
    norm: nn.Module | None
    mlp: nn.Module
    write: nn.Module
    """The module whose output is the write; often `mlp` itself."""
    scale: float | Tensor | None = None
    adds: tuple[nn.Module, ...] = ()
    output_scale: float | Tensor | None = None
    n_returned: int = 0
    """Length of the tuple that `write` returns, its output first; 0 where it returns the tensor itself. Measured by
    the proof."""

    @property
    def reader(self) -> nn.Module:
        """The module whose input is the residual stream that the MLP reads."""
        return self.mlp if self.norm is None else self.norm


@dataclass(frozen=True)
class Sites:
    """The sites of all decoder layers, in order.

    `read` is `resid` (the stream before the MLP's norm) or `mlp_in` (after it).
    """

    layers: tuple[Site, ...]
    names: tuple[str, ...]
    """Of the modules whose outputs are the writes."""
    d_model: int
    read: str = "resid"
    notes: tuple[str, ...] = ()
    """What is unusual about the architecture, for people."""
    between: bool = False
    """Whether the family is known to add something to the stream between layers."""


def find_sites(model: PreTrainedModel, read: str = "resid") -> Sites:
    """The sites by the first pattern of the table that fits the model's modules; not proved.

    Raises:
        UserError: when the family is not in the table, or a module is not where the table says.
    """
    return table_sites(model, read)[0]


def table_sites(model: PreTrainedModel, read: str = "resid") -> list[Sites]:
    """The sites by every pattern of the table that fits the model's modules; at least one.

    Raises:
        UserError: when the family is not in the table, or a module is not where the table says.
    """
    check_family(model, read)
    kind = text_kind(model)
    if kind not in BLOCKS:
        raise UserError(f"model type {kind!r} ({type(model).__name__}) is not in the table of families")
    path, fitting, failures = _layers_path(model, kind), list[Sites](), list[UserError]()
    for block in BLOCKS[kind]:
        try:
            fitting.append(block_sites(model, path, block, read))
        except UserError as error:
            failures.append(error)
    if not fitting:
        raise failures[0]
    return fitting


def check_family(model: PreTrainedModel, read: str) -> None:
    """Refuse what cannot work whatever the modules are.

    Raises:
        UserError: with the reason.
    """
    if read not in READS:
        raise UserError(f"read is {read!r}; choose one of {', '.join(READS)}")
    for kind in (model.config.model_type, text_kind(model)):
        if kind in REFUSED:
            raise UserError(f"model type {kind!r} ({type(model).__name__}) is not supported: {REFUSED[kind]}")


def text_kind(model: PreTrainedModel) -> str:
    """`model_type` of the language model."""
    return model.config.get_text_config().model_type


def block_sites(model: PreTrainedModel, path: str, block: Block, read: str) -> Sites:
    """The sites of the layers listed at `path`, each of the pattern `block`.

    Raises:
        UserError: when a layer has no such module.
    """
    kind = text_kind(model)
    layers = list(_module(model, path, kind).children())
    sites = tuple(_site(layer, block, kind) for layer in layers)
    names = tuple(f"{path}.{i}.{block.write or block.mlp}" for i in range(len(sites)))
    width = model.config.get_text_config().hidden_size
    return Sites(sites, names, width, read, tuple(_notes(model, layers, block)), kind in BETWEEN)


def _layers_path(model: PreTrainedModel, kind: str) -> str:
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    path = next((path for path in LAYERS if path in lists), None)
    if path is None:
        raise UserError(f"model type {kind!r}: {type(model).__name__} has no list of decoder layers at {LAYERS}")
    return path


def _site(layer: nn.Module, block: Block, kind: str) -> Site:
    return Site(
        layer=layer,
        norm=None if block.norm is None else _module(layer, block.norm, kind),
        mlp=_module(layer, block.mlp, kind),
        write=_module(layer, block.write or block.mlp, kind),
        scale=None if block.scale is None else getattr(layer, block.scale),
        adds=tuple(_module(layer, name, kind) for name in block.adds),
        output_scale=None if block.output_scale is None else getattr(layer, block.output_scale),
    )


def _module(parent: nn.Module, path: str, kind: str) -> nn.Module:
    try:
        return parent.get_submodule(path)
    except AttributeError:
        children = ", ".join(name for name, _ in parent.named_children())
        raise UserError(
            f"model type {kind!r}: {type(parent).__name__} has no module {path!r}, which this family should have; "
            f"it has {children or 'none'}"
        ) from None


def _notes(model: PreTrainedModel, layers: list[nn.Module], block: Block) -> Iterator[str]:
    for kind in (model.config.model_type, text_kind(model)):
        if kind in BETWEEN | REMARKS:
            yield (BETWEEN | REMARKS)[kind]
    if block.norm is None:
        yield "post-norm: MLPs read the raw stream, so resid and mlp_in are the same"
    if block.scale is not None:
        yield f"scaled write: the MLP's output counts {block.scale} times"
    if block.adds and block.output_scale is None:
        yield "parallel attention: a layer's features cannot see the same layer's attention"
    routed = [i for i, layer in enumerate(layers) if any(name.endswith("experts") for name, _ in layer.named_modules())]
    if routed:
        yield f"MoE in layers {_numbers(routed)}: router and experts are replaced as one"
    for name, what in MIXERS.items():
        having = [i for i, layer in enumerate(layers) if getattr(layer, name, None) is not None]
        if having:
            yield f"{what} in layers {_numbers(having)}: attention patterns cannot be frozen there"


def _numbers(layers: list[int]) -> str:
    return ",".join(map(str, layers))
