"""Whether ranks that are to train together were given the same things."""

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crosslayer.data.examples import Example
from crosslayer.errors import UserError
from crosslayer.team import Group, tell

LOOKED_AT = 16
"""Examples, and numbers of each parameter, that are compared."""


def check_alike(group: Group, facts: dict[str, Any]) -> None:
    """Refuse ranks that differ in something that has to be the same.

    Args:
        group: the ranks.
        facts: JSON values by what to call them.

    Raises:
        UserError: on all ranks the same, naming what differs and on which rank.
    """
    first, *others = tell(group, facts)
    for rank, found in enumerate(others, 1):
        for name, value in found.items():
            wanted = first.get(name)
            if value != wanted:
                raise UserError(
                    f"rank {rank} has another {name.removeprefix('the ')} than rank 0{_shown(value, wanted)}"
                )


def versions() -> dict[str, str]:
    """What the result of a training may depend on."""
    names = ("torch", "transformers", "crosslayer")
    return {"version of python": platform.python_version(), **{f"version of {name}": version(name) for name in names}}


def digest_of_examples(data: Sequence[Example]) -> str:
    """A digest of the first examples of a data set, without their pictures."""
    chosen = [data[i] for i in range(min(LOOKED_AT, len(data)))]
    return _digest(repr([(e.id, e.prompt, e.response) for e in chosen]).encode())


def digest_of_weights(model: nn.Module) -> str:
    """A digest of some numbers of every parameter of a model."""
    return _digest(*(_some(name, p) for name, p in model.named_parameters()))


def _some(name: str, parameter: Tensor) -> bytes:
    whole = parameter.detach()
    whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
    few = whole.flatten()[:LOOKED_AT].float().cpu()
    return repr((name, tuple(parameter.shape), few.tolist())).encode()


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _shown(value: Any, wanted: Any) -> str:
    """The two values; of records, those of the first entry that differs."""
    name = ""
    if isinstance(value, dict) and isinstance(wanted, dict):
        entry = min(name for name in value | wanted if value.get(name) != wanted.get(name))
        name, value, wanted = f"{entry} is ", value.get(entry), wanted.get(entry)
    return f": {name}{value}, not {wanted}; give all ranks the same"
