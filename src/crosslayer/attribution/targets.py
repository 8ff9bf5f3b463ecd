"""What a graph explains: likely next tokens, named ones, the difference of two, or any direction of the logits.

Axes: P positions, V vocabulary.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.errors import UserError

QUOTED = r"""\s*("[^"]*"|'[^']*')\s*"""
DIFFERENCE = re.compile(rf"{QUOTED}-{QUOTED}$")
SINGLE = re.compile(rf"{QUOTED}$")


@dataclass(frozen=True)
class Target:
    """A direction of the logits at one position."""

    label: str
    vector: Float[Tensor, " V"]
    """What the logits are multiplied with; it adds up to 0, as softmax does not see what all logits share."""
    weight: float
    """What it counts in influence, at most 1 for all targets together."""
    probability: float | None = None
    vocab: int | None = None
    """Token id, of a single token."""


def salient(
    logits: Float[Tensor, " V"], tokenizer: Any, *, probability: float = 0.95, at_most: int = 10
) -> list[Target]:
    """The likeliest next tokens: the smallest set that has this probability, weighted by their own.

    Source: "Circuit Tracing" (Anthropic 2025), section "Constructing an attribution graph".
    """
    likely = logits.double().softmax(0).sort(descending=True)
    enough = int((likely.values.cumsum(0) < probability).sum()) + 1
    ids = likely.indices[: min(enough, at_most)].tolist()
    return [_token(id, tokenizer, logits, None) for id in ids]


def named(text: str, logits: Float[Tensor, " V"], tokenizer: Any) -> Target:
    """A token, or the difference of two: `yes`, `" yes"`, `" yes" - " no"`.

    Raises:
        UserError: when a text is several tokens, naming them, or none.
    """
    if pair := DIFFERENCE.match(text):
        more, less = (token_id(part[1:-1], tokenizer) for part in pair.groups())
        vector = torch.zeros_like(logits)
        vector[more] += 1
        vector[less] -= 1
        return Target(text, vector, 1.0)
    single = SINGLE.match(text)
    return _token(token_id(single[1][1:-1] if single else text, tokenizer), tokenizer, logits, 1.0)


def token_id(text: str, tokenizer: Any) -> int:
    """The id of a text that is one token.

    Raises:
        UserError: when it is several, naming them, or none.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    parts = ", ".join(repr(tokenizer.decode([id])) for id in ids) or "nothing"
    what = "is no token of this model" if len(ids) < 2 else f"is {len(ids)} tokens"
    raise UserError(f"target {text!r} {what} ({parts}); name one of them, a leading space included where it has one")


def weighted(targets: Sequence[Target]) -> list[float]:
    """What each target counts: at most 1 together."""
    total = sum(target.weight for target in targets)
    return [target.weight / max(1.0, total) for target in targets]


def _token(id: int, tokenizer: Any, logits: Tensor, weight: float | None) -> Target:
    probability = logits.double().softmax(0)[id].item()
    vector = torch.full_like(logits, -1 / len(logits))
    vector[id] += 1
    return Target(tokenizer.decode([id]), vector, probability if weight is None else weight, probability, id)
