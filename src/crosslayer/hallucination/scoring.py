"""From labelled responses to figures with intervals: CHAIR of captions, POPE of questions, and what is planted."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from crosslayer.errors import UserError
from crosslayer.hallucination.chair import CHAIR
from crosslayer.hallucination.labelling import Said, label
from crosslayer.hallucination.measures import Measure, figure
from crosslayer.hallucination.planted import PLANTED
from crosslayer.hallucination.pope import POPE, SAMPLINGS
from crosslayer.hallucination.responses import CAPTION, QUESTION, Response
from crosslayer.hallucination.tasks import Task
from crosslayer.metrics import Figure

ALL, PLANT = "all", "planted"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One figure of a set of responses."""

    kind: str
    """caption, question, or planted."""
    group: str
    """The kind of scene; the sampling of the questions; or all, of questions those of no known sampling."""
    measure: str
    figure: Figure
    of: int
    """What it is a share of: mentions, captions, questions, ..."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a set of responses comes to."""

    images: int
    captions: int
    questions: int
    unparseable: int
    """Questions whose answer is neither yes nor no."""
    figures: tuple[Scored, ...]

    def figure(self, kind: str, measure: str, group: str = ALL) -> Figure:
        """One of the figures."""
        wanted = (kind, group, measure)
        return next(f.figure for f in self.figures if (f.kind, f.group, f.measure) == wanted)

    def to_csv(self) -> str:
        """A line a figure, with its 95 % interval."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["kind", "group", "measure", "value", "low", "high", "of"])
        for f in self.figures:
            writer.writerow([f.kind, f.group, f.measure, f.figure.value, f.figure.low, f.figure.high, f.of])
        return text.getvalue()

    def to_dict(self) -> dict:
        """The JSON form, in which a figure that could not be measured is null."""
        return {**asdict(self), "figures": [_scored(f) for f in self.figures]}


def label_all(task: Task, said: Mapping[str, Said], processor: object = None) -> list[Response]:
    """The labelled responses to those of a task's queries that were answered, in its order."""
    return [label(q, said[q.id], task.table, processor) for q in task.queries if q.id in said]


def score(responses: Sequence[Response]) -> Score:
    """Every figure that these responses allow, each with a bootstrap over images.

    Raises:
        UserError: when there are no responses.
    """
    if not responses:
        raise UserError("there are no responses to score; ask for at least one")
    questions = [r for r in responses if r.kind == QUESTION]
    return Score(
        images=len({r.image_id for r in responses}),
        captions=len(responses) - len(questions),
        questions=len(questions),
        unparseable=sum(r.answer is None for r in questions),
        figures=tuple(_figures(responses)),
    )


def _figures(responses: Sequence[Response]) -> Iterator[Scored]:
    captions = [r for r in responses if r.kind == CAPTION]
    settings = sorted({r.setting for r in captions} - {""})
    for group in (ALL, *settings):
        yield from _measured(CAPTION, group, CHAIR, [r for r in captions if group in (ALL, r.setting)])
    questions = [r for r in responses if r.kind == QUESTION]
    for group in (ALL, *SAMPLINGS):
        yield from _measured(QUESTION, group, POPE, [r for r in questions if group in (r.samplings or (ALL,))])
    yield from _measured(PLANT, ALL, PLANTED, [r for r in responses if r.pair is not None])


def _measured(kind: str, group: str, measures: Sequence[Measure], chosen: Sequence[Response]) -> Iterator[Scored]:
    for measure in measures if chosen else ():
        of = int(measure.counts(chosen)[1].sum())
        yield Scored(kind=kind, group=group, measure=measure.name, figure=figure(measure, chosen), of=of)


def _scored(scored: Scored) -> dict:
    numbers = {name: None if number != number else number for name, number in vars(scored.figure).items()}
    return {**vars(scored), "figure": numbers}
