"""All evidence on one edit: before and after by every method, dose, chance, plain controls, cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from math import isnan
from pathlib import Path
from typing import Any

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.files import read_json
from crosslayer.hallucination.evidence import Change, change, empirical_p, holm
from crosslayer.hallucination.measures import figure
from crosslayer.hallucination.planted import PLANTED
from crosslayer.hallucination.prove.bench import CONTROLS, Bench, Control, Cost, Tried
from crosslayer.hallucination.responses import Response, read_responses
from crosslayer.hallucination.suppress.calibration import Calibration
from crosslayer.hallucination.suppress.everything import BESIDE, SUPPRESS
from crosslayer.hallucination.suppress.figures import ALSO, HALLUCINATION, RETAINED
from crosslayer.hallucination.suppress.objective import Weighing
from crosslayer.hallucination.suppress.outcome import Outcome, answers_path
from crosslayer.hallucination.suppress.protocol import BEFORE, Protocol, Trial
from crosslayer.metrics import Figure

LESS = (*(m for m in PLANTED if m.name.startswith("absent")), *HALLUCINATION)
"""What an edit should lower: planted partners that are absent, named and affirmed; anything absent."""
HABITS = tuple(m for m in ALSO if m.name in ("length_words", "yes_ratio", "accuracy"))
COUNTED = ("object_recall", "length_words")
"""Measures that are no yes or no a response, for which McNemar's test is not made."""


@dataclass(frozen=True, kw_only=True)
class OnTest:
    """One method on the test."""

    method: str
    edits: int
    strength: float
    kl: float
    changes: dict[str, Change]
    """By measure."""
    holm: dict[str, float]
    """McNemar's p-values, adjusted over the measures of this method."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One strength on a dose curve."""

    strength: float
    kl: float
    figures: dict[str, Figure]


@dataclass(frozen=True, kw_only=True)
class Chance:
    """A measure under the edit against the same under sets drawn by lot, on the images for control."""

    draws: str
    measure: str
    before: float
    edited: float
    drawn: tuple[float, ...]

    @property
    def p_value(self) -> float:
        """Empirical; see `evidence.empirical_p`."""
        return empirical_p(self.edited, self.drawn)


@dataclass(frozen=True, kw_only=True)
class Beaten:
    """A plain control on the test, and what the edit does in its place."""

    control: Control
    changes: dict[str, Change]
    """From the control to the edit."""


@dataclass(frozen=True, kw_only=True)
class EqualKl:
    """Another method's edit as strong as it takes for the same collateral KL."""

    method: str
    strength: float
    kl: float
    kept_kl: float
    changes: dict[str, Change]
    """From it to the kept edit, on the test."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The evidence."""

    model: str
    kept: str
    counts: dict[str, int]
    """Of the test: images, captions, questions."""
    methods: tuple[OnTest, ...]
    doses: dict[str, tuple[Point, ...]]
    """By method, on the images for control."""
    opposite: dict[str, Change]
    """From the original to the kept edit at the lowest strength, which is negative, there."""
    lowest: float
    unchanged: dict[str, int]
    """Prompts with the same logits at strength 0, and all."""
    chance: tuple[Chance, ...]
    beaten: tuple[Beaten, ...]
    equal_kl: EqualKl | None
    cost: Cost

    @property
    def edit(self) -> OnTest:
        """The edit that is kept, tested."""
        return next(tested for tested in self.methods if tested.method == self.kept)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, null where a figure could not be measured."""
        chance = [{**asdict(c), "p_value": c.p_value} for c in self.chance]
        return plain({**asdict(self), "chance": chance, "cost": {**asdict(self.cost), "ratio": self.cost.ratio}})


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The evidence for the edit that suppression kept, from what is tried on the model and from files of what was.

    Args:
        trial: that of the suppression.
        coder: the run's transcoder.
        beside: the one that was tried beside it.
        strengths: of the dose curves.
    """

    trial: Trial
    coder: CrossLayerTranscoder
    beside: CrossLayerTranscoder | None = None
    strengths: Sequence[float]

    @cached_property
    def pieces(self) -> dict[str, Callable[[], object]]:
        """What is tried, by name, the longest first: each ends in a file, none waits for another.

        What an edit costs is not among these, as it is timed while nothing else runs.
        """
        bench = self._bench
        found = {f"{o.method} at equal KL": partial(bench.at_equal_kl, o) for o in self._others}
        found |= {name: partial(bench.control, name) for name in CONTROLS}
        for outcome in self._curves:
            found |= {f"{outcome.method} at {s:g}": partial(bench.dose, outcome, s) for s in self._doses}
        return {**found, "unchanged": bench.unchanged}

    def do(self, name: str) -> object:
        """Try one of these."""
        return self.pieces[name]()

    def proof(self) -> Proof:
        """All of it; what files do not hold yet is tried now."""
        trial, kept, bench = self.trial, self._kept, self._bench
        before, after = (read_responses(answers_path(trial.folder, name)) for name in (BEFORE, kept.method))
        tried = {o.method: [bench.dose(o, strength) for strength in self._doses] for o in self._curves}
        mine = tried[kept.method]
        controls = filter(None, map(bench.control, CONTROLS))
        return Proof(
            model=trial.model.id,
            kept=kept.method,
            counts=_counts(before),
            methods=tuple(_tested(trial.folder, outcome, before) for outcome in self._outcomes),
            doses={method: tuple(map(_point, some)) for method, some in tried.items()},
            opposite=changes(next(t for t in mine if not t.strength).answers, mine[0].answers),
            lowest=mine[0].strength,
            unchanged=bench.unchanged(),
            chance=tuple(_chance(self._record)),
            beaten=tuple(
                Beaten(control=control, changes=changes(answers, _same(after, answers)))
                for control, answers in controls
            ),
            equal_kl=next((_equal_kl(bench, o, kept, after) for o in self._others), None),
            cost=bench.cost(),
        )

    @cached_property
    def _record(self) -> dict[str, Any]:
        return read_suppression(self.trial.folder)

    @cached_property
    def _outcomes(self) -> list[Outcome]:
        return [_outcome(self.trial.folder, name) for name in self._record["outcomes"]]

    @cached_property
    def _kept(self) -> Outcome:
        return next(outcome for outcome in self._outcomes if outcome.method == self._record["kept"])

    @property
    def _others(self) -> list[Outcome]:
        """What the kept edit is compared with at equal KL: what the transcoder beside it found, if anything."""
        return [o for o in self._outcomes if o is not self._kept and o.method == BESIDE and o.edits]

    @property
    def _curves(self) -> list[Outcome]:
        return [self._kept, *self._others]

    @property
    def _doses(self) -> list[float]:
        return sorted([*self.strengths, 0.0])

    @cached_property
    def _bench(self) -> Bench:
        coders = {"": self.coder, **({} if self.beside is None else {BESIDE: self.beside})}
        return Bench(self.trial, coders, self._kept)


def read_suppression(folder: Path) -> dict[str, Any]:
    """What `crosslayer hallucination suppress` wrote.

    Raises:
        UserError: when it did not.
    """
    record = read_json(folder / SUPPRESS)
    if not isinstance(record, dict) or not {"kept", "outcomes", "chance", "settings"} <= record.keys():
        raise UserError(f"{folder / SUPPRESS}: is no suppression; remove it to have it made again")
    return record


def protocol(record: Mapping[str, Any]) -> Protocol:
    """The settings that a suppression was made with."""
    known = {name: value for name, value in record["settings"].items() if name in Protocol.__dataclass_fields__}
    calibration = known["calibration"]
    return Protocol(
        **{
            **known,
            "weighing": Weighing(**known["weighing"]),
            "calibration": Calibration(**{**calibration, "strengths": tuple(calibration["strengths"])}),
        }
    )


def changes(before: Sequence[Response], after: Sequence[Response]) -> dict[str, Change]:
    """Of every measure that these responses allow."""
    found = {}
    for measure in (*LESS, *RETAINED, *HABITS):
        if measure.counts(before)[1].any() and measure.counts(after)[1].any():
            found[measure.name] = change(measure, before, after)
    return found


def plain(value: Any) -> Any:
    """JSON values: null for what could not be measured."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and isnan(value) else value


def _outcome(folder: Path, method: str) -> Outcome:
    found = Outcome.load(folder, method)
    if found is None or found.test is None or found.strength is None:
        raise UserError(f"{folder / SUPPRESS}: its method {method} has not been tested; remove it to go on from there")
    return found


def _tested(folder: Path, outcome: Outcome, before: Sequence[Response]) -> OnTest:
    assert outcome.test is not None
    found = changes(before, read_responses(answers_path(folder, outcome.method)))
    yes_or_no = [name for name in found if name not in COUNTED]
    adjusted = holm([found[name].p_value for name in yes_or_no])
    return OnTest(
        method=outcome.method,
        edits=len(outcome.edits),
        strength=outcome.test.strength,
        kl=outcome.test.kl,
        changes=found,
        holm=dict(zip(yes_or_no, adjusted, strict=True)),
    )


def _point(tried: Tried) -> Point:
    measured = {m.name: figure(m, tried.answers) for m in (*LESS, *RETAINED) if m.counts(tried.answers)[1].any()}
    return Point(strength=tried.strength, kl=tried.kl, figures=measured)


def _chance(record: Mapping[str, Any]):
    for draws, doses in record["chance"].items():
        for measure in LESS:
            if measure.name in record["control"]:
                yield Chance(
                    draws=draws,
                    measure=measure.name,
                    before=record["unedited_control"][measure.name],
                    edited=record["control"][measure.name],
                    drawn=tuple(dose["figures"][measure.name] for dose in doses),
                )


def _equal_kl(bench: Bench, other: Outcome, kept: Outcome, after: Sequence[Response]) -> EqualKl:
    assert kept.test is not None
    tried = bench.at_equal_kl(other)
    return EqualKl(
        method=other.method,
        strength=tried.strength,
        kl=tried.kl,
        kept_kl=kept.test.kl,
        changes=changes(tried.answers, after),
    )


def _same(answers: Sequence[Response], like: Sequence[Response]) -> list[Response]:
    """The answers to the queries of `like`, in their order."""
    by_id = {response.id: response for response in answers}
    return [by_id[response.id] for response in like]


def _counts(responses: Sequence[Response]) -> dict[str, int]:
    captions = sum(response.kind == "caption" for response in responses)
    images = len({response.image_id for response in responses})
    return {"images": images, "captions": captions, "questions": len(responses) - captions}
