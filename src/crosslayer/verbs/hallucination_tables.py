"""Figures of hallucination for a terminal."""

from crosslayer.hallucination.feature_table import Change, Contrast, Feature
from crosslayer.hallucination.responses import CAPTION, QUESTION
from crosslayer.hallucination.scoring import PLANT, Score
from crosslayer.report import table


def score_tables(score: Score) -> str:
    """A table for captions and one for questions, a line a group, and one for what is planted."""
    counted = f"{score.images:,} images, {score.captions:,} captions, {score.questions:,} questions"
    if score.questions:
        counted += f" ({score.unparseable:,} with an answer that is neither yes nor no)"
    parts = [_by_group(score, CAPTION), _by_group(score, QUESTION), _planted(score)]
    return "\n\n".join([*filter(None, parts), f"{counted}; 95 % intervals from a bootstrap over images"])


def _by_group(score: Score, kind: str) -> str:
    """Groups down, measures across; the share of unparseable answers is said elsewhere."""
    found = [f for f in score.figures if f.kind == kind and f.measure != "unparseable"]
    measures, groups = dict.fromkeys(f.measure for f in found), dict.fromkeys(f.group for f in found)
    rows = [[group, *(str(score.figure(kind, measure, group)) for measure in measures)] for group in groups]
    return table([f"{kind}s", *measures], rows) if found else ""


def _planted(score: Score) -> str:
    rows = [[f.measure, str(f.figure), f"{f.of:,}"] for f in score.figures if f.kind == PLANT and f.of]
    return table(["planted pairs", "share", "of"], rows) if rows else ""


def contrast_table(found: Contrast, n: int = 15) -> str:
    """The first features of a table, and what was compared."""
    header = ["", "layer.feature", "at", "AUROC", "matched", "q", "fires h", "fires t", "adds h", "adds t", "h - t"]
    rows = [_feature_cells(feature) for feature in found.features[:n]]
    lines = [table([*header, "stable", "modality"], rows), "", compared_text(found)]
    for other in found.beside:
        lines.append(f"{other.run}: {other.matched:.0%} of the top have a match, {other.matched_in_top:.0%} in its top")
    if found.left_out:
        lines.append(
            f"{found.left_out:,} mentions left out: they have no token span, or no token that decides for them"
        )
    return "\n".join(lines)


def compared_text(found: Contrast) -> str:
    """What was compared, and how many features there were."""
    return "\n".join(
        [
            f"{found.passing:,} of {found.alive:,} features that fire pass, at q <= {found.settings['alpha']:g} over "
            f"{found.tests:,} pairs of feature and place",
            f"{found.matched_hallucinated:,} of {found.hallucinated:,} hallucinated mentions (h) compared with "
            f"{found.matched_true:,} true ones (t) of the same object near the same position, in "
            f"{found.responses:,} responses of the split select",
            f"{found.traced_hallucinated:,} (h) and {found.traced_true:,} (t) traced, decided by "
            f"{found.margin.hallucinated:.2f} and {found.margin.true:.2f} logits",
        ]
    )


def _feature_cells(feature: Feature) -> list[str]:
    frequency, added = feature.frequency, feature.attribution
    return [
        str(feature.rank), f"{feature.layer}.{feature.feature}", feature.place, f"{feature.auroc:.2f}",
        f"{feature.matched_auroc:.2f}", f"{feature.matched_q:.0e}", f"{frequency.hallucinated:.0%}",
        f"{frequency.true:.0%}", f"{added.hallucinated:.3f}", f"{added.true:.3f}", _difference(added),
        f"{feature.stability:.0%}", f"{feature.modality:.2f}",
    ]  # fmt: skip


def _difference(change: Change) -> str:
    return f"{change.difference:.3f} [{change.low:.3f}, {change.high:.3f}]"
