"""What every method goes through: it chooses on one split, is set in strength on the second, and tested on the third.

Each stage of each method ends in a file, from which an interrupted run goes on; see `Outcome`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crosslayer.coders.fingerprint import fingerprint
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.files import read_json, write_json
from crosslayer.hallucination.decisions import Without
from crosslayer.hallucination.responses import Response, write_responses
from crosslayer.hallucination.splits import split_responses
from crosslayer.hallucination.suppress.calibration import Calibration
from crosslayer.hallucination.suppress.figures import Dose, Panel, asked_again, figures
from crosslayer.hallucination.suppress.objective import Objective, Weighing, clean_responses, drawn
from crosslayer.hallucination.suppress.outcome import Outcome, answers_path, outcome_path
from crosslayer.hallucination.suppress.selection import Strategy
from crosslayer.hallucination.synonyms import SynonymTable
from crosslayer.models.load import LoadedModel
from crosslayer.replacement.interventions import Edit

BEFORE = "before"
"""Name, among the methods' answers, of those of the model as it is."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to find an edit."""

    name: str
    strategy: Strategy
    coder: CrossLayerTranscoder


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Settings that all methods share."""

    weighing: Weighing = Weighing()  # noqa: RUF009
    calibration: Calibration = Calibration()  # noqa: RUF009
    clean: int = 60
    """Clean responses of each kind at most, for the KL."""
    control_images: int = 200
    """Of the test, on which chance is measured; all where there are no more."""
    at_least: int = 5
    """Responses that hallucinate, wanted in every split."""
    seed: int = 0
    batch_prompts: int = 64


class Trial:
    """The responses of one folder, split, and the methods that are tried on them.

    Args:
        model: the language model.
        responses: labelled, what the model answers as it is.
        folder: of results, where they lie too.
        table: the words for the objects.
        settings: what all methods share.
        without: what captions would be without a mention, where that is known.
        again: test anew what was tested with other settings; the outcome counts it.

    Raises:
        UserError: when the splits have too few hallucinations, with how many responses it would take.
    """

    def __init__(
        self,
        model: LoadedModel,
        responses: Sequence[Response],
        folder: Path,
        table: SynonymTable,
        settings: Protocol = Protocol(),
        *,
        without: Without | None = None,
        again: bool = False,
    ):
        self.model, self.folder, self.table, self.settings = model, folder, table, settings
        self.without, self.again = without, again
        self.splits = split_responses(responses, seed=settings.seed, at_least=settings.at_least)
        self.digest = _digest([(r.id, r.response, r.truth) for r in responses], model.id, settings)

    @cached_property
    def objective(self) -> Objective:
        """On the images for choosing."""
        return Objective(
            self.model,
            self.splits["select"],
            self.folder,
            self.settings.weighing,
            without=self.without,
            seed=self.settings.seed,
            batch_prompts=self.settings.batch_prompts,
        )

    @cached_property
    def calibrating(self) -> Panel:
        """The queries about the images for calibrating."""
        return self._panel(self.splits["calibrate"])

    @cached_property
    def testing(self) -> Panel:
        """The queries about the images of the test."""
        return self._panel(self.splits["test"])

    @cached_property
    def control(self) -> Panel:
        """Those about some of the images of the test."""
        images = sorted({r.image_id for r in self.splits["test"]})
        chosen = set(drawn(images, self.settings.control_images, self.settings.seed, str))
        return self._panel([r for r in self.splits["test"] if r.image_id in chosen])

    @cached_property
    def unedited(self) -> Dose:
        """What the model answers as it is to the queries for calibrating."""
        return Dose(strength=0.0, figures=figures(self.calibrating.ask()), kl=0.0)

    @cached_property
    def before(self) -> list[Response]:
        """The model's answers to the test's queries as it is, asked as the edited model is; kept in a file."""
        answers = self.testing.ask()
        write_responses(answers_path(self.folder, BEFORE), answers)
        return answers

    def run(self, method: Method) -> Outcome:
        """Take a method through all stages that its file does not hold yet.

        Raises:
            UserError: when it was tested with other settings, unless `again`.
        """
        digest = _digest(self.digest, fingerprint(method.coder), method.strategy)
        found = Outcome.load(self.folder, method.name)
        if found is None or found.digest != digest:
            found = self._chosen(method, digest, found)
        if found.strength is None:
            found = self._calibrated(method, found)
        return found if found.test is not None else self._tested(method, found)

    def chance(
        self, name: str, coder: CrossLayerTranscoder, sets: Sequence[Sequence[Edit]], strength: float
    ) -> list[Dose]:
        """Doses of many sets of edits on the images for control; kept in a file."""
        edits = [[edit.to_json() for edit in some] for some in sets]
        path, digest = outcome_path(self.folder, name), _digest(self.digest, fingerprint(coder), strength, edits)
        kept = read_json(path) if path.exists() else {}
        if kept.get("digest") == digest:
            return [Dose(**dose) for dose in kept["doses"]]
        bar = tqdm(sets, unit="set", desc=name, disable=None, leave=False)
        doses = [self.control.dose(coder, some, strength)[0] for some in bar]
        write_json(path, {"digest": digest, "doses": [asdict(dose) for dose in doses], "edits": edits})
        return doses

    def _chosen(self, method: Method, digest: str, old: Outcome | None) -> Outcome:
        tests = 0 if old is None else old.tests
        if tests and not self.again:
            raise UserError(
                f"{outcome_path(self.folder, method.name)}: was tested with other responses or settings already; a "
                "test is run once: choose another --out, or insist with --again, which is counted"
            )
        found = method.strategy.choose(self.objective, method.coder)
        outcome = Outcome(method=method.name, digest=digest, edits=found.edits, path=found.path, tests=tests)
        outcome.save(self.folder)
        return outcome

    def _calibrated(self, method: Method, found: Outcome) -> Outcome:
        strengths = [s for s in self.settings.calibration.strengths if s]
        bar = tqdm(strengths, unit="strength", desc=f"calibrate {method.name}", disable=None, leave=False)
        doses = [self.calibrating.dose(method.coder, found.edits, s)[0] for s in bar] if found.edits else []
        doses = sorted([self.unedited, *doses], key=lambda dose: dose.strength)
        strength = self.settings.calibration.choose(doses).strength
        outcome = replace(found, doses=tuple(doses), strength=strength)
        outcome.save(self.folder)
        return outcome

    def _tested(self, method: Method, found: Outcome) -> Outcome:
        assert found.strength is not None
        dose, answers = self.testing.dose(method.coder, found.edits, found.strength)
        write_responses(answers_path(self.folder, method.name), answers)
        outcome = replace(found, test=dose, tests=found.tests + 1)
        outcome.save(self.folder)
        return outcome

    def _panel(self, responses: Sequence[Response]) -> Panel:
        clean = clean_responses(responses, self.settings.clean, self.settings.seed)
        return Panel(
            self.model,
            asked_again(responses),
            self.folder,
            self.table,
            clean=clean,
            batch_prompts=self.settings.batch_prompts,
        )


def _digest(*parts: Any) -> str:
    return blake2b(repr(parts).encode(), digest_size=8).hexdigest()
