"""What goes into a graph's first layer: tokens, and image patches, each alone or those of one cell of a grid together.

Axes: P positions, C cells: groups of positions whose nodes stand together; one position each unless patches are pooled.
"""

import base64
import io
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from crosslayer.attribution.graph import Picture
from crosslayer.attribution.node import Box, Node
from crosslayer.errors import UserError
from crosslayer.models.prompts import Batch


@dataclass(frozen=True)
class Inputs:
    """The inputs of one prompt."""

    nodes: tuple[Node, ...]
    """One for each of C cells, in the order of their first positions."""
    cell: Int[Tensor, " P"]
    """Which of them each position belongs to."""
    picture: Picture | None


def inputs_of(batch: Batch, tokenizer: Any, picture: Image.Image | None, pool: int | None = None) -> Inputs:
    """The inputs of a prompt.

    Args:
        batch: the prompt.
        tokenizer: the model's.
        picture: the prompt's image.
        pool: patches are taken together in a grid of so many cells a side; each patch stands alone when left out.

    Raises:
        UserError: when there are no patches to pool, they form no square grid, or a smaller one.
    """
    ids, places = batch.tokens[0].tolist(), batch.image[0].nonzero().squeeze(1).tolist()
    side = _side(len(places))
    groups = _groups(len(places), side, side if pool is None else _checked(pool, len(places), side))
    patches, first = {}, torch.arange(len(ids))
    for number, group in enumerate(groups):
        positions = tuple(places[k] for k in group)
        box = None if picture is None or side is None else _box(picture, side, group)
        patches[positions[0]] = _patch(number, positions, ids[positions[0]], box)
        first[list(positions)] = positions[0]
    starts, cell = first.unique(return_inverse=True)
    nodes = [
        patches.get(p) or Node(kind="token", position=p, label=tokenizer.decode([ids[p]]), vocab=ids[p])
        for p in starts.tolist()
    ]
    shown = None if picture is None or side is None else _picture(picture, pool or side)
    return Inputs(tuple(nodes), cell, shown)


def added(layer: int, node: Node) -> Node:
    """The node of what is added to an input's stream as it enters a later layer."""
    return replace(node, kind="patch", layer=layer)


def _patch(number: int, positions: tuple[int, ...], vocab: int, box: Box | None) -> Node:
    first, pooled = positions[0], positions if len(positions) > 1 else ()
    label = f"cell {number}" if pooled else f"patch {first}"
    return Node(kind="patch", position=first, label=label, vocab=vocab, box=box, pooled=pooled)


def _side(n_patches: int) -> int | None:
    """Of a square grid of patches, row by row; None where they form none."""
    side = isqrt(n_patches)
    return side if n_patches and side * side == n_patches else None


def _checked(pool: int, n_patches: int, side: int | None) -> int:
    if not n_patches:
        raise UserError("the prompt has no image patches to pool; leave pool_patches out")
    if side is None:
        raise UserError(f"{n_patches} image patches form no square grid to pool; limit the positions instead")
    if not 1 <= pool <= side:
        raise UserError(f"pool_patches is {pool}, but the patches form a grid of {side} x {side}; choose 1 to {side}")
    return pool


def _groups(n_patches: int, side: int | None, grid: int | None) -> list[list[int]]:
    """Which patches, counted row by row, each cell holds."""
    if side is None or grid is None:
        return [[k] for k in range(n_patches)]
    groups: list[list[int]] = [[] for _ in range(grid * grid)]
    for k in range(n_patches):
        row, column = divmod(k, side)
        groups[row * grid // side * grid + column * grid // side].append(k)
    return groups


def _box(picture: Image.Image, side: int, group: list[int]) -> Box:
    """The pixels around the patches of a cell."""
    width, height = picture.size
    (top, left), (bottom, right) = divmod(group[0], side), divmod(group[-1], side)
    return (width * left // side, height * top // side, width * (right + 1) // side, height * (bottom + 1) // side)


def _picture(picture: Image.Image, grid: int) -> Picture:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(uri, *picture.size, grid, grid)
