"""Figures of suppression for a terminal."""

from collections.abc import Sequence
from math import isnan

from crosslayer.hallucination.suppress.everything import Suppression
from crosslayer.hallucination.suppress.figures import Dose
from crosslayer.hallucination.suppress.outcome import Outcome
from crosslayer.report import table

SHOWN = {
    "absent_named": "absent B named",
    "absent_affirmed": "affirmed",
    "chair_s": "chair_s",
    "false_yes": "false yes",
    "object_recall": "recall",
    "yes_recall": "yes-recall",
    "beside_its_lead_named": "B by A named",
    "beside_its_lead_affirmed": "affirmed",
    "without_its_lead_named": "B alone named",
    "without_its_lead_affirmed": "affirmed",
    "length_words": "words",
}


def suppress_tables(found: Suppression) -> str:
    """The test of every method, the dose curve of the kept edit, methods at equal KL, and chance."""
    parts = [_tests(found), _doses(found.outcome(found.kept)), _comparisons(found), _chance(found)]
    return "\n\n".join(filter(None, parts))


def _tests(found: Suppression) -> str:
    names = [name for name in SHOWN if name in found.before]
    rows = [["as it is", "", "", *(f"{found.before[name]:.3f}" for name in names), "0"]]
    for o in found.outcomes:
        assert o.test is not None
        title = f"{o.method} *" if o.method == found.kept else o.method
        rows.append([title, str(len(o.edits)), f"{o.strength:g}", *_cells(o.test, names)])
    note = f"* the edit that is kept; tests run: {max(o.tests for o in found.outcomes)}"
    return table(["test", "edits", "strength", *(SHOWN[name] for name in names), "KL"], rows) + f"\n{note}"


def _doses(kept: Outcome) -> str:
    names = [name for name in SHOWN if name in kept.doses[0].figures]
    rows = [[f"{dose.strength:g}", *_cells(dose, names)] for dose in kept.doses]
    return table([f"{kept.method}, dose", *(SHOWN[name] for name in names), "KL"], rows)


def _comparisons(found: Suppression) -> str:
    rows = [
        [c.measure, f"{c.kl:.4f}", c.method, f"{c.value:.3f}", c.other, f"{c.others:.3f}"]
        for c in found.comparisons
        if not isnan(c.others)  # no strength of the other reaches that KL
    ]
    return table(["at equal KL", "KL", "method", "share", "other", "share"], rows) if rows else ""


def _chance(found: Suppression) -> str:
    names = [name for name in SHOWN if name in found.control]
    rows = [["as it is", *(f"{found.unedited_control[name]:.3f}" for name in names)]]
    rows.append([found.kept, *(f"{found.control[name]:.3f}" for name in names)])
    rows += [[f"{name}, lowest", *_lowest(doses, names)] for name, doses in found.chance.items()]
    return table(["chance, on images for control", *(SHOWN[name] for name in names)], rows) if found.chance else ""


def _cells(dose: Dose, names: Sequence[str]) -> list[str]:
    return [*(f"{dose.figures[name]:.3f}" for name in names), f"{dose.kl:.4f}"]


def _lowest(doses: Sequence[Dose], names: Sequence[str]) -> list[str]:
    return [f"{min(dose.figures[name] for dose in doses):.3f}" for name in names]
