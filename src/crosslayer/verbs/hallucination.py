"""The verb `hallucination`: measure it, find what causes it, suppress it; each step is a verb of its own."""

from typing import Annotated, Any

from tyro.conf import Suppress, arg, subcommand

from crosslayer.verbs.scoring import score

Step = Annotated[
    Annotated[Any, subcommand(name="score", constructor=score)]
    | Annotated[None, Suppress],  # a union needs two members
    arg(name=""),
]


def hallucination(step: Step) -> None:
    """Measure a model's hallucination: what its captions and its answers name that is not there."""
