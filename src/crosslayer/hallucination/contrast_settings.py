"""How features are compared and ranked, as a user sets it."""

from dataclasses import dataclass

from crosslayer.errors import UserError
from crosslayer.hallucination.comparing import About


@dataclass(frozen=True, kw_only=True)
class ContrastSettings:
    """How features are compared and ranked."""

    about: About = "both"
    """Mentions in captions, affirmed questions, or both, each compared with its own kind."""
    near: int = 6
    """Mentions of an object are near each other when they begin in the same stretch of so many tokens."""
    at_least: int = 10
    """Hallucinating responses wanted in every split, and hallucinated mentions with a true match in this one."""
    traced: int = 150
    """Hallucinated decisions to trace at most, and as many true ones."""
    alpha: float = 0.05
    """False discovery rate."""
    top: int = 20
    """Features whose place among the first so many is asked for, in resamples and in other runs."""
    rows: int = 100
    """Features in the table at most."""
    examples: int = 4
    """Responses shown for each of the top features."""
    resamples: int = 1000
    """Bootstrap resamples of the images."""
    batch_prompts: int = 16
    """Responses run together."""
    seed: int = 0
    """Of resamples, and of which decisions are traced."""
    split_seed: int = 0
    """Of the splits; the same in every stage."""

    def __post_init__(self):
        for name in ("near", "at_least", "traced", "top", "rows", "resamples", "batch_prompts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; choose at least 1")
        if not 0 < self.alpha < 1:
            raise UserError(f"alpha is {self.alpha}; choose a rate between 0 and 1")
        if self.examples < 0:
            raise UserError(f"examples is {self.examples}; choose at least 0")
