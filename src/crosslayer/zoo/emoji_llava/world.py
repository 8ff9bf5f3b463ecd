"""The world the model knows: emoji scenes whose truth is exact, and what is said about them."""

from .conversation import Turn, conversations
from .language import DESCRIBE, answer, caption, mentions, question
from .objects import OBJECTS, PAIRS
from .picture import render
from .sampling import scenes
from .scene import Placed, Scene

__all__ = [
    "DESCRIBE",
    "OBJECTS",
    "PAIRS",
    "Placed",
    "Scene",
    "Turn",
    "answer",
    "caption",
    "conversations",
    "mentions",
    "question",
    "render",
    "scenes",
]
