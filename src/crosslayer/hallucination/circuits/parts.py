"""Graphs of different pictures made comparable: objects are called by what they are to the mention.

Axes: R roles of a graph, E pairs of them that an edge joins.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from crosslayer.attribution.influence import sums
from crosslayer.attribution.roles import Role
from crosslayer.attribution.tally import Tally

TARGET = Role("target", None, None, "", "")


def renamed(found: Tally, names: Mapping[str, str]) -> Tally:
    """A graph in which places and words have other names, and roles that become one are added up."""
    number: dict[Role, int] = {}
    where = np.array([number.setdefault(_renamed(role, names), len(number)) for role in found.roles], np.int64)
    R = len(number)
    ends, pair = np.unique(where[found.source] * R + where[found.target], return_inverse=True)
    return replace(
        found,
        roles=tuple(number),
        influence=sums(where, found.influence, R),
        effect=sums(where, found.effect, R),
        kept=sums(where, found.kept.astype(float), R) > 0,
        source=ends // R,
        target=ends % R,
        edge_influence=sums(pair, found.edge_influence, len(ends)),
        edge_effect=sums(pair, found.edge_effect, len(ends)),
    )


def _renamed(role: Role, names: Mapping[str, str]) -> Role:
    word = role.label.strip()
    return replace(role, place=names.get(role.place, role.place), label=names.get(word, role.label))


@dataclass(frozen=True)
class Start:
    """What starts at one place of the picture, or at the word for what is there."""

    patch: float
    """Effect of the patch on the target, in logits."""
    influence: float
    """Influence of the patch."""
    word: float
    """Effect of the word where the answer has said it already; 0 where it has not."""


def starts(found: Tally, places: Mapping[int, str]) -> dict[str, Start]:
    """By place of the picture, what starts there."""
    return {name: _start(found, name) for name in places.values()}


def _start(found: Tally, name: str) -> Start:
    patch = np.array([role.kind == "patch" and role.place == name for role in found.roles])
    word = np.array(
        [role.kind == "token" and role.place != "prompt" and role.label.strip() == name for role in found.roles]
    )
    return Start(float(found.effect[patch].sum()), float(found.influence[patch].sum()), float(found.effect[word].sum()))
