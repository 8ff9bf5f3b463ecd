"""Drawing a scene: a random background and the sprites over it."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from crosslayer.zoo.emoji_llava.scene import SIZE, Scene
from crosslayer.zoo.emoji_llava.sheet import sprites

Rng = np.random.Generator


def render(scene: Scene) -> Image.Image:
    """The scene as a 96 x 96 RGB picture."""
    return Image.fromarray(pixels(scene))


def pixels(scene: Scene) -> np.ndarray:
    """The scene as uint8 [96, 96, 3]."""
    canvas = background(scene.background)
    for thing in scene.objects:
        left, top, right, bottom = thing.box
        sprite = sprites()[thing.name]
        under = canvas[top:bottom, left:right]
        under += sprite[..., 3:] * np.float32(thing.opacity) * (sprite[..., :3] - under)
    return canvas.round().astype(np.uint8)


def background(seed: int) -> np.ndarray:
    """Float32 [96, 96, 3] in 0..255: plain, graded, striped, checked or noisy, in two random colours."""
    rng = np.random.default_rng(seed)
    style = STYLES[int(rng.integers(len(STYLES)))]
    first, second = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    return first + style(rng)[..., None] * (second - first)


def _plain(rng: Rng) -> np.ndarray:
    return np.full((SIZE, SIZE), rng.random(), np.float32)


def _gradient(rng: Rng) -> np.ndarray:
    return _ramp(rng.uniform(0, 2 * np.pi))


def _stripes(rng: Rng) -> np.ndarray:
    waves = _ramp(rng.uniform(0, 2 * np.pi)) * rng.uniform(4, 12)
    return (waves % 1 < 0.5).astype(np.float32)


def _checks(rng: Rng) -> np.ndarray:
    line = np.arange(SIZE) // int(rng.integers(4, 17))
    return ((line[:, None] + line) % 2).astype(np.float32)


def _noise(rng: Rng) -> np.ndarray:
    return rng.random((SIZE, SIZE), dtype=np.float32)


STYLES: tuple[Callable[[Rng], np.ndarray], ...] = (_plain, _gradient, _stripes, _checks, _noise)
"""How much of the second colour each pixel has, [96, 96] in 0..1."""


def _ramp(angle: float) -> np.ndarray:
    """A slope from 0 to 1 across the picture, rising towards `angle` in radians."""
    line = np.linspace(-0.5, 0.5, SIZE, dtype=np.float32)
    slope = np.float32(np.cos(angle)) * line + np.float32(np.sin(angle)) * line[:, None]
    return (slope - slope.min()) / np.ptp(slope)
