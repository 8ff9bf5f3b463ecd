"""What ranks that are to train together have to be given alike, in short."""

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import version

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crosslayer.data.examples import Example
from crosslayer.distributed.mesh import hearing

LOOKED_AT = 16
"""Examples, and numbers of each parameter, that are compared."""


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
    if isinstance(whole, DTensor):
        with hearing():
            whole = whole.full_tensor()
    few = whole.flatten()[:LOOKED_AT].float().cpu()
    return repr((name, tuple(parameter.shape), few.tolist())).encode()


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
