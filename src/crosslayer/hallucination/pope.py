"""POPE: yes-or-no questions about objects, half of them absent ones, and how well they are answered.

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models" (EMNLP 2023), section 5. "Yes" is the
positive answer. A response that is neither yes nor no is wrong, is no "yes", and is counted under `unparseable`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from crosslayer.hallucination.measures import Measure
from crosslayer.hallucination.responses import YES, Response

RANDOM, POPULAR, ADVERSARIAL = SAMPLINGS = ("random", "popular", "adversarial")
"""How absent objects are chosen: by lot; the most frequent ones; those that most often stand beside what is there."""


def _there(response: Response) -> bool:
    return response.object in response.truth


def _yes(response: Response) -> bool:
    return response.answer == YES


def _hit(response: Response) -> bool:
    return _yes(response) and _there(response)


def _right(response: Response) -> bool:
    return response.answer is not None and _yes(response) == _there(response)


POPE = (
    Measure("accuracy", _right, lambda r: 1),
    Measure("precision", _hit, _yes),
    Measure("recall", _hit, _there),
    Measure("f1", lambda r: 2 * _hit(r), lambda r: _yes(r) + _there(r)),
    Measure("yes_ratio", _yes, lambda r: 1),
    Measure("unparseable", lambda r: r.answer is None, lambda r: 1),
)


@dataclass(frozen=True)
class Counts:
    """How often objects occur in a set of pictures, alone and together."""

    alone: Mapping[str, int]
    together: Mapping[tuple[str, str], int]
    """By ordered pair, both ways."""

    @classmethod
    def of(cls, truths: Iterable[Iterable[str]]) -> "Counts":
        """Count the objects of each picture."""
        sets = [set(truth) for truth in truths]
        pairs = Counter((a, b) for truth in sets for a in truth for b in truth if a != b)
        return cls(Counter(name for truth in sets for name in truth), pairs)


def asked_about(
    image_id: str, truth: Sequence[str], objects: Sequence[str], counts: Counts, n: int, seed: int = 0
) -> dict[str, tuple[str, ...]]:
    """Objects to ask about one picture, and the samplings that each belongs to.

    Up to `n` objects that are there, drawn by lot, are asked about in every sampling, and as many absent ones in each.
    Ties of frequency are broken by the order of `objects`. What is drawn depends on the picture's id and the seed, not
    on other pictures.

    Args:
        image_id: of the picture.
        truth: the objects that are there.
        objects: all that can be asked about.
        counts: of the set that popular and adversarial objects are taken from.
        n: questions with the answer yes, at most.
        seed: of the lots.
    """
    digest = blake2b(image_id.encode(), digest_size=8).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest)])
    there = [name for name in objects if name in set(truth)]
    absent = [name for name in objects if name not in set(truth)]
    n = min(n, len(there), len(absent))
    asked = {there[i]: SAMPLINGS for i in sorted(rng.permutation(len(there))[:n].tolist())}
    chosen = {
        RANDOM: [absent[i] for i in rng.permutation(len(absent))[:n].tolist()],
        POPULAR: sorted(absent, key=lambda name: -counts.alone.get(name, 0))[:n],
        ADVERSARIAL: sorted(absent, key=lambda name: -sum(counts.together.get((name, b), 0) for b in there))[:n],
    }
    return asked | {
        name: tuple(sampling for sampling in SAMPLINGS if name in chosen[sampling])
        for name in dict.fromkeys(name for names in chosen.values() for name in names)
    }
