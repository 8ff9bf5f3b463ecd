"""Which answers are traced: hallucinated ones, true ones that match them, and others."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crosslayer.attribution.many import Case
from crosslayer.errors import UserError
from crosslayer.hallucination.circuits.looking import Looks, quoted
from crosslayer.hallucination.circuits.standing import patches
from crosslayer.hallucination.decisions import Decision
from crosslayer.hallucination.responses import CAPTION, Mention, Response
from crosslayer.zoo.emoji_llava.language import listed

HALLUCINATED, TRUE, REFERENCE = "hallucinated", "true", "reference"
"""The sets. Each true one is of the same object and at the same place as a hallucinated one, as far as there are such;
reference ones are true, of objects that are never hallucinated, in pictures where it is known what stands where."""
DECISION, NAMING = "decision", "naming"
"""The moments: where the token is predicted that commits the answer to a mention, and where the object is named."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One graph."""

    decision: Decision
    moment: str
    case: Case

    @property
    def set(self) -> str:
        """The set that it belongs to."""
        return self.case.label


def unsaid(response: Response, mention: Mention) -> str | None:
    """A caption of the bundled world without one of its mentions; what is true of the picture has no part in it."""
    left = [other.object for other in response.mentions if other.object != mention.object]
    return listed(left) if left else None


def choose_sets(made: Sequence[Decision], n: int, seed: int) -> dict[str, list[Decision]]:
    """Decisions of each set, at most `n` of the first two and half as many of the last, no two of one image.

    So what tests and bootstraps take for independent is.

    Raises:
        UserError: when there is nothing to choose from.
    """
    if not made:
        raise UserError(
            "no response names an object at known tokens; score answers with their model, as `crosslayer "
            "hallucination score MODEL` does"
        )
    order = [made[i] for i in np.random.default_rng(seed).permutation(len(made))]
    hallucinated = _one_an_image(d for d in order if d.hallucinated)[:n]
    true = _matched(hallucinated, [d for d in _elsewhere(order, hallucinated) if not d.hallucinated])
    ever = {d.mention.object for d in made if d.hallucinated}
    left = _elsewhere(order, [*hallucinated, *true])
    apart = _one_an_image(d for d in left if d.mention.object not in ever and _shows_more(d.response))
    return {HALLUCINATED: hallucinated, TRUE: true, REFERENCE: apart[: n // 2]}


def _image(decision: Decision) -> str:
    return decision.response.image_id


def _one_an_image(made: Iterable[Decision]) -> list[Decision]:
    """The first of each image."""
    first: dict[str, Decision] = {}
    for decision in made:
        first.setdefault(_image(decision), decision)
    return list(first.values())


def _elsewhere(made: Sequence[Decision], taken: Sequence[Decision]) -> list[Decision]:
    """Those on other images."""
    images = {_image(d) for d in taken}
    return [d for d in made if _image(d) not in images]


def _shows_more(response: Response) -> bool:
    """Whether a caption's picture shows several objects, and it is known where."""
    return response.kind == CAPTION and len(response.truth) > 1 and bool(patches(response))


def _matched(these: Sequence[Decision], those: Sequence[Decision]) -> list[Decision]:
    """One of those for each of these, the likest that is left, so long as there are some."""
    left, found = list(those), []
    for one in these:
        distances = [(other.mention.object != one.mention.object, abs(other.place - one.place)) for other in left]
        if not left:
            break
        found.append(left[min(range(len(left)), key=distances.__getitem__)])
        left = _elsewhere(left, found[-1:])
    return found


def asked(sets: dict[str, list[Decision]], looks: Looks, tokenizer: Any, folder: Path) -> list[Asked]:
    """A graph of each hallucinated and true decision at both moments, and of each reference at its naming.

    A decision is explained as the likeliest token against the next one: what the model is about to say, and no word
    that comes later, is known by then. A naming is explained as its word against all others. Left out are answers that
    were not the model's likeliest.
    """
    place = {id(decision): row for row, decision in enumerate(d for some in sets.values() for d in some)}
    graphs = []
    for name, some in sets.items():
        for decision in some:
            row = place[id(decision)]
            if looks.top[row] != decision.chosen:
                continue
            pair = [quoted(tokenizer, int(token[row])) for token in (looks.top, looks.rival)]
            if name != REFERENCE and None not in pair:
                graphs.append(_asked(decision, DECISION, decision.place, " - ".join(map(str, pair)), name, folder))
            start = _naming(decision)
            word = quoted(tokenizer, _ids(decision)[start])
            by_itself = decision.response.kind == CAPTION and (start != decision.place or name == REFERENCE)
            if word is not None and by_itself:
                graphs.append(_asked(decision, NAMING, start, word, name, folder))
    return graphs


def _asked(decision: Decision, moment: str, token: int, target: str, name: str, folder: Path) -> Asked:
    example, where = decision.response.answered(folder), patches(decision.response)
    case = Case(example=example, token=token, targets=(target,), label=name, patches=where)
    return Asked(decision=decision, moment=moment, case=case)


def _naming(decision: Decision) -> int:
    assert decision.mention.tokens is not None
    return decision.mention.tokens[0]


def _ids(decision: Decision) -> Sequence[int]:
    assert decision.response.token_ids is not None
    return decision.response.token_ids
