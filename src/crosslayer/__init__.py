"""crosslayer: cross-layer transcoders for language and vision-language models."""

import os

# Idle OpenMP threads sleep instead of spinning: beside another busy process, spinning made a capture 12 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A rank that is lost is told of in a line of ours; torch, which reads this once, would log pages of its own frames.
if "RANK" in os.environ:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

from crosslayer.activations.store import Store
from crosslayer.activations.to_store import capture_to_store as capture
from crosslayer.answering import Answering, respond
from crosslayer.attribution.aggregate import Aggregate
from crosslayer.attribution.attribute import Budget, attribute
from crosslayer.attribution.graph import AttributionGraph
from crosslayer.attribution.many import Case, Tracing, Workers, aggregate
from crosslayer.attribution.targets import Target
from crosslayer.coders.decoders import Full, LowRank, SourceAndTargetTied, SourceTied, TargetTied
from crosslayer.coders.sparsity import BatchTopK, GroupMax, JointTopK, JumpReLU, ReLU, TopK
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.data.examples import Example
from crosslayer.data.load import load_data
from crosslayer.errors import UserError
from crosslayer.evaluation import Evaluation, evaluate
from crosslayer.models.load import LoadedModel, load_model
from crosslayer.replacement.actions import Ablate, Add, Scale, Set
from crosslayer.replacement.edit_file import EditFile
from crosslayer.replacement.editing import edited
from crosslayer.replacement.interventions import Intervention, Steer
from crosslayer.replacement.loading_edits import load_edit
from crosslayer.replacement.model import ReplacementModel
from crosslayer.replacement.patching import patched
from crosslayer.replacement.sweeping import sweep
from crosslayer.replacement.where import Everywhere, Part, Positions
from crosslayer.training.config import TrainConfig
from crosslayer.training.losses import FVU, KL, CrossEntropy
from crosslayer.training.optimizers import Adam, Adam8bit, AdamW, Muon
from crosslayer.training.revival import AuxK, DeadPenalty
from crosslayer.wiring import Wiring
from crosslayer.workflow import train, train_at_once, train_from_store

__all__ = [
    "FVU",
    "KL",
    "Ablate",
    "Adam",
    "Adam8bit",
    "AdamW",
    "Add",
    "Aggregate",
    "Answering",
    "AttributionGraph",
    "AuxK",
    "BatchTopK",
    "Budget",
    "Case",
    "CrossEntropy",
    "CrossLayerTranscoder",
    "DeadPenalty",
    "EditFile",
    "Evaluation",
    "Everywhere",
    "Example",
    "Full",
    "GroupMax",
    "Intervention",
    "JointTopK",
    "JumpReLU",
    "LoadedModel",
    "LowRank",
    "Muon",
    "Part",
    "Positions",
    "ReLU",
    "ReplacementModel",
    "Scale",
    "Set",
    "SourceAndTargetTied",
    "SourceTied",
    "Steer",
    "Store",
    "Target",
    "TargetTied",
    "TopK",
    "Tracing",
    "TrainConfig",
    "UserError",
    "Wiring",
    "Workers",
    "aggregate",
    "attribute",
    "capture",
    "edited",
    "evaluate",
    "load_data",
    "load_edit",
    "load_model",
    "patched",
    "respond",
    "sweep",
    "train",
    "train_at_once",
    "train_from_store",
]
