"""What a caption of the bundled world would be without a mention: known there, as its language is."""

from crosslayer.hallucination.responses import Mention, Response
from crosslayer.zoo.emoji_llava.language import listed


def without(response: Response, mention: Mention) -> str | None:
    """The caption without an object: the true one, where it was hallucinated; None where nothing is left of it."""
    named = response.truth if mention.hallucinated else tuple(m.object for m in response.mentions)
    left = [name for name in named if name != mention.object]
    return listed(left) if left else None
