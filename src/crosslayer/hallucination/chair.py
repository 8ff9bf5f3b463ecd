"""CHAIR: how much of what captions name is not in the picture.

Rohrbach et al., "Object Hallucination in Image Captioning" (EMNLP 2018), section 3.1. Every mention counts, repeated
ones too; object recall, which CHAIR alone would let a silent model win by losing, counts each object once.
"""

from crosslayer.hallucination.measures import Measure
from crosslayer.hallucination.responses import Response


def _hallucinated(response: Response) -> int:
    return sum(mention.hallucinated for mention in response.mentions)


def _recalled(response: Response) -> int:
    return len({mention.object for mention in response.mentions} & set(response.truth))


CHAIR = (
    Measure("chair_i", _hallucinated, lambda r: len(r.mentions)),
    Measure("chair_s", lambda r: r.hallucinates, lambda r: 1),
    Measure("object_recall", _recalled, lambda r: len(set(r.truth))),
    Measure("length_words", lambda r: len(r.response.split()), lambda r: 1),
)
"""Hallucinated mentions of all mentions; captions with at least one; true objects that are named; words a caption."""
