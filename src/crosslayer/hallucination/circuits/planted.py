"""Circuits against what the bundled world planted: who makes the model name a partner that is not there?

Measured where an object is named, on its word's logit. Pairs are ranked by what the sight and the word of one object
add to the naming of another, in hallucinated and true mentions alike, so that the ranking knows no labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from crosslayer.attribution.tally import Tally
from crosslayer.hallucination.circuits.parts import Start, starts
from crosslayer.hallucination.circuits.standing import BACKGROUND, LEAD_OF

AT_LEAST = 2
"""Mentions that a pair needs to be ranked."""
CUTS = (1, 2, 4, 8, 12, 16)
"""k, of precision and recall at k."""
TOP = 20
"""Features of a pair's circuit among which those that write its word are sought."""
WORDS = 3
"""Objects' words that a feature is said to write: those that it raises most."""

Pair = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Naming:
    """A graph of an object's naming, in a picture where it is known what stands where."""

    tally: Tally
    object: str
    hallucinated: bool
    places: Mapping[int, str]

    @property
    def starts(self) -> dict[str, Start]:
        """What starts at each cell, by what stands there."""
        return starts(self.tally, self.places)


@dataclass(frozen=True, kw_only=True)
class Sight:
    """Where namings start, averaged over a set: from one object's patch among all of them."""

    name: str
    n: int
    patch: float
    """Effect of the object's patch, in logits."""
    word: float
    """Effect of its word, said before."""
    share: float
    """Of all that patches add, what this one does; by chance 1/9."""
    first: float
    """Share of the graphs in which it adds more than any other patch; by chance 1/9."""
    influence: float
    """Share of the patches' influence; by chance 1/9."""


@dataclass(frozen=True, kw_only=True)
class Strength:
    """How much one object drives the naming of another, on average."""

    object: str
    named: str
    n: int
    """Namings with the object in the picture."""
    patch: float
    word: float
    planted: bool

    @property
    def total(self) -> float:
        """What the pair is ranked by, in logits."""
        return self.patch + self.word


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The first k of the ranking."""

    k: int
    precision: float
    recall: float


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Whether a pair's circuit has features that write the partner's word."""

    pair: Pair
    features: int
    """Of the first 20 by effect, those that have the partner's among the three words they raise most."""
    by_chance: float
    """The same for the other partners' words, on average."""
    effect: float
    """What they add, as a share of what the first 20 do."""


@dataclass(frozen=True, kw_only=True)
class Planted:
    """How well circuits find what was planted."""

    sights: tuple[Sight, ...]
    strengths: tuple[Strength, ...]
    """All pairs that were seen often enough, the strongest first."""
    planted_pairs: int
    cuts: tuple[Cut, ...]
    average_precision: float
    writing: tuple[Writing, ...]


Writes = Callable[[int, int], Sequence[str]]
"""Of a layer and a feature, the objects' words that it raises most."""


def score_planted(namings: Sequence[Naming], writes: Writes) -> Planted:
    """Score circuits against the planted pairs."""
    strengths = rank_pairs(namings)
    hits = np.array([strength.planted for strength in strengths], np.int64)
    return Planted(
        sights=tuple(sight for sight in _sights(namings) if sight.n),
        strengths=tuple(strengths),
        planted_pairs=len(LEAD_OF),
        cuts=tuple(Cut(k=k, precision=hits[:k].sum() / k, recall=hits[:k].sum() / len(LEAD_OF)) for k in CUTS),
        average_precision=average_precision(hits, len(LEAD_OF)),
        writing=tuple(_writing(pair, namings, writes) for pair in _pairs(namings)),
    )


def rank_pairs(namings: Sequence[Naming]) -> list[Strength]:
    """Pairs of an object in the picture and another that is named, the strongest first."""
    seen: dict[Pair, list[Start]] = {}
    for naming in namings:
        for name, start in naming.starts.items():
            if name != naming.object and not name.startswith(BACKGROUND):
                seen.setdefault((name, naming.object), []).append(start)
    found = [_strength(pair, some) for pair, some in seen.items() if len(some) >= AT_LEAST]
    return sorted(found, key=lambda strength: (-strength.total, strength.object, strength.named))


def _strength(pair: Pair, some: Sequence[Start]) -> Strength:
    patch, word = (float(np.mean([getattr(start, name) for start in some])) for name in ("patch", "word"))
    return Strength(
        object=pair[0], named=pair[1], n=len(some), patch=patch, word=word, planted=LEAD_OF.get(pair[1]) == pair[0]
    )


def average_precision(hits: Int[np.ndarray, " n"], of: int) -> float:
    """Mean over what was to be found, of the precision where each is found; 0 for what is not."""
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / of)


def _sights(namings: Sequence[Naming]) -> list[Sight]:
    """Leads and other objects, where the mention is hallucinated, true beside its lead, or of an object without one."""
    with_lead = [n for n in namings if LEAD_OF.get(n.object) in n.places.values()]
    hallucinated, beside = ([n for n in with_lead if n.hallucinated == kind] for kind in (True, False))
    plain = [n for n in namings if n.object not in LEAD_OF and not n.hallucinated]
    return [
        _sight("lead, hallucinated", hallucinated, lambda n: [str(LEAD_OF[n.object])]),
        _sight("other objects, hallucinated", hallucinated, _others),
        _sight("lead, true", beside, lambda n: [str(LEAD_OF[n.object])]),
        _sight("named object, true beside its lead", beside, lambda n: [n.object]),
        _sight("named object, no partner", plain, lambda n: [n.object]),
        _sight("other objects, no partner", plain, _others),
    ]


def _others(naming: Naming) -> list[str]:
    known = {naming.object, LEAD_OF.get(naming.object)}
    return [name for name in naming.places.values() if name not in known and not name.startswith(BACKGROUND)]


def _sight(name: str, namings: Sequence[Naming], whose: Callable[[Naming], list[str]]) -> Sight:
    rows = [row for naming in namings for row in _rows(naming.starts, whose(naming))]
    adds, all_add, influence, all_influence, word, first, patch = np.array(rows).reshape(-1, 7).sum(0)
    n = max(1, len(rows))
    return Sight(
        name=name, n=len(rows), patch=patch / n, word=word / n, share=adds / (all_add or 1),
        first=first / n, influence=influence / (all_influence or 1),
    )  # fmt: skip


def _rows(found: Mapping[str, Start], names: Sequence[str]) -> list[list[float]]:
    patch = {name: start.patch for name, start in found.items()}
    adds = sum(max(value, 0.0) for value in patch.values())
    influence, best = sum(start.influence for start in found.values()), max(patch, key=patch.__getitem__)
    return [
        [
            max(patch[name], 0.0), adds, found[name].influence, influence, found[name].word, float(best == name),
            patch[name],
        ]
        for name in names
    ]  # fmt: skip


def _pairs(namings: Sequence[Naming]) -> list[Pair]:
    named = {naming.object for naming in namings if naming.hallucinated}
    return [(lead, partner) for partner, lead in LEAD_OF.items() if partner in named]


def _writing(pair: Pair, namings: Sequence[Naming], writes: Writes) -> Writing:
    effect = feature_effects([n.tally for n in namings if n.hallucinated and n.object == pair[1]])
    top = sorted(effect, key=lambda key: -effect[key])[:TOP]
    words = {key: writes(*key) for key in top}
    mine = [key for key in top if pair[1] in words[key]]
    others = [sum(partner in words[key] for key in top) for partner in LEAD_OF if partner != pair[1]]
    total = sum(effect[key] for key in top)
    share = sum(effect[key] for key in mine) / total if total else float("nan")
    return Writing(pair=pair, features=len(mine), by_chance=float(np.mean(others)), effect=share)


def feature_effects(found: Sequence[Tally]) -> dict[tuple[int, int], float]:
    """Mean effect of each feature, wherever it fires, by layer and number."""
    sums: dict[tuple[int, int], float] = {}
    for one in found:
        for role, effect in zip(one.roles, one.effect.tolist(), strict=True):
            if role.kind == "feature" and role.layer is not None and role.feature is not None:
                key = (role.layer, role.feature)
                sums[key] = sums.get(key, 0.0) + effect / len(found)
    return sums
