"""The verb `hallucination`: measure it, find what causes it, suppress it; each step is a verb of its own."""

from typing import Annotated, Any

from tyro.conf import Suppress, arg, subcommand

from crosslayer.verbs.circuits import circuits
from crosslayer.verbs.contrasting import contrast
from crosslayer.verbs.scoring import score
from crosslayer.verbs.suppressing import suppress

Step = Annotated[
    Annotated[Any, subcommand(name="score", constructor=score)]
    | Annotated[Any, subcommand(name="contrast", constructor=contrast)]
    | Annotated[Any, subcommand(name="suppress", constructor=suppress)]
    | Annotated[Any, subcommand(name="circuits", constructor=circuits)]
    | Annotated[None, Suppress],  # a union needs two members
    arg(name=""),
]


def hallucination(step: Step) -> None:
    """Measure a model's hallucination: what its captions and its answers name that is not there."""
