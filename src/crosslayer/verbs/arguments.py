"""Arguments that several verbs share, and what is made of them."""

from dataclasses import replace
from typing import Annotated

from tyro.conf import Positional, arg

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.data.examples import Examples
from crosslayer.data.reading import DATA_KINDS, Reading
from crosslayer.errors import UserError
from crosslayer.model_options import ModelOptions, RunOptions
from crosslayer.models.load import LoadedModel

Model = Annotated[
    Positional[str], arg(metavar="MODEL", help="Bundled name (emoji-llava, smollm2), model folder, or hub id.")
]
Data = Annotated[Positional[str], arg(metavar="DATA", help=DATA_KINDS)]
Run = Annotated[Positional[str], arg(metavar="RUN", help="Folder of a trained transcoder, or its hub id.")]
HowRead = Annotated[Reading, arg(name="")]
Read = Annotated[str, arg(help="What the encoders read: resid (before the MLP's norm) or mlp_in (after).")]
Loading = Annotated[ModelOptions, arg(name="")]
RunLoading = Annotated[RunOptions, arg(name="")]
Seed = Annotated[int, arg(help="Seed of the weights and of the order of the data.")]
FirstTarget = Annotated[int, arg(help="0: a source writes to its own layer first; 1: to the next.")]
OtherModel = Annotated[str | None, arg(help="Model to use instead of the one the run names.")]
Plain = Annotated[bool, arg(help="Take the prompt as it is, without the model's chat template.")]
Overwrite = Annotated[bool, arg(help="Replace what an earlier run left in the output folder.")]


def check_positive(**numbers: int) -> None:
    """Refuse numbers below 1, naming them."""
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"{name} is {number}; choose at least 1")


def load_run(run: str, model: str | None, loading: RunOptions) -> tuple[CrossLayerTranscoder, LoadedModel]:
    """A run, and the model that it was trained on or another."""
    coder = CrossLayerTranscoder.load(run, offload=loading.offload).requires_grad_(False)
    came_from = coder.provenance
    name = model or came_from.model_id
    if not name:
        raise UserError(f"{run}: does not say which model it was trained on; add --model")
    revision = loading.revision or (None if model else came_from.revision or None)
    return coder, replace(loading, revision=revision).load(name, came_from.read)


def print_skipped(data: Examples | None) -> None:
    """Say what was left out of a data set, where something was."""
    if data is not None and data.skipped.reasons:
        print(data.skipped)
