"""An edit file, put on the model that it is for."""

from contextlib import AbstractContextManager
from pathlib import Path

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.models.load import LoadedModel
from crosslayer.replacement.edit_file import EditFile
from crosslayer.replacement.editing import edited


def load_edit(path: str | Path, model: LoadedModel, coder: CrossLayerTranscoder) -> AbstractContextManager[None]:
    """Inside, `model.model` runs with the edits of a file; the model is the original, its MLPs running.

    `with xl.load_edit("edit.json", model, clt): model.model.generate(...)`

    Raises:
        UserError: when the file is missing or damaged, or is for another model or run.
    """
    file = EditFile.load(path)
    file.check(model, coder)
    return edited(model, coder, file.interventions, strength=file.strength)
