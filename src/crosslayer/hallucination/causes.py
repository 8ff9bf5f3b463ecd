"""What each feature contributes to the margin by which a mention is decided: the graph's own edges into that margin.

With attention patterns and norm denominators held at a prompt's values, a margin is a sum over what features write
(`crosslayer.replacement.local`). A feature's share is its activation times its write vectors times the frozen Jacobian:
the edge from it to the margin in the attribution graph, summed over positions. Other features' firing is held, so what
a feature does by way of them is theirs.

Axes: N decisions, S sources, F features a source.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.sparse import coo_array, csr_array, vstack
from torch import Tensor
from tqdm import tqdm

from crosslayer.attribution.parts import split
from crosslayer.attribution.rows import rows_of
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.distributed.crew import ALONE, Crew
from crosslayer.distributed.results import Result
from crosslayer.hallucination.decisions import Decided, Decision, as_batch
from crosslayer.models.load import LoadedModel
from crosslayer.replacement.local import trace


@dataclass(frozen=True)
class Causes:
    """Attributions in logits, N by S x F (source by source)."""

    text: csr_array
    """From text positions."""
    image: csr_array
    """From image positions."""
    margin: Float64[np.ndarray, " N"]
    """By how many logits each mention is decided."""

    @property
    def total(self) -> csr_array:
        """From all positions."""
        return (self.text + self.image).tocsr()


def causes(
    model: LoadedModel, coder: CrossLayerTranscoder, made: Sequence[Decision], folder: Path, crew: Crew = ALONE
) -> Causes:
    """The attribution of every feature to the margin of every decision, one prompt traced after the other.

    Args:
        model: the language model.
        coder: its transcoder.
        made: the decisions.
        folder: that of the responses' file.
        crew: the processes that share the work.

    Raises:
        UserError: for a model that cannot be traced, or a transcoder whose features have no writes of their own.
    """
    found = crew.map(lambda i: _row(model, coder, as_batch(model, [made[i]], folder)), len(made))
    rows = list(tqdm(found, total=len(made), unit="decision", desc="trace", disable=None, leave=False))
    text, image = (csr_array(vstack([row[name] for row in rows])) for name in ("text", "image"))
    return Causes(text, image, np.array([row["margin"] for row in rows]))


def _row(model: LoadedModel, coder: CrossLayerTranscoder, decided: Decided) -> Result:
    """The row of `Causes` of one decision."""
    local = trace(model, coder, decided.batch)
    parts = split(local, coder, decided.batch.position[0] == 0)
    place = int(decided.position[0])
    found = rows_of(local, parts, local.into_logits(place, _direction(decided, local.logits)[:, place]))
    active = parts.active
    source = torch.searchsorted(torch.tensor(coder.sources, device=active.layers.device), active.layers)
    columns, seen = active.features + source * coder.d_transcoder, decided.batch.image[0, active.positions]
    value, column, of_image = (part.cpu().numpy() for part in (found.features[0], columns, seen))
    width = len(coder.sources) * coder.d_transcoder
    text, image = (_summed(value[part], column[part], width) for part in (~of_image, of_image))
    return {"text": text, "image": image, "margin": decided.margin(local.logits.detach()).item()}


def _direction(decided: Decided, logits: Float[Tensor, "1 P V"]) -> Float[Tensor, "1 P V"]:
    """The margin's gradient in the logits."""
    leaf = logits.detach().requires_grad_()
    return torch.autograd.grad(decided.margin(leaf).sum(), leaf)[0]


def _summed(values: np.ndarray, columns: np.ndarray, width: int) -> csr_array:
    return coo_array((values.astype(np.float64), (np.zeros_like(columns), columns)), shape=(1, width)).tocsr()
