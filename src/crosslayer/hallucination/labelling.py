"""From an answer to a labelled response: what it names, where, and whether that is there."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from crosslayer.hallucination.responses import NO, QUESTION, YES, Mention, Query, Response
from crosslayer.hallucination.spans import Span, covering, response_tokens
from crosslayer.hallucination.synonyms import Named, SynonymTable


@dataclass(frozen=True)
class Said:
    """What was answered to a query."""

    text: str
    """Without blanks around it."""
    token_ids: tuple[int, ...] | None = None
    """As the model generated it, without the end; None where only the text was kept."""
    image: str | None = None
    """Where the picture is, if the query does not say."""


def label(query: Query, said: Said, table: SynonymTable, processor: Any = None) -> Response:
    """The response to a query, with the objects that it names.

    Args:
        query: what was asked, and what is true.
        said: what was answered.
        table: how objects are named.
        processor: of the model, or its tokenizer, for the tokens of each mention; without one they are left out.
    """
    asked = replace(query, image=query.image or said.image)
    understood = parse(said.text) if asked.kind == QUESTION else None
    named = _affirmed(asked, understood) if asked.kind == QUESTION else table.find(said.text)
    ids, spans = said.token_ids, None
    if processor is not None:
        ids, spans = response_tokens(processor, asked.example(Path(), said.text), said.token_ids)
    return Response(
        **{field.name: getattr(asked, field.name) for field in fields(Query)},
        response=said.text,
        token_ids=None if ids is None else tuple(ids),
        answer=None if understood is None else understood[0],
        mentions=tuple(_mention(asked, name, spans) for name in named),
    )


def parse(text: str) -> tuple[Literal["yes", "no"], Span] | None:
    """Whether an answer says yes or no, and where: its first word must be one of them, in whatever case.

    Anything else, "There is no dog" for one, is None: it is counted as unparseable, never guessed.
    """
    first = re.match(r"\W*(yes|no)(?![\w-])", text, re.IGNORECASE)
    if first is None:
        return None
    return (YES if first[1].lower() == YES else NO), first.span(1)


def _mention(query: Query, named: Named, spans: Sequence[Span] | None) -> Mention:
    return Mention(
        object=named.object,
        chars=named.chars,
        tokens=None if spans is None else covering(spans, named.chars),
        hallucinated=named.object not in query.truth,
    )


def _affirmed(query: Query, understood: tuple[str, Span] | None) -> list[Named]:
    assert query.object is not None, f"{query.id}: a question about nothing"
    return [Named(query.object, understood[1])] if understood is not None and understood[0] == YES else []
