"""Baselines along one direction of the stream: the difference of means, and a linear probe.

Both are made of what a layer reads at decisions (the position that predicts the deciding token): hallucinated ones
against true ones. A vector is as long as the two means are apart along it, so that taking it away once moves the one
mean onto the other.

Axes: n decisions, L layers, D d_model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor
from tqdm import tqdm

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.hallucination.decisions import Decision, as_batch
from crosslayer.hallucination.suppress.objective import Objective, batches
from crosslayer.hallucination.suppress.selection import Chosen, Step, under
from crosslayer.models.hooks import reading
from crosslayer.models.load import LoadedModel
from crosslayer.replacement.actions import Ablate, Action, Add
from crosslayer.replacement.interventions import Steer
from crosslayer.replacement.where import Part, Where

Direction = Callable[[Float[Tensor, "n D"], Float[Tensor, "m D"]], Float[Tensor, " D"]]
"""From what a layer reads at hallucinated and at true decisions, a vector from the second to the first."""


@dataclass(frozen=True, kw_only=True)
class Along:
    """Takes a direction away from the stream, at the layer and in the way that lowers the objective most."""

    direction: str
    """One of `DIRECTIONS`."""
    where: Where = Part("text")  # noqa: RUF009
    actions: tuple[Action, ...] = (Add(-1.0), Add(-2.0), Ablate())
    """Ways tried at each layer: the vector once, twice, or the stream's whole part along it."""
    drawn: int = 2
    """Batches of each kind of decision, and of clean responses, that all of these are tried on."""

    def choose(self, objective: Objective, coder: CrossLayerTranscoder) -> Chosen:
        """See `Strategy.choose`."""
        wrong, right = (
            reads_at(objective.model, made, objective.folder) for made in (objective.hallucinated, objective.true)
        )
        direction = DIRECTIONS[self.direction]
        vectors = [direction(wrong[:, layer], right[:, layer]) for layer in range(wrong.shape[1])]
        tried = [
            Steer(layer=layer, vector=vector, action=action, where=self.where, site="read")
            for layer, vector in enumerate(vectors)
            for action in self.actions
        ]
        bar = tqdm(tried, unit="direction", desc="choose a direction", disable=None, leave=False)
        parts = objective.drawn(self.drawn, torch.Generator().manual_seed(0))
        terms = [objective.measure(under(objective.model, coder, [steer], 1.0), parts) for steer in bar]
        best = min(range(len(tried)), key=lambda i: terms[i].value)
        path = tuple(
            Step(tried=f"layer {steer.layer}, {steer.action}", terms=terms[i], kept=i == best)
            for i, steer in enumerate(tried)
        )
        return Chosen(edits=(tried[best],), path=path)


def mean_difference(wrong: Float[Tensor, "n D"], right: Float[Tensor, "m D"]) -> Float[Tensor, " D"]:
    """From the mean of the true to that of the hallucinated decisions."""
    return wrong.mean(0) - right.mean(0)


def probe(wrong: Float[Tensor, "n D"], right: Float[Tensor, "m D"]) -> Float[Tensor, " D"]:
    """The direction along which a logistic regression tells them apart, as long as their means are apart along it."""
    x, y = torch.cat([wrong, right]), torch.cat([wrong.new_ones(len(wrong)), wrong.new_zeros(len(right))])
    spread = x.std(0).clamp_min(1e-6)
    weights = torch.from_numpy(
        logistic(((x - x.mean(0)) / spread).double().numpy(force=True), y.numpy(force=True))[:-1]
    )
    unit = weights.to(spread) / spread
    unit = unit / unit.norm()
    return unit * (unit @ mean_difference(wrong, right))


DIRECTIONS: dict[str, Direction] = {"mean-difference": mean_difference, "probe": probe}


def logistic(x: Float[np.ndarray, "n D"], y: Float[np.ndarray, " n"], penalty: float = 1.0) -> Float[np.ndarray, " K"]:
    """Weights [D] and bias of the logistic regression of y (0 or 1) with penalty / 2 x |weights|^2, by L-BFGS."""
    signs, ones = 2.0 * y - 1.0, np.concatenate([x, np.ones((len(x), 1))], 1)
    shrunk = np.append(np.full(x.shape[1], penalty), 0.0)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = signs * (ones @ w)
        slope = -signs * np.exp(-np.logaddexp(0, margin))
        return float(np.logaddexp(0, -margin).sum() + (shrunk * w * w).sum() / 2), ones.T @ slope + shrunk * w

    return minimize(loss, np.zeros(ones.shape[1]), jac=True, method="L-BFGS-B", options={"gtol": 1e-6}).x


@torch.no_grad()
def reads_at(
    model: LoadedModel, made: Sequence[Decision], folder: Path, batch_prompts: int = 64
) -> Float[Tensor, "n L D"]:
    """What every layer's MLP reads where decisions are made."""
    found = []
    for some in batches(made, batch_prompts):
        decided, reads = as_batch(model, some, folder), []
        rows = torch.arange(len(some), device=decided.position.device)

        def read(_: int, x: Tensor, rows=rows, decided=decided, reads=reads) -> None:
            reads.append(x[rows, decided.position].float())

        with reading(model.sites, read):
            model.body(**decided.batch.inputs, use_cache=False)
        found.append(torch.stack(reads, 1))
    return torch.cat(found)
