"""Circuits of hallucination for a terminal."""

from crosslayer.hallucination.circuits.foresight import PUBLISHED
from crosslayer.hallucination.circuits.planted import Planted
from crosslayer.hallucination.circuits.record import Circuits
from crosslayer.report import table

SHOWN = 12


def circuits_table(found: Circuits) -> str:
    """What differs, how well it tells hallucination beforehand, and how it agrees with what is planted."""
    parts = [_features(found), *([] if found.planted is None else _planted(found.planted)), _foresight(found)]
    return "\n\n".join(parts)


def _features(found: Circuits) -> str:
    rows = [
        [f"{f.layer}.{f.feature}", f.moment, f.place, f"{f.effect:+.3f}", f"{f.effect_true:+.3f}", f"{f.q:.0e}"]
        for f in found.features[:SHOWN]
    ]
    graphs = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in found.counts.items())
    return f"{graphs}\n\n" + table(["layer.feature", "moment", "at", "effect h", "effect t", "q"], rows)


def _planted(found: Planted) -> list[str]:
    sights = [
        [s.name, f"{s.n:,}", f"{s.patch:+.2f}", f"{s.word:+.2f}", f"{s.share:.0%}", f"{s.first:.0%}"]
        for s in found.sights
    ]
    cuts = [[f"first {c.k}", f"{c.precision:.2f}", f"{c.recall:.2f}"] for c in found.cuts]
    writing = [["→".join(w.pair), str(w.features), f"{w.by_chance:.1f}", f"{w.effect:.0%}"] for w in found.writing]
    return [
        table(["whose patch", "n", "adds", "word adds", "share (11 %)", "first (11 %)"], sights),
        table([f"{len(found.strengths):,} pairs ranked", "precision", "recall"], cuts)
        + f"\naverage precision {found.average_precision:.2f}",
        table(["of the first 20 features", "write its word", "another's", "effect"], writing),
    ]


def _foresight(found: Circuits) -> str:
    rows = [
        [f.name, str(f.auc), f"{f.gain.value:+.3f} [{f.gain.low:+.3f}, {f.gain.high:+.3f}]"] for f in found.foresight
    ]
    heading = table(["told beforehand from", "AUC", "above the first"], rows)
    return f"{heading}\n95 % intervals over images; published for graph statistics: {PUBLISHED}"
