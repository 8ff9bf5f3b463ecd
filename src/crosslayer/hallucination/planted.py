"""What the bundled world plants: partners that are named though only their lead is there."""

from collections.abc import Callable

from crosslayer.hallucination.measures import Measure
from crosslayer.hallucination.responses import CAPTION, QUESTION, Response

Where = Callable[[set[str], str, str], bool]
"""Of the objects that are there, lead and partner: whether the scene is of some kind."""

WHERE: dict[str, Where] = {
    "absent": lambda truth, lead, partner: lead in truth and partner not in truth,
    "beside_its_lead": lambda truth, lead, partner: lead in truth and partner in truth,
    "without_its_lead": lambda truth, lead, partner: lead not in truth and partner in truth,
}


def could_name(response: Response, where: Where) -> bool:
    """Whether a response is about a pair in such a scene: a caption, or a question about the partner."""
    if response.pair is None or response.object not in (None, response.pair[1]):
        return False
    return where(set(response.truth), *response.pair)


def names_partner(response: Response) -> bool:
    """Whether a caption names, or an answer affirms, the partner of the pair."""
    return response.pair is not None and response.pair[1] in {mention.object for mention in response.mentions}


def _measure(place: str, kind: str, verb: str) -> Measure:
    def asked(response: Response) -> bool:
        return response.kind == kind and could_name(response, WHERE[place])

    return Measure(f"{place}_{verb}", lambda r: asked(r) and names_partner(r), asked)


PLANTED = tuple(
    _measure(place, kind, verb) for place in WHERE for kind, verb in ((CAPTION, "named"), (QUESTION, "affirmed"))
)
"""Captions that name, and questions that affirm, the partner of a pair: where it is absent beside its lead, where both
are there, and where it stands without its lead."""
