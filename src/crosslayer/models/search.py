"""Finding the sites of a family that the table does not have, by looking for tensors that add up.

In the first decoder layer, every combination of a stream (what a norm, or an MLP without one, gets), a write (what a
module gives), an attribute to scale it with and a mixer beside it is tried on one recorded pass; those whose sum is
the layer's output become candidates, which the proof then accepts or refuses on all layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from crosslayer.models.hooks import entering, watching
from crosslayer.models.sites_table import Block

TOLERANCE = 1e-3
"""Largest relative gap of a candidate; coarse, as the proof decides."""
DEPTH = 2
"""How deep in a layer modules are looked at."""
MOST = 16
"""Candidates at most."""


@dataclass
class _Seen:
    """What the modules of one layer got and gave, by path; the layer itself is ''."""

    got: dict[str, Tensor] = field(default_factory=dict)
    gave: dict[str, Tensor] = field(default_factory=dict)


def search(model: PreTrainedModel, inputs: dict[str, Any]) -> Iterator[tuple[str, Block]]:
    """Lists of layers with patterns that add up in their first layer, the simplest first."""
    for path in _lists(model):
        layer = next(model.get_submodule(path).children())
        seen, mixers = _observe(model, layer, inputs)
        if "" in seen.gave:
            found = sorted(_patterns(layer, seen, mixers), key=_complexity)
            yield from ((path, block) for block in found[:MOST])


def _lists(model: PreTrainedModel) -> list[str]:
    """Paths of the module lists as long as the language model is deep, those called a language model's first."""
    depth = model.config.get_text_config().num_hidden_layers
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth and len(m)]
    return sorted(lists, key=lambda name: any(word in name for word in ("vision", "visual", "audio", "tower")))


def _observe(model: PreTrainedModel, layer: nn.Module, inputs: dict[str, Any]) -> tuple[_Seen, set[str]]:
    """What the layer's modules saw, and which of them mix positions.

    Those tell, at later positions, that the first word is another one, though what they get there is the same.
    """
    tokens = inputs["input_ids"].clone()
    words = (tokens[0] != getattr(model.config, "image_token_id", -1)).nonzero().flatten()
    first = int(words[0])
    others = tokens[0, words][tokens[0, words] != tokens[0, first]]
    tokens[:, first] = others[-1]
    a, b = _record(model, layer, inputs), _record(model, layer, {**inputs, "input_ids": tokens})

    def differs(x: Tensor, y: Tensor) -> bool:
        return not _same(*(z.view(*tokens.shape, -1)[:, first + 1 :] for z in (x, y)))

    both = a.got.keys() & a.gave.keys()
    return a, {name for name in both if differs(a.gave[name], b.gave[name]) and not differs(a.got[name], b.got[name])}


def _record(model: PreTrainedModel, layer: nn.Module, inputs: dict[str, Any]) -> _Seen:
    names = [name for name, _ in layer.named_modules() if name.count(".") < DEPTH]
    modules, seen = [layer.get_submodule(name) for name in names], _Seen()
    width, length = model.config.get_text_config().hidden_size, inputs["input_ids"].numel()

    def keep(store: dict[str, Tensor]) -> Any:
        def put(index: int, tensor: Tensor) -> None:
            if tensor.shape[-1] == width and tensor.numel() == length * width:
                store.setdefault(names[index], tensor.reshape(length, width).clone())

        return put

    with torch.no_grad(), entering(modules, keep(seen.got)), watching(modules, keep(seen.gave)):
        model(**inputs, use_cache=False)
    return seen


def _patterns(layer: nn.Module, seen: _Seen, mixers: set[str]) -> Iterator[Block]:
    local = [name for name in seen.gave if name and name not in mixers]
    scales = [None, *(name for name, value in vars(layer).items() if isinstance(value, float) and value not in (0, 1))]
    beside = [(), *((name,) for name in seen.gave if name in mixers and "." not in name and name)]
    for norm, mlp in _readers(layer, seen, local, mixers):
        stream = seen.got[mlp if norm is None else norm]
        for write, scale, adds in product(_writers(seen, local, mlp), scales, beside):
            total = stream + seen.gave[write] * (1.0 if scale is None else getattr(layer, scale))
            for name in adds:
                total = total + seen.gave[name]
            if _same(total, seen.gave[""]):
                yield Block(norm, mlp, None if write == mlp else write, scale, adds)


def _readers(layer: nn.Module, seen: _Seen, local: list[str], mixers: set[str]) -> Iterator[tuple[str | None, str]]:
    """Norms with a module that gets what they give, and modules that may read the stream itself."""
    outside = (name for name in seen.got if name and not any(f"{name}.".startswith(f"{m}.") for m in mixers))
    modules = [name for name in outside if _computes(layer.get_submodule(name))]
    for norm in (name for name in local if name in seen.got and not _computes(layer.get_submodule(name))):
        yield from ((norm, mlp) for mlp in modules if _same(seen.got[mlp], seen.gave[norm]))
    yield from ((None, mlp) for mlp in modules)


def _writers(seen: _Seen, local: list[str], mlp: str) -> list[str]:
    """Modules that may give the write of an MLP: itself, or what comes after it, but nothing around or inside it."""
    return [n for n in local if not mlp.startswith(f"{n}.") and not n.startswith(f"{mlp}.")]


def _computes(module: nn.Module) -> bool:
    """It has a matrix, as norms, activations and dropout have not."""
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _complexity(block: Block) -> tuple[int, ...]:
    """Modules as they are before parts of modules; a norm before none; nothing added before something added."""
    write = block.write or block.mlp
    return (len(block.adds), block.norm is None, write.count("."), block.mlp.count("."), write != block.mlp)


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
