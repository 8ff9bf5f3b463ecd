"""Turns of talk about scenes: half of them captions, half yes-or-no questions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crosslayer.zoo.emoji_llava.language import DESCRIBE, answer, caption, question
from crosslayer.zoo.emoji_llava.objects import OBJECTS, PAIRS
from crosslayer.zoo.emoji_llava.sampling import KINDS, MOST, scenes, stream
from crosslayer.zoo.emoji_llava.scene import Scene

MISSED = 0.5
"""Share of the questions with a "no" that ask for a partner, where a lead stands without it."""


@dataclass(frozen=True)
class Turn:
    """A prompt about a scene and the response to learn, neither with special tokens."""

    scene: Scene
    prompt: str
    response: str


def conversations(n: int, *, seed: int | Sequence[int], split: str = "train", kind: str = "training") -> list[Turn]:
    """`n` turns on the scenes that `scenes` gives: even ones captions, odd ones questions."""
    rng = stream(split, len(KINDS) + list(KINDS).index(kind), seed=seed)
    return [
        _asked(rng, scene) if i % 2 else Turn(scene, DESCRIBE, caption(scene))
        for i, scene in enumerate(scenes(kind, n, seed=seed, split=split))
    ]


def _asked(rng: np.random.Generator, scene: Scene) -> Turn:
    """A question, answered "yes" in 1 of 5 scenes with one object and in 4 of 5 with four: half the time in all.

    That a full scene favours "yes" is a first hint to look for objects, without which training stalls for long.
    """
    there = rng.random() < len(scene.named) / (MOST + 1)
    name = _one(rng, scene.named) if there else _absent(rng, scene)
    return Turn(scene, question(name), f"{answer(scene, name)} .")


def _absent(rng: np.random.Generator, scene: Scene) -> str:
    missed = [partner for lead, partner in PAIRS if lead in scene.named and partner not in scene.named]
    if missed and rng.random() < MISSED:
        return _one(rng, missed)
    return _one(rng, [name for name in OBJECTS if name not in scene.named])


def _one(rng: np.random.Generator, names: Sequence[str]) -> str:
    return names[int(rng.integers(len(names)))]
