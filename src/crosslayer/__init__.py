"""crosslayer: cross-layer transcoders for language and vision-language models."""

import os

# Idle OpenMP threads sleep instead of spinning: beside another busy process, spinning made a capture 12 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from crosslayer.coders.sparsity import JointTopK, JumpReLU, ReLU, TopK
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.data.examples import Example
from crosslayer.data.load import load_data
from crosslayer.errors import UserError
from crosslayer.evaluation import Evaluation, evaluate
from crosslayer.models.load import LoadedModel, load_model
from crosslayer.replacement.model import ReplacementModel
from crosslayer.training.config import TrainConfig
from crosslayer.training.objective import AuxK
from crosslayer.wiring import Wiring
from crosslayer.workflow import train

__all__ = [
    "AuxK",
    "CrossLayerTranscoder",
    "Evaluation",
    "Example",
    "JointTopK",
    "JumpReLU",
    "LoadedModel",
    "ReLU",
    "ReplacementModel",
    "TopK",
    "TrainConfig",
    "UserError",
    "Wiring",
    "evaluate",
    "load_data",
    "load_model",
    "train",
]
