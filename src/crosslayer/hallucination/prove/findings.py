"""What the evidence supports, in words: a sentence for each test, with its figures."""

from collections.abc import Iterator
from dataclasses import dataclass

from crosslayer.hallucination.evidence import LEVEL, Change
from crosslayer.hallucination.prove.proof import LESS, Beaten, Chance, Proof
from crosslayer.hallucination.suppress.figures import RETAINED

WORDS = {
    "absent_named": "captions that name the planted partner though it is absent",
    "absent_affirmed": "answers that affirm the planted partner though it is absent",
    "chair_s": "captions that name anything absent",
    "false_yes": "answers that affirm anything absent",
    "object_recall": "objects that are there and named",
    "yes_recall": "objects that are there and affirmed",
    "beside_its_lead_named": "captions that name the partner where it is there beside its lead",
    "beside_its_lead_affirmed": "answers that affirm the partner where it is there beside its lead",
    "without_its_lead_named": "captions that name the partner where it is there without its lead",
    "without_its_lead_affirmed": "answers that affirm the partner where it is there without its lead",
    "length_words": "words a caption",
    "yes_ratio": "answers that say yes",
    "accuracy": "questions answered right",
}
POINTS = 0.02
"""Of a retained figure, that may be lost."""
CUT = 0.6
"""Share of the planted hallucination that is to go."""
PARTS = {"yes_ratio": ("absent_affirmed", "false_yes"), "length_words": ("absent_named", "chair_s")}
KEPT = {
    "yes_ratio": ("beside_its_lead_affirmed", "without_its_lead_affirmed", "yes_recall"),
    "length_words": ("beside_its_lead_named", "without_its_lead_named", "object_recall"),
}
"""By what a control matches: the hallucination, and the recalls, that tell whether the edit beats it."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A claim, and whether the data support it."""

    topic: str
    claim: str
    supported: bool
    evidence: str


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Something that was to be reached."""

    goal: str
    met: bool
    figures: str


def findings(proof: Proof) -> list[Finding]:
    """A sentence for each test."""
    return [
        *(_lowered(proof, m.name) for m in LESS if m.name in proof.edit.changes),
        *(_retained(proof, m.name) for m in RETAINED if m.name in proof.edit.changes),
        *(_opposite(proof, m.name) for m in LESS if m.name in proof.opposite),
        _nothing_at_0(proof),
        *map(_beyond_chance, proof.chance),
        *(finding for beaten in proof.beaten for finding in _beats(beaten)),
        *_at_equal_kl(proof),
        _cost(proof),
    ]


def goals(proof: Proof) -> list[Goal]:
    """The goals set for planted hallucination; none where nothing is planted."""
    return list(_goals(proof)) if "absent_named" in proof.edit.changes else []


def _lowered(proof: Proof, name: str) -> Finding:
    found, p = proof.edit.changes[name], proof.edit.holm[name]
    return Finding(
        topic="Less is hallucinated",
        claim=f"The edit lowers {WORDS[name]}.",
        supported=found.difference.high < 0 and p < 1 - LEVEL,
        evidence=f"{_from_to(found)}; McNemar {found.lost} lost, {found.gained} gained, p = {p:.2g} after Holm"
        + _needed(found),
    )


def _retained(proof: Proof, name: str) -> Finding:
    found = proof.edit.changes[name]
    return Finding(
        topic="What is true is still said",
        claim=f"The edit costs no more than {100 * POINTS:g} points of {WORDS[name]}.",
        supported=found.difference.low >= -POINTS,
        evidence=_from_to(found) + ("" if found.difference.low >= -POINTS else _undecided(found)),
    )


def _undecided(found: Change) -> str:
    if found.difference.high < -POINTS:
        return "; more is lost"
    return "; the interval includes a loss of more: not excluded" + _needed(found)


def _opposite(proof: Proof, name: str) -> Finding:
    found = proof.opposite[name]
    return Finding(
        topic="The edit is the cause",
        claim=f"The opposite edit, at strength {proof.lowest:g}, raises {WORDS[name]}.",
        supported=found.difference.low > 0,
        evidence=_from_to(found) + _needed(found),
    )


def _beyond_chance(chance: Chance) -> Finding:
    sets = chance.draws.replace("-", " ")
    return Finding(
        topic="It is not chance",
        claim=f"The edit leaves fewer {WORDS[chance.measure]} than all sets of {sets}.",
        supported=chance.edited < min(chance.drawn) and chance.p_value < 1 - LEVEL,
        evidence=f"{chance.edited:.3f} under the edit, {min(chance.drawn):.3f} to {max(chance.drawn):.3f} under "
        f"{len(chance.drawn)} sets, {chance.before:.3f} without; empirical p = {chance.p_value:.3f}",
    )


def _beats(beaten: Beaten) -> Iterator[Finding]:
    control = beaten.control
    for less in (name for name in PARTS[control.measure] if name in beaten.changes):
        hallucinated = beaten.changes[less]
        recalls = {name: beaten.changes[name] for name in KEPT[control.measure] if name in beaten.changes}
        worse = [name for name, change in recalls.items() if change.difference.high < 0]
        better = [name for name, change in recalls.items() if change.difference.low > 0]
        lower, no_higher = hallucinated.difference.high < 0, hallucinated.difference.low <= 0
        told = [f"{WORDS[name]}: {_from_to(recalls[name])}" for name in (*worse, *better)]
        shown = "; ".join(told) or f"none of {len(recalls)} recalls differs clearly"
        yield Finding(
            topic="It is more than saying less",
            claim=f"The edit does better than a bias of {control.bias:+.2f} on {_said(control.tokens)} that leaves as "
            f"many {WORDS[control.measure]}: {WORDS[less]}.",
            supported=not worse and (lower or (no_higher and bool(better))),
            evidence=f"from the control to the edit {_from_to(hallucinated)}{_needed(hallucinated)}; {shown}",
        )


def _at_equal_kl(proof: Proof) -> Iterator[Finding]:
    equal = proof.equal_kl
    if equal is None:
        return
    for name in (m.name for m in LESS if m.name in equal.changes):
        found = equal.changes[name]
        yield Finding(
            topic="A CLT against a PLT",
            claim=f"At equal collateral KL the run's edit leaves fewer {WORDS[name]} than that of the run beside it.",
            supported=found.difference.high < 0,
            evidence=f"from {equal.method} at strength {equal.strength:g} (KL {equal.kl:.4f}) to {proof.kept} "
            f"(KL {equal.kept_kl:.4f}) {_from_to(found)}{_needed(found)}",
        )


def _nothing_at_0(proof: Proof) -> Finding:
    same, n = proof.unchanged["same"], proof.unchanged["prompts"]
    return Finding(
        topic="The edit is the cause",
        claim="At strength 0 nothing changes.",
        supported=same == n,
        evidence=f"the logits of {same:,} of {n:,} prompts are the same, bit for bit",
    )


def _cost(proof: Proof) -> Finding:
    cost = proof.cost
    return Finding(
        topic="What it costs",
        claim="The edited model is at most 1.3 times as slow.",
        supported=cost.ratio <= 1.3,
        evidence=f"{1000 * cost.edited:.2f} CPU ms a generated token against {1000 * cost.plain:.2f}: "
        f"{cost.ratio:.2f} times",
    )


def _goals(proof: Proof) -> Iterator[Goal]:
    for name in ("absent_named", "absent_affirmed"):
        if name not in proof.edit.changes:
            continue
        found = proof.edit.changes[name]
        yield Goal(
            goal=f"{WORDS[name]}: cut by {CUT:.0%} or more, interval clear of zero",
            met=found.relative <= -CUT and found.difference.high < 0,
            figures=_from_to(found),
        )
        for chance in (c for c in proof.chance if c.measure == name):
            yield Goal(
                goal=f"beyond all {len(chance.drawn)} {chance.draws.replace('-', ' ')}",
                met=chance.edited < min(chance.drawn),
                figures=f"{chance.edited:.3f}; the lowest of them {min(chance.drawn):.3f}",
            )
        if proof.equal_kl is not None:
            equal = proof.equal_kl.changes[name]
            yield Goal(
                goal="less than under the edit beside it (PLT) at equal collateral KL, interval clear of zero",
                met=equal.difference.high < 0,
                figures=f"{equal.after.value:.3f} against {equal.before.value:.3f}, difference {equal.difference}",
            )
    for name in (m.name for m in RETAINED if m.name in proof.edit.changes):
        found = proof.edit.changes[name]
        yield Goal(
            goal=f"{WORDS[name]}: no more than {100 * POINTS:g} points lost",
            met=found.difference.value >= -POINTS,
            figures=_from_to(found),
        )


def _from_to(found: Change) -> str:
    share = f" ({found.relative:+.0%})" if abs(found.relative) < 10 else ""
    return f"{found.before.value:.3f} to {found.after.value:.3f}, {_signed(found)}{share}"


def _signed(found: Change) -> str:
    d = found.difference
    return f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"


def _needed(found: Change) -> str:
    """How many images it would take, where the interval includes zero."""
    if found.clear:
        return ""
    if found.images_needed is None:
        return f"; no difference to size a sample by ({found.n_images:,} images)"
    needed, n = found.images_needed, found.n_images
    return f"; about {needed:,} images would tell a difference of this size from zero ({n:,} now)"


def _said(tokens: tuple[str, ...]) -> str:
    return ", ".join(f'"{token}"' for token in tokens)
