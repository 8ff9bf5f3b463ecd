"""What can be seen of a decision before its token is given: the likeliest tokens and the active features.

Axes: n decisions, C features of all sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from crosslayer.attribution.targets import token_id
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.distributed.crew import ALONE, Crew
from crosslayer.errors import UserError
from crosslayer.hallucination.decisions import Decision, as_batch
from crosslayer.models.hooks import reading
from crosslayer.models.load import LoadedModel

TOGETHER = 16
"""Decisions run together."""
RIVALS = 20
"""Likeliest tokens among which the next one is sought that can be written alone."""


@dataclass(frozen=True, eq=False)
class Looks:
    """Of each decision, at the position where its token is predicted."""

    top: Int[np.ndarray, " n"]
    """Id of the likeliest token."""
    rival: Int[np.ndarray, " n"]
    """Id of the likeliest of the others that can be written alone."""
    log_odds: Float[np.ndarray, " n"]
    """Of the likeliest token against all others."""
    acts: Float[np.ndarray, "n C"]


def look(
    model: LoadedModel, coder: CrossLayerTranscoder, made: Sequence[Decision], folder: Path, crew: Crew = ALONE
) -> Looks:
    """Run the model over the responses as far as their decisions.

    Args:
        model: the language model.
        coder: its transcoder.
        made: decisions.
        folder: that of the responses' file.
        crew: the processes that share the work.
    """
    batches = [made[start : start + TOGETHER] for start in range(0, len(made), TOGETHER)]
    looked = crew.map(lambda i: _look(model, coder, batches[i], folder), len(batches))
    parts = list(tqdm(looked, total=len(batches), unit="batch", desc="look", disable=None, leave=False))
    columns = {name: torch.cat([part[name] for part in parts]).numpy() for name in Looks.__dataclass_fields__}
    return Looks(**columns)


def quoted(tokenizer: Any, id: int) -> str | None:
    """A token as a graph's target names it; None where its text alone would be another."""
    text = tokenizer.decode([id])
    try:
        return f'"{text}"' if '"' not in text and token_id(text, tokenizer) == id else None
    except UserError:
        return None


@torch.no_grad()
def _look(model: LoadedModel, coder: CrossLayerTranscoder, made: Sequence[Decision], folder: Path) -> dict[str, Tensor]:
    """The columns of `Looks` of a batch."""
    decided = as_batch(model, made, folder)
    rows = torch.arange(len(made), device=decided.position.device)
    reads: dict[int, Tensor] = {}
    with reading(model.sites, lambda layer, x: reads.update({layer: x[rows, decided.position]})):
        logits = model.model(**decided.batch.inputs).logits[rows, decided.position].float()
    codes = coder.encode(torch.stack([reads[layer] for layer in sorted(reads)], 1))
    likely = logits.topk(min(RIVALS, logits.shape[1]), dim=1).indices.tolist()
    tokenizer = getattr(model.processor, "tokenizer", model.processor)
    rivals = [next((id for id in ids[1:] if quoted(tokenizer, id)), ids[1]) for ids in likely]
    probability = logits.double().softmax(1).amax(1).clamp(max=1 - 1e-12)
    return {
        "top": torch.tensor([ids[0] for ids in likely]),
        "rival": torch.tensor(rivals),
        "log_odds": probability.logit().cpu(),
        "acts": torch.cat([part.dense() for part in codes], 1).float().cpu(),
    }
