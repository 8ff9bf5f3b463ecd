"""Hallucinated mentions and true ones to compare them with: of the same object, near the same position.

Matching is by strata: mentions of the same object, in the same kind of response, in the same stretch of `near` tokens.
What is compared within a stratum is then neither due to the object nor to where in a caption it is named.

Axes: N decisions, B resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int

from crosslayer.errors import UserError
from crosslayer.hallucination.decisions import Decision, Without, decisions
from crosslayer.hallucination.responses import Response
from crosslayer.hallucination.splits import SPLITS, split_responses
from crosslayer.models.load import LoadedModel

SPLIT = "select"
"""The only split that anything here looks at."""
About = Literal["captions", "questions", "both"]
KINDS = {"captions": ("caption",), "questions": ("question",), "both": ("caption", "question")}


@dataclass(frozen=True)
class Compared:
    """Decisions with what they are matched on."""

    decisions: tuple[Decision, ...]
    """Those of a response one after the other."""
    hallucinated: Bool[np.ndarray, " N"]
    stratum: Int[np.ndarray, " N"]
    image: Int[np.ndarray, " N"]
    """Number of the image, from 0 on."""
    left_out: int = 0
    """Mentions without a decision: they have no token span, or the response without them parts from it nowhere."""

    @staticmethod
    def of(made: Sequence[Decision], near: int, left_out: int = 0) -> "Compared":
        """Compare decisions, those whose mentions begin in the same stretch of `near` tokens with each other."""
        labels = [_stratum(decision, near) for decision in made]
        strata, images = sorted(set(labels)), sorted({decision.response.image_id for decision in made})
        by_label, by_image = ({name: i for i, name in enumerate(names)} for names in (strata, images))
        return Compared(
            tuple(made),
            np.array([decision.hallucinated for decision in made], bool),
            np.array([by_label[label] for label in labels], np.int64),
            np.array([by_image[decision.response.image_id] for decision in made], np.int64),
            left_out,
        )

    @property
    def matched(self) -> Bool[np.ndarray, " N"]:
        """Whether a decision's stratum has both hallucinated mentions and true ones."""
        these, those = (np.isin(self.stratum, self.stratum[side]) for side in (self.hallucinated, ~self.hallucinated))
        return these & those

    def only(self, chosen: Int[np.ndarray, " n"]) -> "Compared":
        """Some of the decisions, in strata as they are."""
        images = np.unique(self.image[chosen], return_inverse=True)[1]
        made = tuple(self.decisions[i] for i in chosen)
        return Compared(made, self.hallucinated[chosen], self.stratum[chosen], images)

    def some(self, most: int, seed: int) -> Int[np.ndarray, " n"]:
        """At most so many matched hallucinated decisions, and as many true ones of their strata, drawn by a seed."""
        order = np.random.default_rng(seed).permutation(len(self.decisions))
        these = order[(self.matched & self.hallucinated)[order]][:most]
        partners = ~self.hallucinated & np.isin(self.stratum, self.stratum[these])
        return np.sort(np.concatenate([these, order[partners[order]][:most]]))

    def resampled(self, resamples: int, seed: int) -> Float64[np.ndarray, "B N"]:
        """How often each decision occurs in bootstrap resamples of the images."""
        n = int(self.image.max()) + 1
        drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
        return drawn[:, self.image].astype(np.float64)


def compared(
    model: LoadedModel,
    responses: Sequence[Response],
    *,
    about: About = "both",
    near: int = 6,
    at_least: int = 10,
    split_seed: int = 0,
    without: Without | None = None,
) -> Compared:
    """The decisions of the split `select`, hallucinated ones and true ones.

    Args:
        model: whose tokens the responses are.
        responses: labelled.
        about: which responses.
        near: tokens within which mentions count as near each other.
        at_least: hallucinating responses wanted in every split, and hallucinated mentions with a true match in this.
        split_seed: of the splits.
        without: see `decisions`.

    Raises:
        UserError: when mentions have no token spans, or too few are hallucinated or matched, with how many it takes.
    """
    asked = [response for response in responses if response.kind in KINDS[about]]
    _check_spans(asked, about)
    chosen = split_responses(asked, seed=split_seed, at_least=at_least)[SPLIT]
    made = decisions(model, chosen, without)
    found = Compared.of(made, near, sum(len(response.mentions) for response in chosen) - len(made))
    n, matched = (int((found.hallucinated & keep).sum()) for keep in (True, found.matched))
    if matched < at_least:
        raise UserError(
            f"of {n} hallucinated mentions in the split {SPLIT}, {matched} have a true one of the same object within "
            f"{near} tokens, {at_least} are needed; widen --near, or label more responses: about "
            f"{_wanted(len(responses), matched, at_least)} in all would do"
        )
    return found


def _stratum(decision: Decision, near: int) -> tuple[str, str, int]:
    assert decision.mention.tokens is not None
    return decision.response.kind, decision.mention.object, decision.mention.tokens[0] // near


def _wanted(n_responses: int, matched: int, at_least: int) -> str:
    """How many responses would give enough matches, if it goes on like this."""
    return f"{-(-n_responses * at_least // matched):,}" if matched else f"{round(2 * at_least / SPLITS[SPLIT])}+ alike"


def _check_spans(responses: Sequence[Response], about: str) -> None:
    mentions = [(response, mention) for response in responses for mention in response.mentions]
    if not mentions:
        raise UserError(f"none of {len(responses)} responses ({about}) names an object, so there is nothing to compare")
    if all(mention.tokens is None for _, mention in mentions):
        raise UserError(
            f"none of {len(mentions)} mentions has a token span; label the responses with the model's tokenizer: "
            "crosslayer hallucination score MODEL DATA --answers FILE"
        )
    for response, mention in mentions:
        end, n = (mention.tokens or (0, 0))[1], len(response.token_ids or ())
        if end > n or not response.response[slice(*mention.chars)].strip():
            raise UserError(
                f"{response.id}: its mention of {mention.object!r} (characters {mention.chars}, tokens "
                f"{mention.tokens}) lies outside its response of {len(response.response)} characters and {n} tokens; "
                "label it again"
            )
