"""Which images features are chosen on, strengths are set on, and results are reported on: never the same ones."""

from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate

from crosslayer.errors import UserError
from crosslayer.hallucination.responses import Response

SPLITS = {"select": 0.4, "calibrate": 0.2, "test": 0.4}
"""Shares of the images."""


def split_responses(responses: Sequence[Response], *, seed: int = 0, at_least: int = 1) -> dict[str, list[Response]]:
    """Responses by split. An image's split depends on its id and the seed alone, so that data can be added.

    Args:
        responses: labelled.
        seed: of the splits.
        at_least: responses that hallucinate, wanted in every split.

    Raises:
        UserError: when a split has fewer, with how many responses it would take.
    """
    parts: dict[str, list[Response]] = {name: [] for name in SPLITS}
    for response in responses:
        parts[split_of(response.image_id, seed)].append(response)
    for name, part in parts.items():
        n = sum(response.hallucinates for response in part)
        if n < at_least:
            total = sum(response.hallucinates for response in responses)
            wanted = max(2 * round(at_least / min(SPLITS.values())), 2 * total)
            raise UserError(
                f"of {total} responses that hallucinate, {n} fall to the split {name}, {at_least} are needed; "
                f"about {wanted} in all would do"
            )
    return parts


def split_of(image_id: str, seed: int = 0) -> str:
    """The split of an image."""
    place = int.from_bytes(blake2b(f"{seed}:{image_id}".encode(), digest_size=8).digest()) / 2**64
    ends = zip(SPLITS, accumulate(SPLITS.values()), strict=True)
    return next((name for name, end in ends if place < end), "test")
