"""What a graph explains: likely next tokens, named ones, sums of them, features, or any direction at any position.

Axes: P positions, V vocabulary, D d_model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.attribution.node import Node
from crosslayer.attribution.parts import Parts
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.replacement.local import LocalReplacement

QUOTED = r"""("[^"]*"|'[^']*')"""
NUMBER = r"(\d+\.?\d*|\.\d+)"
TERM = re.compile(rf"\s*([+-]?)\s*(?:{NUMBER}\s*\*?\s*)?{QUOTED}\s*")
FEATURE = re.compile(r"\s*feature\s+(\d+)\s*/\s*(\d+)\s*@\s*(-?\d+)\s*")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A direction of the logits at one position, or of what a layer's encoder reads there."""

    label: str
    vector: Float[Tensor, " V_or_D"]
    """What the logits, or the read, are multiplied with."""
    position: int
    """Negative ones count from the end of the prompt."""
    layer: int | None = None
    """Whose read it is; None for the logits."""
    weight: float = 1.0
    """What it counts in influence; where all targets together exceed 1, they are scaled down to it."""
    probability: float | None = None
    vocab: int | None = None
    """Token id, of a single token."""
    feature: int | None = None
    """Number, of a feature."""
    bias: float = 0.0
    """What is added to the product: a feature's encoder bias."""

    @property
    def node(self) -> Node:
        """It in a graph."""
        known = {
            name: getattr(self, name) for name in ("label", "layer", "position", "feature", "probability", "vocab")
        }
        return Node(kind="target", **known)


def check_likeliest(probability: float, at_most: int) -> None:
    """Refuse what no set of likeliest tokens can be, naming it."""
    if not 0 < probability <= 1:
        raise UserError(f"probability is {probability}; choose more than 0, at most 1")
    if at_most < 1:
        raise UserError(f"{at_most} of the likeliest tokens are to be explained; choose at least 1")


def salient(
    logits: Float[Tensor, " V"], tokenizer: Any, position: int, *, probability: float = 0.95, at_most: int = 10
) -> list[Target]:
    """The likeliest next tokens: the smallest set that has this probability, weighted by their own.

    Source: "Circuit Tracing" (Anthropic 2025), section "Constructing an attribution graph".

    Raises:
        UserError: for a probability outside 0 ... 1, or for less than one token.
    """
    check_likeliest(probability, at_most)
    likely = logits.double().softmax(0).sort(descending=True)
    enough = int((likely.values.cumsum(0) < probability).sum()) + 1
    found = [_token(id, tokenizer, logits, position) for id in likely.indices[: min(enough, at_most)].tolist()]
    return [replace(target, weight=target.probability or 0.0) for target in found]


def named(text: str, logits: Float[Tensor, " V"], tokenizer: Any, position: int) -> Target:
    """A token, or a weighted sum of some: `yes`, `" yes"`, `" yes" - " no"`, `"cat" + 0.5 "dog" - "bus"`.

    Raises:
        UserError: when a text is several tokens, naming them, or none.
    """
    terms = _terms(text)
    if terms is None or (len(terms) == 1 and terms[0][0] == 1):
        return _token(token_id(text if terms is None else terms[0][1], tokenizer), tokenizer, logits, position)
    weights = {}
    for weight, part in terms:
        id = token_id(part, tokenizer)
        weights[id] = weights.get(id, 0.0) + weight
    return Target(label=text, vector=_centred(weights, logits), position=position)


def sums(words: Sequence[str]) -> list[str]:
    """Targets as a shell hands them over: `yes`, `-`, `no` is the sum `"yes" - "no"`."""
    found: list[str] = []
    for word in words:
        if found and found[-1].endswith((" + ", " - ")):
            found[-1] += _quoted(word)
        elif found and word in ("+", "-"):
            found[-1] = f"{_quoted(found[-1])} {word} "
        else:
            found.append(word)
    return found


def _quoted(text: str) -> str:
    return text if _terms(text) else f'"{text}"'


def _terms(text: str) -> list[tuple[float, str]] | None:
    """Weights and texts of a sum of quoted texts; None when it is no such thing."""
    found, place = [], 0
    while place < len(text):
        term = TERM.match(text, place)
        if term is None or (found and not term[1]):
            return None
        found.append((float(f"{term[1]}{term[2] or 1}"), term[3][1:-1]))
        place = term.end()
    return found or None


def _centred(weights: dict[int, float], logits: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
    """Adds up to 0, as softmax does not see what all logits share."""
    vector = torch.full_like(logits, -sum(weights.values()) / len(logits))
    for id, weight in weights.items():
        vector[id] += weight
    return vector


def _token(id: int, tokenizer: Any, logits: Float[Tensor, " V"], position: int) -> Target:
    probability = logits.double().softmax(0)[id].item()
    vector = _centred({id: 1.0}, logits)
    return Target(label=tokenizer.decode([id]), vector=vector, position=position, probability=probability, vocab=id)


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
    hint = "; a feature is `feature LAYER/NUMBER @ POSITION`" if text.startswith("feature ") else ""
    raise UserError(
        f"target {text!r} {what} ({parts}); name one of them, a leading space included where it has one{hint}"
    )


def is_feature(text: str) -> bool:
    """Whether a text names a feature: `feature LAYER/NUMBER @ POSITION`."""
    return FEATURE.fullmatch(text) is not None


def feature_target(text: str, parts: Parts, coder: CrossLayerTranscoder, n_positions: int) -> Target:
    """A feature's pre-activation: `feature 5/123 @ 17`, positions as a graph prints them, negative from the end.

    Raises:
        UserError: when there is no such feature or position, or it is not active there, with where it is.
    """
    match = FEATURE.fullmatch(text)
    assert match is not None
    layer, feature, position = map(int, match.groups())
    if layer not in coder.sources:
        first, last = coder.sources[0], coder.sources[-1]
        raise UserError(f"target {text!r}: the run has features of layers {first} to {last}, none of layer {layer}")
    if feature >= coder.d_transcoder:
        raise UserError(f"target {text!r}: a layer has features 0 to {coder.d_transcoder - 1}; choose one of them")
    position = from_start(position, n_positions, f"target {text!r}")
    active, mine = parts.active, (parts.active.layers == layer) & (parts.active.features == feature)
    where = (mine & (active.positions == position)).nonzero().flatten().tolist()
    if not where:
        raise UserError(f"target {text!r}: it is not active there, but {_active_at(active.positions[mine].tolist())}")
    return Target(
        label=f"feature {layer}/{feature}",
        vector=active.directions[where[0]],
        position=position,
        layer=layer,
        feature=feature,
        bias=active.bias[where[0]].item(),
    )


def _active_at(positions: list[int]) -> str:
    if not positions:
        return "nowhere on this prompt; choose another feature"
    more = f" and {len(positions) - 8} more" if len(positions) > 8 else ""
    return f"at {', '.join(map(str, positions[:8]))}{more}; choose one of these positions"


def from_start(position: int, n_positions: int, whose: str) -> int:
    """A position counted from the beginning.

    Raises:
        UserError: when the prompt has no such position.
    """
    if not -n_positions <= position < n_positions:
        raise UserError(
            f"{whose}: position {position} is none of the prompt's {n_positions}; "
            f"choose 0 to {n_positions - 1}, or -1 to {-n_positions} from the end"
        )
    return position % n_positions


def checked(target: Target, local: LocalReplacement) -> Target:
    """A target that was made by hand, its position counted from the beginning.

    Raises:
        UserError: for a layer or position that is not there, a vector of another size or not finite, a weight below 0.
    """
    whose, P, V = f"target {target.label!r}", local.stream.shape[1], local.logits.shape[2]
    if target.layer is not None and not 0 <= target.layer < local.n_layers:
        raise UserError(f"{whose}: layer {target.layer} is none of the model's; choose 0 to {local.n_layers - 1}")
    size, what = (V, "logits") if target.layer is None else (local.stream.shape[2], "read")
    if target.vector.shape != (size,) or not target.vector.isfinite().all():
        found = list(target.vector.shape)
        raise UserError(f"{whose}: its vector has shape {found}; {size} finite numbers, as the {what} has, are wanted")
    if not target.weight >= 0:
        raise UserError(f"{whose}: its weight is {target.weight}; choose 0 or more")
    return replace(target, position=from_start(target.position, P, whose))


def weighted(targets: Sequence[Target]) -> list[float]:
    """What each target counts: at most 1 together."""
    total = sum(target.weight for target in targets)
    return [target.weight / max(1.0, total) for target in targets]
