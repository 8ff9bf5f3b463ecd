"""A set of edits as a small JSON file, which knows the model and the run that it is for."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from crosslayer.coders.fingerprint import fingerprint
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.files import read_json, write_json
from crosslayer.models.load import LoadedModel
from crosslayer.replacement.interventions import Edit, check_all, from_json

SCHEMA = 1
NAMES = ("model", "run", "d_model", "n_layers", "strength")


@dataclass(frozen=True, kw_only=True)
class EditFile:
    """Edits, and what they are for.

    Raises:
        UserError: for a strength that is no number.
    """

    model: str
    """Bundled name, path or hub id of the model."""
    run: str
    """Fingerprint of the transcoder; see `crosslayer.coders.fingerprint`."""
    d_model: int
    n_layers: int
    interventions: tuple[Edit, ...]
    strength: float = 1.0
    """Share of the change that is made."""

    def __post_init__(self):
        if not isfinite(self.strength):
            raise UserError(f"the strength of edits is {self.strength}; a finite number is wanted")

    @classmethod
    def of(
        cls, model: LoadedModel, coder: CrossLayerTranscoder, edits: Sequence[Edit], strength: float = 1.0
    ) -> "EditFile":
        """Edits for this model and transcoder.

        Raises:
            UserError: for edits that do not fit them.
        """
        check_all(edits, coder)
        return cls(
            model=model.id,
            run=fingerprint(coder),
            d_model=model.d_model,
            n_layers=model.n_layers,
            interventions=tuple(edits),
            strength=strength,
        )

    def check(self, model: LoadedModel, coder: CrossLayerTranscoder) -> None:
        """Refuse to edit another model, or by another run.

        Raises:
            UserError: naming both.
        """
        ours = {"model": model.id, "run": fingerprint(coder), "d_model": model.d_model, "n_layers": model.n_layers}
        for name, value in ours.items():
            if getattr(self, name) != value:
                raise UserError(f"these edits are for {name} {getattr(self, name)!r}, but this {name} is {value!r}")
        check_all(self.interventions, coder)

    def save(self, path: str | Path) -> None:
        """Write it, atomically."""
        record = {"schema": SCHEMA, **{name: getattr(self, name) for name in NAMES}}
        write_json(Path(path), {**record, "interventions": [edit.to_json() for edit in self.interventions]})

    @classmethod
    def load(cls, path: str | Path) -> "EditFile":
        """Read what `save` wrote.

        Raises:
            UserError: when the file is missing, damaged or of another schema.
        """
        record: Any = read_json(Path(path))
        found = record.get("schema") if isinstance(record, dict) else None
        if found != SCHEMA:
            raise UserError(f"{path}: edits of schema {found}, this crosslayer reads {SCHEMA}; make the file again")
        try:
            settings: Any = {name: record[name] for name in NAMES}
            if not isinstance(settings["strength"], int | float):
                raise UserError(f"its strength is {settings['strength']!r}; a number is wanted")
            return cls(**settings, interventions=tuple(map(from_json, record["interventions"])))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: damaged ({error}); make the file again") from None
