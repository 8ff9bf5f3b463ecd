"""The world the model knows: emoji scenes whose truth is exact, and what is said about them."""

from crosslayer.zoo.emoji_llava.conversation import Turn, conversations
from crosslayer.zoo.emoji_llava.language import DESCRIBE, answer, caption, mentions, question
from crosslayer.zoo.emoji_llava.objects import OBJECTS, PAIRS
from crosslayer.zoo.emoji_llava.picture import render
from crosslayer.zoo.emoji_llava.sampling import scenes
from crosslayer.zoo.emoji_llava.scene import Placed, Scene

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
