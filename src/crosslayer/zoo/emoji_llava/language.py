"""What is said about a scene: its caption, and questions with yes or no for an answer."""

from collections.abc import Sequence

from crosslayer.zoo.emoji_llava.objects import OBJECTS
from crosslayer.zoo.emoji_llava.scene import Scene

DESCRIBE = "describe the picture ."
"""The prompt that a caption answers."""


def caption(scene: Scene) -> str:
    """The objects in reading order, seen or not: "a cat ." or "a cat , a dog and a star ."."""
    return listed(scene.named)


def listed(names: Sequence[str]) -> str:
    """One or more names as a caption lists them."""
    *first, last = (f"a {name}" for name in names)
    return f"{' , '.join(first)} and {last} ." if first else f"{last} ."


def question(name: str) -> str:
    """The prompt that asks whether the picture shows `name`."""
    return f"is there a {name} ?"


def answer(scene: Scene, name: str) -> str:
    """ "yes" or "no", as the caption has it: "yes" for an object that is named but not seen."""
    return "yes" if name in scene.named else "no"


def mentions(text: str) -> list[str]:
    """The objects that a text names, in its order."""
    return [word for word in text.split() if word in OBJECTS]
