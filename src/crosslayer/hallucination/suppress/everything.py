"""All methods of one run side by side, the baselines and chance among them, and the edit that is kept."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isnan
from pathlib import Path
from typing import Any

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.files import read_json, write_json
from crosslayer.hallucination.suppress.calibration import at_kl, left, losses
from crosslayer.hallucination.suppress.chance import habits, matched_sets, random_directions, write_norms
from crosslayer.hallucination.suppress.descent import Descent
from crosslayer.hallucination.suppress.directions import Along, mean_difference, probe
from crosslayer.hallucination.suppress.figures import Dose, figures
from crosslayer.hallucination.suppress.outcome import Outcome
from crosslayer.hallucination.suppress.protocol import Method, Trial
from crosslayer.hallucination.suppress.selection import Feature, Given, Ranked, Strategy
from crosslayer.replacement.edit_file import EditFile
from crosslayer.replacement.interventions import Intervention

SUPPRESS, EDIT = "suppress.json", "edit.json"
"""Names in a folder of results: what came out, and the edit that is kept."""
RANDOM_FEATURES, RANDOM_DIRECTIONS = "random-features", "random-directions"
BESIDE = "beside"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which methods are tried.

    Raises:
        UserError: for numbers below 1.
    """

    steps: int = Descent.steps
    """Of the descent in the strengths of all features."""
    at_most: int = Descent.at_most
    """Features of its edit at most."""
    penalty: float = Descent.penalty
    """Of a feature that is taken away wholly, beside a logit of margin."""
    ranked: int = 16
    """Features that are taken at once by their gradients; 1 for the best alone."""
    sets: int = 20
    """Random sets of features like those chosen, and of directions as long; 0 for none."""

    def __post_init__(self):
        if min(self.steps, self.at_most, self.ranked) < 1 or min(self.penalty, self.sets) < 0:
            raise UserError(
                f"steps, at_most and ranked are {self.steps}, {self.at_most}, {self.ranked}, penalty and sets "
                f"{self.penalty}, {self.sets}; choose at least 1 of each of the former, and the latter from 0 on"
            )

    def descent(self, seed: int) -> Descent:
        """The main method, the same for a run and for the one beside it."""
        return Descent(steps=self.steps, at_most=self.at_most, penalty=self.penalty, seed=seed)


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


def suppress(
    trial: Trial,
    coder: CrossLayerTranscoder,
    *,
    plan: Plan = Plan(),
    beside: CrossLayerTranscoder | None = None,
    circuit: Sequence[Feature] = (),
) -> Suppression:
    """Try all methods, measure chance, and keep the best edit by features of the transcoder as `edit.json`.

    Args:
        trial: the responses, and what is done with them.
        coder: the transcoder whose features are turned down.
        plan: which methods.
        beside: another of the same model, a PLT for one, by the same descent.
        circuit: features chosen elsewhere, tried as a method of their own.

    Raises:
        UserError: as the stages do.
    """
    before = figures(trial.before)
    descent = plan.descent(trial.settings.seed)
    ours = [trial.run(Method(name=n, strategy=s, coder=coder)) for n, s in _strategies(descent, plan, circuit)]
    others = [trial.run(method) for method in _baselines(descent, coder, beside)]
    kept = min(ours, key=lambda outcome: _rank(outcome))
    assert kept.strength is not None
    EditFile.of(trial.model, coder, kept.edits, kept.strength).save(trial.folder / EDIT)
    found = Suppression(
        settings={
            "seed": trial.settings.seed,
            "rule": trial.settings.calibration.rule,
            **asdict(trial.settings),
            **asdict(plan),
        },
        responses={name: len(part) for name, part in trial.splits.items()},
        before=before,
        outcomes=(*ours, *others),
        kept=kept.method,
        comparisons=tuple(_comparisons(kept, others)),
        control=trial.control.dose(coder, kept.edits, kept.strength)[0].figures,
        unedited_control=figures(trial.control.ask()),
        chance=_chance(trial, coder, kept, plan),
    )
    found.save(trial.folder / SUPPRESS)
    return found


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


def _strategies(descent: Descent, plan: Plan, circuit: Sequence[Feature]) -> Iterator[tuple[str, Strategy]]:
    yield "descent", descent
    yield "ranked", Ranked(n=plan.ranked)
    if circuit:
        yield "circuit", Given(features=tuple(circuit))


def _baselines(descent: Descent, coder: CrossLayerTranscoder, beside: CrossLayerTranscoder | None) -> Iterator[Method]:
    if beside is not None:
        yield Method(name=BESIDE, strategy=descent, coder=beside)
    yield Method(name="mean-difference", strategy=Along(direction=mean_difference), coder=coder)
    yield Method(name="probe", strategy=Along(direction=probe), coder=coder)


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


def _chance(trial: Trial, coder: CrossLayerTranscoder, kept: Outcome, plan: Plan) -> dict[str, tuple[Dose, ...]]:
    """Doses of random sets at the strength of the kept edit."""
    edits = [edit for edit in kept.edits if isinstance(edit, Intervention)]
    strength, seed = kept.strength, trial.settings.seed
    if not (plan.sets and edits and strength):
        return {}
    where = edits[0].where
    sets = matched_sets(habits(trial.objective, coder, where), coder.sources, edits, plan.sets, seed)
    norms = write_norms(trial.objective, coder, edits, strength, where)
    directions = random_directions(norms, coder.d_model, where, plan.sets, seed)
    return {
        RANDOM_FEATURES: tuple(trial.chance(RANDOM_FEATURES, coder, sets, strength)),
        RANDOM_DIRECTIONS: tuple(trial.chance(RANDOM_DIRECTIONS, coder, directions, 1.0)),
    }


def _plain(value: Any) -> Any:
    """JSON values, with null for what could not be measured."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and isnan(value) else value
