"""How strongly to edit: the strength with least hallucination whose losses are bounded, on images of their own."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from crosslayer.errors import UserError
from crosslayer.hallucination.measures import Measure
from crosslayer.hallucination.suppress.figures import HALLUCINATION, POOLED, RETAINED, Dose

RULE = (
    "of the strengths above 0 at which object_recall, yes_recall and partner_recall are at most {points:g} points "
    "below those of strength 0, and every retained figure by itself at most {alone:g}, the one with least "
    "hallucination: the mean of chair_s and false_yes, each relative to strength 0; none: 0"
)
ALONE = 2.0
"""How many times as much a figure of few responses may lose."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Which strengths are tried, and what may be lost.

    Raises:
        UserError: for no strength, or a bound below 0.
    """

    strengths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5)
    """Shares of the full edit; 0 is always tried, and those below it add what the edit takes away."""
    points: float = 1.0
    """That recalls may lose, in points of a hundred. Each kind of planted partner by itself may lose twice as much: it
    is a figure of few responses, of which one more or less would decide."""

    def __post_init__(self):
        if not any(strength > 0 for strength in self.strengths) or self.points < 0:
            raise UserError(
                f"strengths are {self.strengths}, points {self.points}; give strengths above 0, points from 0"
            )

    @property
    def rule(self) -> str:
        """How the strength is chosen, in words."""
        return RULE.format(points=self.points, alone=ALONE * self.points)

    def choose(self, doses: Sequence[Dose]) -> Dose:
        """The dose that the rule chooses; `doses` hold one of strength 0."""
        base = next(dose for dose in doses if dose.strength == 0)
        allowed = [d for d in doses if d.strength > 0 and self._allows(d, base)]
        return min([base, *allowed], key=lambda d: (left(d, base), d.strength))

    def _allows(self, dose: Dose, base: Dose) -> bool:
        bound = self.points / 100 + 1e-9
        return losses(dose, base, POOLED) <= bound and losses(dose, base) <= ALONE * bound


def losses(dose: Dose, base: Dose, measures: Collection[Measure] = RETAINED) -> float:
    """The largest loss of a retained figure, as a share."""
    names = [measure.name for measure in measures if measure.name in base.figures]
    return max((base.figures[name] - dose.figures[name] for name in names), default=0.0)


def left(dose: Dose, base: Dose) -> float:
    """Hallucination relative to that without the edit, the mean over captions and questions."""
    shares = [
        dose.figures[measure.name] / base.figures[measure.name]
        for measure in HALLUCINATION
        if base.figures.get(measure.name)
    ]
    return sum(shares) / len(shares) if shares else 1.0


def at_kl(doses: Sequence[Dose], name: str, kl: float) -> float:
    """A figure at a collateral KL between those of a curve's doses from 0 on, linearly; NaN beyond its largest."""
    curve = sorted((dose.kl, dose.figures[name]) for dose in doses if dose.strength >= 0 and name in dose.figures)
    kls, values = zip(*curve, strict=True) if curve else ((0.0,), (float("nan"),))
    return float(np.interp(kl, kls, values, right=float("nan")))
