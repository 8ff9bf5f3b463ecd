"""What a node is called when graphs of different prompts are put together: by what it is and by the role of its place.

Positions mean nothing across prompts; their roles do. A place is `image` (a patch, or the name that a case gives it),
`prompt` (words before the answer), `answer` (words of the answer so far), `last` (where the target is predicted), or
nothing for what has no position.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from crosslayer.attribution.graph import AttributionGraph
from crosslayer.attribution.node import Node


@dataclass(frozen=True)
class Role:
    """One node of an aggregate: all nodes of a graph that differ in nothing but their position inside a place."""

    kind: str
    """token, patch, feature, error, bias or target."""
    layer: int | None
    feature: int | None
    place: str
    label: str
    """The text of a token; empty otherwise."""

    def __str__(self) -> str:
        what = f'"{self.label.strip()}"' if self.kind == "token" else self.kind
        parts = [
            "" if self.layer is None else f"layer {self.layer}",
            what if self.feature is None else f"feature {self.feature}",
            self.place and f"at {self.place}",
        ]
        return " ".join(part for part in parts if part)


def roles(graph: AttributionGraph, token: int = 0, patches: Mapping[int, str] | None = None) -> list[Role]:
    """The role of each node.

    Args:
        graph: of one prompt.
        token: which token of the answer it explains, as `attribute` was told.
        patches: names for some image patches, by their number in reading order; the others are `image`. A cell of
            pooled patches has the names of its patches, joined by " + " where they are several.
    """
    where = places(graph, token, patches or {})
    return [_role(node, where) for node in graph.nodes]


def places(graph: AttributionGraph, token: int, patches: Mapping[int, str]) -> list[str]:
    """The place that each position belongs to; see `roles`."""
    last = max(node.position or 0 for node in graph.nodes if node.kind == "target")
    found = ["prompt" if p <= last - token else "answer" for p in range(len(graph.tokens))]
    found[last] = "last"
    cells = [
        node.pooled or (node.position or 0,) for node in graph.nodes if node.kind == "patch" and node.layer is None
    ]
    number = {position: n for n, position in enumerate(sorted(p for cell in cells for p in cell))}
    for cell in cells:
        names = [patches[number[p]] for p in cell if number[p] in patches]
        for position in cell:
            found[position] = " + ".join(dict.fromkeys(names)) or "image"
    return found


def _role(node: Node, where: Sequence[str]) -> Role:
    place = "" if node.position is None else where[node.position]
    if node.kind == "target":
        return Role("target", None, None, "", "")
    return Role(node.kind, node.layer, node.feature, place, node.label if node.kind == "token" else "")
