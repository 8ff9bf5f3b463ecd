"""How strongly to edit: the strength with least hallucination whose losses are bounded, on images of their own."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crosslayer.errors import UserError
from crosslayer.hallucination.suppress.figures import HALLUCINATION, RETAINED, Dose

RULE = (
    "of the strengths above 0 at which no retained figure is more than {points:g} points below that of strength 0, the "
    "one with least hallucination: the mean of chair_s and false_yes, each relative to strength 0; none: 0"
)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Which strengths are tried, and what may be lost.

    Raises:
        UserError: for no strength, or a bound below 0.
    """

    strengths: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5)
    """Shares of the full edit; 0 is always tried, and those below it add what the edit takes away."""
    points: float = 1.0
    """That any retained figure may lose, in points of a hundred; as these are other images than those of the test,
    twice as much is to be expected there."""

    def __post_init__(self):
        if not any(strength > 0 for strength in self.strengths) or self.points < 0:
            raise UserError(
                f"strengths are {self.strengths}, points {self.points}; give strengths above 0, points from 0"
            )

    @property
    def rule(self) -> str:
        """How the strength is chosen, in words."""
        return RULE.format(points=self.points)

    def choose(self, doses: Sequence[Dose]) -> Dose:
        """The dose that the rule chooses; `doses` hold one of strength 0."""
        base = next(dose for dose in doses if dose.strength == 0)
        allowed = [d for d in doses if d.strength > 0 and losses(d, base) <= self.points / 100 + 1e-9]
        return min([base, *allowed], key=lambda d: (left(d, base), d.strength))


def losses(dose: Dose, base: Dose) -> float:
    """The largest loss of a retained figure, as a share."""
    names = [measure.name for measure in RETAINED if measure.name in base.figures]
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
