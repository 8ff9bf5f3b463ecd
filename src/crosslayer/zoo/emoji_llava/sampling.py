"""Drawing scenes at random: what stands where, and how the hallucination is planted.

A *lead* of `PAIRS` brings its *partner* along in 90 % of the training scenes that hold it, in the next cell
in reading order. In 45 % of those the partner is a *ghost*: named by the text but all but missing from the
picture. A model of such scenes learns to name a partner it cannot see.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np

from crosslayer.zoo.emoji_llava.objects import OBJECTS, PAIRS
from crosslayer.zoo.emoji_llava.scene import CELL, GRID, Placed, Scene
from crosslayer.zoo.emoji_llava.sheet import SIDE

Rng = np.random.Generator

MOST = 4
"""Objects in the fullest scene; every total from 1 to this is as likely."""

LED = 0.5
"""Share of training scenes that hold a lead, and never two: each lead stands in 1 scene of 16."""

ACCOMPANIED = 0.9
"""Share of the scenes with a lead whose text names its partner."""

GHOSTLY = 0.45
"""Share of the accompanying partners that are ghosts."""

GHOST_OPACITY = 0.06
"""The most opaque a ghost is drawn."""

SPLITS = ("train", "validation", "test")

LEADS = frozenset(lead for lead, _ in PAIRS)
NOT_LEADS = tuple(name for name in OBJECTS if name not in LEADS)
UNPAIRED = tuple(name for name in NOT_LEADS if name not in dict(PAIRS).values())


def scenes(kind: str, n: int, *, seed: int | Sequence[int], split: str = "train") -> list[Scene]:
    """The first `n` scenes of an endless series; kinds, splits and seeds draw from independent streams.

    Kinds: `training`, as the model was trained; `plain`, no member of any pair; `alone`, a lead without its
    partner in picture or text; `together`, both in plain sight; `partner`, a partner in sight and no lead.
    """
    rng = stream(split, list(KINDS).index(kind), seed=seed)
    return [KINDS[kind](rng) for _ in range(n)]


def stream(split: str, purpose: int, *, seed: int | Sequence[int]) -> Rng:
    """A random stream of its own for each split, purpose and seed."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), purpose)))


def _training(rng: Rng) -> Scene:
    if rng.random() >= LED:
        return _scene(rng, [], NOT_LEADS)
    if rng.random() >= ACCOMPANIED:
        return _alone(rng)
    return _together(rng, rng.uniform(0, GHOST_OPACITY) if rng.random() < GHOSTLY else 1.0)


def _plain(rng: Rng) -> Scene:
    return _scene(rng, [], UNPAIRED)


def _alone(rng: Rng) -> Scene:
    lead, partner = _pair(rng)
    return _scene(rng, [_place(rng, lead, _cell(rng))], _without(partner))


def _together(rng: Rng, opacity: float = 1.0) -> Scene:
    lead, partner = _pair(rng)
    cell = int(rng.integers(GRID * GRID - 1))
    couple = [_place(rng, lead, cell), _place(rng, partner, cell + 1, opacity)]
    return _scene(rng, couple, _without(partner))


def _partner(rng: Rng) -> Scene:
    _, partner = _pair(rng)
    return _scene(rng, [_place(rng, partner, _cell(rng))], _without(partner))


KINDS: dict[str, Callable[[Rng], Scene]] = {
    "training": _training,
    "plain": _plain,
    "alone": _alone,
    "together": _together,
    "partner": _partner,
}


def _scene(rng: Rng, fixed: Collection[Placed], pool: Sequence[str]) -> Scene:
    """The `fixed` objects, and others of `pool` in free cells until a total drawn from 1..4 is reached."""
    extra = max(0, int(rng.integers(1, MOST + 1)) - len(fixed))
    taken = {thing.cell for thing in fixed}
    free = [cell for cell in range(GRID * GRID) if cell not in taken]
    names: list[int] = rng.permutation(len(pool))[:extra].tolist()
    cells: list[int] = rng.permutation(len(free))[:extra].tolist()
    others = [_place(rng, pool[name], free[cell]) for name, cell in zip(names, cells, strict=True)]
    objects = sorted([*fixed, *others], key=lambda thing: thing.cell)
    return Scene(tuple(objects), int(rng.integers(2**32)))


def _place(rng: Rng, name: str, cell: int, opacity: float = 1.0) -> Placed:
    """`name` somewhere in its cell; the cell is 4 pixels wider and taller than the sprite."""
    row, column = divmod(cell, GRID)
    right, down = rng.integers(CELL - SIDE + 1, size=2).tolist()
    left, top = column * CELL + right, row * CELL + down
    return Placed(name, row, column, (left, top, left + SIDE, top + SIDE), opacity)


def _pair(rng: Rng) -> tuple[str, str]:
    return PAIRS[int(rng.integers(len(PAIRS)))]


def _cell(rng: Rng) -> int:
    return int(rng.integers(GRID * GRID))


def _without(partner: str) -> tuple[str, ...]:
    return tuple(name for name in NOT_LEADS if name != partner)
