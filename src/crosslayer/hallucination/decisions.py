"""Where a response decides to name an object: the token at which naming it and not naming it part ways.

With nothing more known than the labelled response, that is the first token of the mention, against all other tokens;
of a question, "yes" against "no". Where it is known what the response would be without the mention, it is the first
token at which the two differ: often the comma before the mention, where a list goes on instead of ending.

Axes: B decisions, P positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.hallucination.responses import NO, QUESTION, YES, Mention, Response
from crosslayer.hallucination.spans import response_tokens
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch, prepare

Without = Callable[[Response, Mention], str | None]
"""What a response would be without a mention; None where that is not known."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One object that a response names, and the token that decides it."""

    response: Response
    mention: Mention
    place: int
    """Which token of the response decides, from 0 on."""
    chosen: int
    """Its id."""
    instead: int | None
    """Id of the token that would have stood there without the mention; None where that is not known."""

    @property
    def hallucinated(self) -> bool:
        """Whether the object is not there."""
        return self.mention.hallucinated


def decisions(model: LoadedModel, responses: Sequence[Response], without: Without | None = None) -> list[Decision]:
    """The decisions of labelled responses; those of a response in the order of its mentions.

    Args:
        model: whose tokens the responses are.
        responses: labelled with a tokenizer, so that their mentions have token spans.
        without: tells what captions would be without a mention.
    """
    return list(_decisions(model, responses, without))


def _decisions(model: LoadedModel, responses: Sequence[Response], without: Without | None) -> Iterator[Decision]:
    for response in responses:
        for mention in response.mentions:
            if response.token_ids is None or mention.tokens is None or mention.tokens[0] >= mention.tokens[1]:
                continue
            other = _other(response, mention, without)
            place, instead = mention.tokens[0], None
            if other is not None:
                ids, _ = response_tokens(model.processor, response.example(Path(), other))
                parting = _parting(response.token_ids, ids)
                if parting is None:
                    continue
                place, instead = parting, ids[parting]
            chosen = response.token_ids[place]
            yield Decision(response=response, mention=mention, place=place, chosen=chosen, instead=instead)


def _other(response: Response, mention: Mention, without: Without | None) -> str | None:
    """The response without the mention."""
    if response.kind != QUESTION:
        return None if without is None else without(response, mention)
    start, end = mention.chars
    said = response.response[start:end]
    no = NO.upper() if said.isupper() and len(said) > 1 else NO.capitalize() if said.istitle() else NO
    return response.response[:start] + no + response.response[end:] if said.lower() == YES else None


def _parting(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The first place at which both have a token and these differ."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)


@dataclass(frozen=True)
class Decided:
    """Decisions as one batch for the model, responses given."""

    batch: Batch
    position: Int[Tensor, " B"]
    """At which each decision's token is predicted."""
    chosen: Int[Tensor, " B"]
    instead: Int[Tensor, " B"]
    """-1 where it is not known."""

    def margin(self, logits: Float[Tensor, "B P V"]) -> Float[Tensor, " B"]:
        """How much likelier each mention is than what stands against it, in logits, with gradients.

        Against a known token: the difference of both logits. Otherwise the log-odds of the token chosen.
        """
        rows = torch.arange(len(self.position), device=logits.device)
        at = logits[rows, self.position]
        chosen = at[rows, self.chosen]
        others = at.scatter(1, self.chosen[:, None], -torch.inf).logsumexp(1)
        known = at[rows, self.instead.clamp_min(0)]
        return chosen - torch.where(self.instead >= 0, known, others)


def as_batch(model: LoadedModel, made: Sequence[Decision], folder: Path) -> Decided:
    """Decisions, ready for one forward pass; `folder` is that of the responses' file."""
    batch = prepare(model.model, model.processor, [decision.response.answered(folder) for decision in made])
    start = batch.response.long().argmax(1)
    place = torch.tensor([decision.place for decision in made], device=start.device)
    chosen = torch.tensor([decision.chosen for decision in made], device=start.device)
    instead = torch.tensor([-1 if d.instead is None else d.instead for d in made], device=start.device)
    return Decided(batch, start + place - 1, chosen, instead)
