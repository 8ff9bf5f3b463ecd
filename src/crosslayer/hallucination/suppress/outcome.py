"""What became of one method: a file of its own, written as each stage ends."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from crosslayer.errors import UserError
from crosslayer.files import read_json, write_json
from crosslayer.hallucination.suppress.figures import Dose
from crosslayer.hallucination.suppress.objective import Terms
from crosslayer.hallucination.suppress.selection import Step
from crosslayer.replacement.interventions import Edit, from_json

FOLDER = "suppress"
"""Of the methods' files, in the folder of results."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One method, as far as it has come: edits chosen, then a strength, then the test."""

    method: str
    digest: str
    """Of all that it depends on: responses, transcoder, settings, seed."""
    edits: tuple[Edit, ...]
    path: tuple[Step, ...]
    doses: tuple[Dose, ...] = ()
    """On the images for calibrating, by strength."""
    strength: float | None = None
    test: Dose | None = None
    tests: int = 0
    """How often edits in this folder by this method have been tested: 1, unless somebody insisted."""

    def save(self, folder: Path) -> None:
        """Write it, atomically."""
        record = asdict(replace(self, edits=())) | {"edits": [edit.to_json() for edit in self.edits]}
        write_json(outcome_path(folder, self.method), record)

    @classmethod
    def load(cls, folder: Path, method: str) -> "Outcome | None":
        """What was saved; None where nothing was.

        Raises:
            UserError: when the file is damaged.
        """
        path = outcome_path(folder, method)
        if not path.exists():
            return None
        try:
            return cls(**_read(read_json(path)))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged ({error}); remove it to have it made again") from None


def outcome_path(folder: Path, method: str) -> Path:
    """The file of a method's outcome."""
    return folder / FOLDER / f"{method}.json"


def answers_path(folder: Path, method: str) -> Path:
    """The file of the answers to the test's queries under a method's edit."""
    return folder / FOLDER / f"{method}.jsonl"


def _read(record: dict[str, Any]) -> dict[str, Any]:
    steps = tuple(Step(**{**step, "terms": Terms(**step["terms"])}) for step in record["path"])
    return {
        **record,
        "edits": tuple(map(from_json, record["edits"])),
        "path": steps,
        "doses": tuple(Dose(**dose) for dose in record["doses"]),
        "test": None if record["test"] is None else Dose(**record["test"]),
    }
