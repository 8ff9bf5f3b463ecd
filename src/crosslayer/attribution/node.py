"""The nodes of an attribution graph."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from crosslayer.errors import UserError

INPUTS = ("token", "patch")
REQUIRED = {
    "token": ("position",),
    "patch": ("position",),
    "bias": (),
    "feature": ("layer", "position", "feature"),
    "error": ("position",),
    "target": (),
}
"""The kinds, and what a node of each must have."""
KEYS = {
    "token": ("position",),
    "patch": ("layer", "position"),
    "bias": ("layer", "position"),
    "feature": ("layer", "position", "feature"),
    "error": ("layer", "position"),
    "target": ("layer", "position", "feature", "vocab", "label"),
}
"""What tells the nodes of a kind apart."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node: an input (token, patch), a feature, an error, a decoder's or encoder's bias, or a target.

    Raises:
        UserError: for a kind that is unknown, or lacks a number, or a number below 0.
    """

    kind: str
    """token, patch, bias, feature, error or target."""
    layer: int | None = None
    """The layer whose write or read it belongs to; None for inputs, and for targets past the last layer."""
    position: int | None = None
    feature: int | None = None
    activation: float | None = None
    """Of a pooled feature: the sum over its positions."""
    label: str = ""
    """The token's or the target's text, or a name given by hand."""
    box: Box | None = None
    """Of a patch or a cell of them: left, top, right, bottom, in pixels of the picture."""
    probability: float | None = None
    """Of a target that is a token."""
    vocab: int | None = None
    """Token id of a token, a patch or a target that is a token."""
    pooled: tuple[int, ...] = ()
    """All positions that it stands for, where patches are pooled; `position` is the first of them."""

    def __post_init__(self):
        if self.kind not in REQUIRED:
            raise UserError(f"a node is of kind {self.kind!r}; choose from {', '.join(REQUIRED)}")
        for name in ("layer", "position", "feature", "vocab"):
            value = getattr(self, name)
            if value is None and name in REQUIRED[self.kind]:
                raise UserError(f"a node of kind {self.kind} has no {name}")
            if value is not None and not (type(value) is int and value >= 0):
                raise UserError(f"a node of kind {self.kind} has {name} {value!r}; a whole number from 0 is wanted")

    @property
    def id(self) -> str:
        """Kind, then what tells nodes of this kind apart: two nodes of one id are one node."""
        key = [getattr(self, name) for name in KEYS[self.kind]]
        return "/".join([self.kind, *("-" if part is None else str(part) for part in key)])

    @property
    def positions(self) -> tuple[int, ...]:
        """All that it stands for: one, several where patches are pooled, none of a node without a position."""
        return self.pooled or (() if self.position is None else (self.position,))

    def rank(self, n_layers: int) -> int:
        """Topological order: all edges run from a lower rank to a higher one.

        Inputs and biases have rank 0, what layer l reads or writes l + 1 (a write cannot reach a read of its own
        layer), targets past the last layer n_layers + 1.
        """
        if self.kind in (*INPUTS, "bias"):
            return 0
        if self.layer is None:
            return n_layers + 1 if self.kind == "target" else 0
        return self.layer + 1

    def caption(self, places: Sequence[str]) -> str:
        """What a person calls it, given a name for each position."""
        place = "" if self.position is None else places[self.position]
        where = place and f"at {place}"
        text = json.dumps(self.label, ensure_ascii=False)
        whose = "" if self.layer is None else f"layer {self.layer}"
        return {
            "token": place,
            "patch": _joined(place, self.layer is not None and f"read by {whose}"),
            "bias": _joined("bias", whose, where),
            "feature": _joined(whose, f"feature {self.feature}", self.label and f"“{self.label}”", where),
            "error": _joined(whose or "pruned input", "error", where),
            "target": self._target_caption(text, where),
        }[self.kind]

    def _target_caption(self, text: str, where: str) -> str:
        if self.feature is not None:
            return f"target layer {self.layer} feature {self.feature} {where}"
        return f"output {text}" if self.vocab is not None else self.label or self.id


def _joined(*parts: str | bool) -> str:
    return " ".join(str(part) for part in parts if part)
