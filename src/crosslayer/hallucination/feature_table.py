"""The table of features that `contrast` makes, as it is written and read; no model is needed to read it."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from crosslayer.errors import UserError
from crosslayer.files import read_json

CONTRAST = "contrast.json"
"""Name of the table in a folder of results."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A mean over hallucinated mentions, the one over matched true ones, and their difference."""

    hallucinated: float
    true: float
    difference: float
    low: float
    """Of the difference's 95 % interval, from a bootstrap over images."""
    high: float


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Where a feature fires strongly in one response."""

    response: str
    """Its id."""
    image: str | None
    """See `Query.image`."""
    position: int
    """In the prompt with its response, padding not counted."""
    token: str | None
    """The text there; None of an image patch."""
    box: tuple[float, float, float, float] | None
    """Left, top, right, bottom of the patch in shares of the picture; None of text, or where patches are no grid."""
    activation: float
    said: str
    """The response."""
    hallucinated: tuple[str, ...]
    """The objects that it names though they are not there."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """What is known of one feature."""

    rank: int
    """From 1 on: those that pass the test first, then by how much more they add to hallucinated decisions."""
    layer: int
    feature: int
    place: str
    """Where it tells hallucinated mentions from true ones most firmly; see `crosslayer.hallucination.firing.PLACES`."""
    auroc: float
    """There; above 0.5 it fires more where a mention is hallucinated."""
    q: float
    """Of the Mann-Whitney test there, among all features and places."""
    matched_auroc: float
    """The same within strata of the same object and near position."""
    matched_q: float
    passes: bool
    """Whether `matched_q` is at most alpha."""
    frequency: Change
    """Share of the mentions at which it fires there."""
    attribution: Change
    """What it adds to the margin by which a mention is decided, in logits."""
    from_image: float
    """What of `attribution.hallucinated` comes from image positions."""
    stability: float
    """Share of bootstrap resamples in which it is among the top."""
    modality: float
    """Its mean activation on image tokens over the sum of that and that on text tokens."""
    fires: Mapping[str, tuple[float, float]]
    """By place: share of the matched hallucinated, and of the true, mentions at which it fires."""
    objects: Mapping[str, float]
    """The hallucinated objects that it adds most to, with how much, in logits."""
    match: Mapping[str, float]
    """By other run: the largest correlation of its activations with those of a feature there."""
    examples: tuple[Shown, ...] = ()

    @property
    def effect(self) -> float:
        """Rank-biserial correlation of the matched comparison, -1 to 1."""
        return 2 * self.matched_auroc - 1


@dataclass(frozen=True, kw_only=True)
class Beside:
    """How the top of the table fares in another run, trained from another seed for one."""

    run: str
    matched: float
    """Share of the top that has a feature there whose activations correlate with it by at least 0.7."""
    matched_in_top: float
    """The same, with one of the top there."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Features ranked by how much they drive hallucination, found on the split `select` alone."""

    model: str
    run: str
    settings: Mapping[str, Any]
    responses: int
    """In the split."""
    hallucinated: int
    """Mentions."""
    true: int
    matched_hallucinated: int
    """Those of a stratum with both."""
    matched_true: int
    traced_hallucinated: int
    traced_true: int
    left_out: int
    """Mentions that no token could be found to decide for."""
    margin: Change
    """By how many logits a mention is decided, at those traced."""
    alive: int
    """Features that fire at any of the places."""
    tests: int
    """Pairs of feature and place that q-values are over."""
    passing: int
    """Features that pass the matched test."""
    features: tuple[Feature, ...]
    beside: tuple[Beside, ...] = ()

    def to_json(self) -> str:
        """The table as JSON; numbers that could not be measured are null."""
        features = [{**asdict(feature), "effect": feature.effect} for feature in self.features]
        return json.dumps(_plain({**asdict(self), "features": features}), indent=1, ensure_ascii=False)

    def to_csv(self) -> str:
        """A line a feature, without examples."""
        text = io.StringIO()
        rows = [_flat({**_without_examples(f), "effect": f.effect}) for f in self.features]
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def read_contrast(path: Path) -> Contrast:
    """Read `contrast.json`.

    Raises:
        UserError: when it is missing or holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; `crosslayer hallucination contrast` writes one")
    record = read_json(path)
    try:
        features = tuple(_feature(row) for row in record["features"])
        beside = tuple(Beside(**row) for row in record["beside"])
        return Contrast(**{**record, "margin": _change(record["margin"]), "features": features, "beside": beside})
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: is no table of features ({error}); `crosslayer hallucination contrast` writes one"
        ) from None


def read_shown(row: Mapping[str, Any]) -> Shown:
    """An example from its fields as JSON brings them."""
    box = None if row["box"] is None else tuple(row["box"])
    return Shown(**{**row, "box": box, "hallucinated": tuple(row["hallucinated"])})


def _feature(row: dict[str, Any]) -> Feature:
    row = {name: value for name, value in row.items() if name != "effect"}
    changes = {name: _change(row[name]) for name in ("frequency", "attribution")}
    fires = {place: tuple(shares) for place, shares in row["fires"].items()}
    return Feature(**{**_numbers(row), **changes, "fires": fires, "examples": tuple(map(read_shown, row["examples"]))})


def _change(row: dict[str, Any]) -> Change:
    return Change(**_numbers(row))


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {name: float("nan") if value is None else value for name, value in row.items()}


def _plain(value: Any) -> Any:
    """The same with None for numbers that are none."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _without_examples(feature: Feature) -> dict[str, Any]:
    return {name: value for name, value in asdict(feature).items() if name != "examples"}


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Records within a record as columns of their own."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name in ("objects", "match"):
            flat[name] = " ".join(f"{key}:{number:.4g}" for key, number in value.items())
        elif isinstance(value, Mapping):
            flat |= {f"{name}.{key}": inner for key, inner in _flat(value).items()}
        elif isinstance(value, tuple):
            flat |= {f"{name}.hallucinated": value[0], f"{name}.true": value[1]}
        else:
            flat[name] = value
    return flat
