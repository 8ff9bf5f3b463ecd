"""The options of loading a model, which every verb that does has."""

from dataclasses import dataclass, fields
from typing import Annotated, Any

from tyro.conf import arg

from crosslayer.errors import UserError
from crosslayer.models.load import (
    DTYPES,
    QUANTISED,
    LoadedModel,
    has_weights,
    load_model,
    load_processor,
    sketch_model,
)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How to load a model; see `crosslayer.load_model`."""

    revision: str | None = None
    """Revision of a hub id."""
    dtype: Annotated[str, arg(help=f"Of the weights: one of {', '.join(DTYPES)}; auto: as they are on disk.")] = "auto"
    device: str | None = None
    """Where to put it: cpu, cuda, cuda:1, ...; a GPU by default where there is one."""
    device_map: str | None = None
    """Spread its layers over several devices: auto or balanced; needs accelerate."""
    load_in: Annotated[str | None, arg(help=f"Quantised by bitsandbytes on a GPU: {', '.join(QUANTISED)}.")] = None
    trust_remote_code: bool = False
    """Run model code that comes with a hub id; think first."""

    def load(self, name: str, read: str = "resid") -> LoadedModel:
        """The model, with its sites proved."""
        return load_model(name, read=read, **{own.name: getattr(self, own.name) for own in fields(ModelOptions)})

    def processor(self, name: str) -> Any:
        """What feeds the model, without its weights."""
        return load_processor(name, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def sketch(self, name: str, read: str = "resid") -> LoadedModel:
        """The model for a dry run: whole where its weights are there, else from its configuration alone."""
        if has_weights(name):
            return self.load(name, read)
        if self.load_in is not None:
            raise UserError(f"{name}: holds no weights, so what --load-in {self.load_in} makes of them is not known")
        return sketch_model(
            name, revision=self.revision, read=read, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )


@dataclass(frozen=True, kw_only=True)
class RunOptions(ModelOptions):
    """How to load a run, and the model that it was trained on."""

    offload: bool = False
    """Leave the run's weights on disk instead of on the GPU, and bring what is used of them: for runs of any size. (On
    a CPU that is how runs are always loaded.)"""


AS_IT_IS = ModelOptions()
"""A model in its own precision, on one device."""
AS_SAVED = RunOptions()
"""A run whole on the device of its model, which is as it is."""
