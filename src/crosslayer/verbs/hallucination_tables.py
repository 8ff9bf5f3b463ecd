"""Figures of hallucination for a terminal."""

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
