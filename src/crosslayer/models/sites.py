"""The sites of a model: for every decoder layer, where its MLP reads the residual stream and what it writes to it."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from crosslayer.errors import UserError
from crosslayer.models.sites_table import FAMILIES, Family

READS = ("resid", "mlp_in")


@dataclass(frozen=True)
class Site:
    """One decoder layer's modules."""

    layer: nn.Module
    norm: nn.Module
    mlp: nn.Module


@dataclass(frozen=True)
class Sites:
    """The sites of all decoder layers, in order.

    `read` is `resid` (the stream before the MLP's norm) or `mlp_in` (after it).
    """

    layers: tuple[Site, ...]
    names: tuple[str, ...]
    d_model: int
    read: str = "resid"


def find_sites(model: PreTrainedModel, read: str = "resid") -> Sites:
    """Look a model's sites up in the table of families.

    Raises:
        UserError: when the family is not in the table, or a module is not where the table says.
    """
    if read not in READS:
        raise UserError(f"read is {read!r}; choose one of {', '.join(READS)}")
    kind = model.config.model_type
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"model type {kind!r} ({type(model).__name__}) is not supported yet; supported: {known}")
    family = FAMILIES[kind]
    layers = _module(model, family.layers, kind)
    sites = tuple(_site(layer, family, kind) for layer in layers.children())
    names = tuple(f"{family.layers}.{i}.{family.mlp}" for i in range(len(sites)))
    return Sites(sites, names, model.config.get_text_config().hidden_size, read)


def _site(layer: nn.Module, family: Family, kind: str) -> Site:
    return Site(layer, _module(layer, family.norm, kind), _module(layer, family.mlp, kind))


def _module(parent: nn.Module, path: str, kind: str) -> nn.Module:
    try:
        return parent.get_submodule(path)
    except AttributeError:
        children = ", ".join(name for name, _ in parent.named_children())
        raise UserError(
            f"model type {kind!r}: {type(parent).__name__} has no module {path!r}, which this family should have; "
            f"it has {children or 'none'}"
        ) from None
