"""What chance does: features like those chosen, and directions as long as what they write, both drawn by lot.

Axes: S sources, F features, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.hallucination.suppress.objective import Objective
from crosslayer.hallucination.suppress.strengths import Fired, as_strengths, removed
from crosslayer.replacement.actions import Add
from crosslayer.replacement.interventions import Edit, Intervention, Steer
from crosslayer.replacement.where import Where

NEAREST = 10
"""Features of the same layer that one is drawn from."""


@dataclass(frozen=True)
class Habits:
    """How each feature behaves at the positions that are edited."""

    rate: Float[Tensor, "S F"]
    """Share of the positions at which it is active."""
    mean: Float[Tensor, "S F"]
    """Of its activation, where it is active; 0 for a feature that never is."""
    norm: Float[Tensor, "S F"]
    """Of its write vectors."""

    def stacked(self) -> Float[np.ndarray, "S F 3"]:
        """Their logarithms; minus infinity where a feature is never active."""
        with np.errstate(divide="ignore"):
            return np.log(torch.stack([self.rate, self.mean, self.norm], -1).double().numpy(force=True))


@torch.no_grad()
def habits(objective: Objective, coder: CrossLayerTranscoder, where: Where) -> Habits:
    """Of all features, over the prompts and responses of the objective."""
    fired = Fired(objective.model, coder, where)
    for part in objective.parts:
        with fired.counted(part.batch):
            objective.model.model(**part.batch.inputs, use_cache=False)
    return Habits(fired.counts / max(fired.n, 1), fired.sums / fired.counts.clamp_min(1), coder.decoder_norms())


def matched_sets(
    habits: Habits, sources: Sequence[int], edits: Sequence[Intervention], n: int, seed: int = 0
) -> list[tuple[Intervention, ...]]:
    """The same edits of other features of the same layers, none of those chosen, alike in rate, activation and norm.

    Each feature's place is taken, with its strengths, by one drawn from the `NEAREST` of its layer, by distance of the
    three logarithms, each in units of its spread over the layer's active features.

    Raises:
        UserError: when a layer has too few other active features.
    """
    rng, known = np.random.default_rng(seed), habits.stacked()
    return [_matched(known, sources, edits, rng) for _ in range(n)]


def _matched(
    known: np.ndarray, sources: Sequence[int], edits: Sequence[Intervention], rng: np.random.Generator
) -> tuple[Intervention, ...]:
    taken, made = {(edit.layer, edit.feature) for edit in edits}, []
    for i in rng.permutation(len(edits)):
        layer, feature = edits[i].layer, edits[i].feature
        of = known[sources.index(layer)]
        free = [f for f in np.flatnonzero(np.isfinite(of).all(1)).tolist() if (layer, f) not in taken]
        if not free:
            wanted = sum(edit.layer == layer for edit in edits)
            raise UserError(
                f"layer {layer} has fewer than {wanted} other active features to draw from; choose fewer (--at-most)"
            )
        spread = of[np.isfinite(of).all(1)].std(0) + 1e-9
        mine = np.nan_to_num(of[feature], neginf=of[free].min())
        near = np.argsort((((of[free] - mine) / spread) ** 2).sum(1), kind="stable")[:NEAREST]
        made.append(replace(edits[i], feature=free[int(rng.choice(near))]))
        taken.add((layer, made[-1].feature))
    return tuple(sorted(made, key=lambda edit: (edit.layer, edit.feature)))


@torch.no_grad()
def write_norms(
    objective: Objective, coder: CrossLayerTranscoder, edits: Sequence[Intervention], strength: float, where: Where
) -> Float[Tensor, " L"]:
    """Length of what turning features down adds to each layer's write: root mean square over the positions edited."""
    strengths = strength * as_strengths(coder, edits)
    squares, n = torch.zeros(coder.wiring.n_layers, device=coder.b_dec.device), 0
    for part in objective.parts:
        delta = removed(objective.model, coder, strengths, where, part.batch)
        squares, n = squares + delta.square().sum((0, 2)), n + len(delta)
    return (squares / max(n, 1)).sqrt()


def random_directions(
    norms: Float[Tensor, " L"], d_model: int, where: Where, n: int, seed: int = 0
) -> list[tuple[Edit, ...]]:
    """Sets of one random direction a layer, of these lengths, added to what its MLP writes."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(_random(norms, d_model, where, generator)) for _ in range(n)]


def _random(norms: Tensor, d_model: int, where: Where, generator: torch.Generator):
    for layer, norm in enumerate(norms.tolist()):
        vector = torch.randn(d_model, generator=generator)
        if norm > 0:
            yield Steer(layer=layer, vector=vector * (norm / vector.norm()), action=Add(1.0), where=where)
