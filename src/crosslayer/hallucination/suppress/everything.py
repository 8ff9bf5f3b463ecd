"""All methods of one run side by side, the baselines and chance among them, and the edit that is kept."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import isnan
from pathlib import Path
from typing import Any

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.files import read_json, write_json
from crosslayer.hallucination.suppress.calibration import at_kl, left, losses
from crosslayer.hallucination.suppress.chance import habits, matched_sets, random_directions, write_norms
from crosslayer.hallucination.suppress.descent import Descent
from crosslayer.hallucination.suppress.directions import DIRECTIONS, Along
from crosslayer.hallucination.suppress.figures import Dose, figures
from crosslayer.hallucination.suppress.outcome import Outcome
from crosslayer.hallucination.suppress.protocol import Method, Trial
from crosslayer.hallucination.suppress.selection import Feature, Given, Ranked, Strategy
from crosslayer.replacement.edit_file import EditFile
from crosslayer.replacement.interventions import Intervention
from crosslayer.replacement.where import Part

SUPPRESS, EDIT = "suppress.json", "edit.json"
"""Names in a folder of results: what came out, and the edit that is kept."""
RANDOM_FEATURES, RANDOM_DIRECTIONS = CHANCE = ("random-features", "random-directions")
BESIDE = "beside"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which methods are tried.

    Raises:
        UserError: for numbers below 1.
    """

    steps: int = Descent.steps
    """Of the descent in the strengths of all features' writes."""
    at_most: int = Descent.at_most
    """Features of its edit at most."""
    penalty: float = Descent.penalty
    """Of a write that is taken away wholly, beside a logit of margin."""
    ranked: int = 16
    """Features that are taken at once by their gradients; 1 for the best alone."""
    sets: int = 20
    """Random sets of features like those chosen, and of directions as long; 0 for none."""
    where: str = "text"
    """Positions at which all methods act: text, answer (of which that is a part) or image."""

    def __post_init__(self):
        Part(self.where)  # refuses what is none
        if min(self.steps, self.at_most, self.ranked) < 1 or min(self.penalty, self.sets) < 0:
            raise UserError(
                f"steps, at_most and ranked are {self.steps}, {self.at_most}, {self.ranked}, penalty and sets "
                f"{self.penalty}, {self.sets}; choose at least 1 of each of the former, and the latter from 0 on"
            )

    def descent(self, seed: int) -> Descent:
        """The main method, the same for a run and for the one beside it."""
        return Descent(where=Part(self.where), steps=self.steps, at_most=self.at_most, penalty=self.penalty, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A figure of two methods at the same collateral KL, read off their dose curves on the images for calibrating."""

    measure: str
    method: str
    other: str
    kl: float
    """That of the first at its strength."""
    value: float
    others: float
    """NaN where the other's curve does not reach that far."""


@dataclass(frozen=True, kw_only=True)
class Suppression:
    """What came out."""

    settings: dict[str, Any]
    responses: dict[str, int]
    """By split."""
    before: dict[str, float]
    """Figures of the test's answers as they are."""
    outcomes: tuple[Outcome, ...]
    kept: str
    """The method whose edit is kept: of those by features of the run, the best on the images for calibrating."""
    comparisons: tuple[Comparison, ...]
    control: dict[str, float]
    """Figures of the kept edit on those images of the test on which chance is measured."""
    unedited_control: dict[str, float]
    chance: dict[str, tuple[Dose, ...]]

    def outcome(self, method: str) -> Outcome:
        """That of a method."""
        return next(outcome for outcome in self.outcomes if outcome.method == method)

    def save(self, path: Path) -> None:
        """Write it as JSON, with null where a figure could not be measured; the edits are in the methods' files."""
        record = asdict(replace(self, outcomes=()))
        methods = {o.method: asdict(replace(o, edits=())) | {"edits": len(o.edits)} for o in self.outcomes}
        write_json(path, _plain(record | {"outcomes": methods}))


@dataclass(frozen=True, kw_only=True)
class Contest:
    """All methods on one trial.

    Args:
        trial: the responses, and what is done with them.
        coder: the transcoder whose features are turned down.
        plan: which methods.
        beside: another of the same model, a PLT for one, by the same descent.
        circuit: features chosen elsewhere, tried as a method of their own.
    """

    trial: Trial
    coder: CrossLayerTranscoder
    plan: Plan = Plan()
    beside: CrossLayerTranscoder | None = None
    circuit: Sequence[Feature] = ()

    @cached_property
    def ours(self) -> dict[str, Method]:
        """Methods that turn down features of the transcoder, by name."""
        where = Part(self.plan.where)
        strategies: dict[str, Strategy] = {"descent": self._descent, "ranked": Ranked(n=self.plan.ranked, where=where)}
        if self.circuit:
            strategies["circuit"] = Given(features=tuple(self.circuit), where=where)
        return {name: Method(name=name, strategy=s, coder=self.coder) for name, s in strategies.items()}

    @cached_property
    def baselines(self) -> dict[str, Method]:
        """The other methods."""
        found = [] if self.beside is None else [Method(name=BESIDE, strategy=self._descent, coder=self.beside)]
        along = [Along(direction=name, where=Part(self.plan.where)) for name in DIRECTIONS]
        found += [Method(name=way.direction, strategy=way, coder=self.coder) for way in along]
        return {method.name: method for method in found}

    @property
    def rounds(self) -> tuple[Sequence[str], ...]:
        """Names of what there is to do, each of which ends in a file; those of a round do not wait for each other."""
        methods = self.ours | self.baselines
        return sorted(methods, key=lambda name: not isinstance(methods[name].strategy, Descent)), CHANCE

    def do(self, name: str) -> None:
        """One of these."""
        if name in CHANCE:
            self.chance(name)
        else:
            self.trial.run((self.ours | self.baselines)[name])

    @cached_property
    def kept(self) -> Outcome:
        """Of those by features of the transcoder, the best on the images for calibrating."""
        return min(map(self.trial.run, self.ours.values()), key=_rank)

    def chance(self, name: str) -> tuple[Dose, ...]:
        """Doses of random sets of features or of directions at the strength of the kept edit; none without one."""
        trial, strength, sets = self.trial, self.kept.strength, self.plan.sets
        edits = [edit for edit in self.kept.edits if isinstance(edit, Intervention)]
        if not (sets and edits and strength):
            return ()
        coder, where, seed = self.coder, edits[0].where, trial.settings.seed
        if name == RANDOM_DIRECTIONS:
            norms = write_norms(trial.objective, coder, edits, strength, where)
            drawn = random_directions(norms, coder.d_model, where, sets, seed)
            return tuple(trial.chance(name, coder, drawn, 1.0))
        alike = matched_sets(habits(trial.objective, coder, where), coder.sources, edits, sets, seed)
        return tuple(trial.chance(name, coder, alike, strength))

    def result(self) -> Suppression:
        """Do what is not done yet, and keep the best edit as `edit.json`.

        Raises:
            UserError: as the stages do.
        """
        trial, kept = self.trial, self.kept
        others = [trial.run(method) for method in self.baselines.values()]
        assert kept.strength is not None
        EditFile.of(trial.model, self.coder, kept.edits, kept.strength).save(trial.folder / EDIT)
        found = Suppression(
            settings={
                "seed": trial.settings.seed,
                "rule": trial.settings.calibration.rule,
                **asdict(trial.settings),
                **asdict(self.plan),
            },
            responses={name: len(part) for name, part in trial.splits.items()},
            before=figures(trial.before),
            outcomes=(*map(trial.run, self.ours.values()), *others),
            kept=kept.method,
            comparisons=tuple(_comparisons(kept, others)),
            control=trial.control.dose(self.coder, kept.edits, kept.strength)[0].figures,
            unedited_control=figures(trial.control.ask()),
            chance={name: doses for name in CHANCE if (doses := self.chance(name))},
        )
        found.save(trial.folder / SUPPRESS)
        return found

    @property
    def _descent(self) -> Descent:
        return self.plan.descent(self.trial.settings.seed)


def read_features(path: Path) -> tuple[Feature, ...]:
    """Features from a JSON file: a list of records with `layer` and `feature`, alone or under `features`.

    Raises:
        UserError: when there are none.
    """
    record = read_json(path)
    rows = record.get("features", []) if isinstance(record, dict) else record
    try:
        found = tuple(dict.fromkeys((int(row["layer"]), int(row["feature"])) for row in rows))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: a feature has no layer and number ({error}); give a list of both") from None
    if not found:
        raise UserError(f'{path}: holds no features; give a list such as [{{"layer": 3, "feature": 17}}]')
    return found


def _rank(outcome: Outcome) -> tuple[float, float]:
    """By hallucination left on the images for calibrating, then by what is lost there."""
    base = next(dose for dose in outcome.doses if dose.strength == 0)
    chosen = next(dose for dose in outcome.doses if dose.strength == outcome.strength)
    return left(chosen, base), losses(chosen, base)


def _comparisons(kept: Outcome, others: Sequence[Outcome]) -> Iterator[Comparison]:
    mine = next(dose for dose in kept.doses if dose.strength == kept.strength)
    for other in others:
        for measure in ("absent_named", "absent_affirmed", "chair_s", "false_yes"):
            if measure in mine.figures:
                yield Comparison(
                    measure=measure,
                    method=kept.method,
                    other=other.method,
                    kl=mine.kl,
                    value=mine.figures[measure],
                    others=at_kl(other.doses, measure, mine.kl),
                )


def _plain(value: Any) -> Any:
    """JSON values, with null for what could not be measured."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and isnan(value) else value
