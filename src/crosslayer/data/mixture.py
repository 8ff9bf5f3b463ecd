"""Mixtures: several data sets in one, each with its share of the examples."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from crosslayer.data.examples import Example, Examples
from crosslayer.data.skipped import Skipped
from crosslayer.errors import UserError

MOST = 2**28
"""Examples that a mixture may have; each takes 12 bytes of memory."""


def mix(name: str, parts: list[Examples], weights: list[float], skipped: Skipped) -> Examples:
    """Examples of the parts in turn, evenly spread, in proportion to the weights.

    The mixture ends when every part has been gone through once; parts that are small for their weight are repeated.

    Raises:
        UserError: when that takes too many repetitions.
    """
    share = np.array(weights) / sum(weights)
    n = max(len(p) / s for p, s in zip(parts, share, strict=True))
    if n > MOST:
        raise UserError(f"{name}: weights {weights} make {n:,.0f} examples, {MOST:,} at most; choose closer ones")
    counts = np.maximum(1, np.round(share * n)).astype(int)
    part = np.repeat(np.arange(len(parts), dtype=np.int32), counts)
    place = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((place + 0.5) / share[part], kind="stable")
    part, place = part[order], place[order]

    def make(i: int) -> Example:
        number = int(part[i])
        example = parts[number][int(place[i]) % len(parts[number])]
        return replace(example, id=f"{number + 1}/{example.id}")

    return Examples(name, len(part), make, skipped)


def read_mixture(path: Path, keys: Callable[[Mapping[str, Any]], Any]) -> list[tuple[str, float, Any]]:
    """The parts of a mixture file: what the data is, its weight, and what `keys` makes of its other settings.

    Raises:
        UserError: when the file is not a list of parts with `data` and a positive `weight`.
    """
    try:
        parts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path}: needs a list of parts, each with 'data' and 'weight'; see docs/data.md")
    found = []
    for number, part in enumerate(parts, 1):
        data, weight = part.pop("data", None), part.pop("weight", 1.0)
        if not isinstance(data, str) or not isinstance(weight, int | float) or not 0 < weight < inf:
            raise UserError(f"{path}: part {number} needs 'data' and a 'weight' above 0; found {data!r}, {weight!r}")
        found.append((data, float(weight), keys(part)))
    return found
