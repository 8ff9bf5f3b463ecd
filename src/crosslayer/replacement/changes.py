"""What the edits of one layer change: of its features' activity, or of a site along directions.

Axes: B prompts, P positions of the pass, D d_model, S source layers, F features a layer, U of them that are edited,
K what is counted of these (activations, and beside them whether each is active where that writes something, too),
T targets of the layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from crosslayer.coders.far import fetch_rows
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.replacement.actions import Ablate, Action, Scale
from crosslayer.replacement.interventions import Intervention, Steer
from crosslayer.replacement.passes import Passes
from crosslayer.replacement.where import Where


@dataclass
class _Step:
    """What is done to some features of a layer at once, in some rows of the batch, at some positions."""

    rows: slice
    where: Where
    actions: list[Action]
    """One and the same, or what multiplies activations, each feature's by a factor of its own."""
    columns: list[int]
    """Of the features among those edited."""

    @cached_property
    def action(self) -> Callable[[Tensor], Tensor]:
        """That of all its features."""
        first = self.actions[0]
        if all(action == first for action in self.actions):
            return first
        factors = [action.factor if isinstance(action, Scale) else 0.0 for action in self.actions]
        return lambda acts: acts * acts.new_tensor(factors)

    def takes(self, edit: Intervention, rows: slice) -> bool:
        """Whether another feature's edit may be done at once with these."""
        last = self.actions[-1]
        alike = edit.action == last or (isinstance(last, Ablate | Scale) and isinstance(edit.action, Ablate | Scale))
        return alike and (rows, edit.where) == (self.rows, self.where)

    def changed(self, acts: Float[Tensor, "B P U"], passes: Passes) -> Float[Tensor, "B P U"]:
        """The activations after the action."""
        mask = passes.mask(self.where, acts).unsqueeze(2)
        if self.rows == slice(None) and len(self.columns) == acts.shape[2]:
            return torch.where(mask, self.action(acts), acts)
        new = acts.clone()
        part = new[self.rows]
        old = part[:, :, self.columns]
        part[:, :, self.columns] = torch.where(mask[self.rows], self.action(old), old)
        return new


class FeatureEdits:
    """The features of one layer that are edited: their encoder rows, write vectors and actions.

    One that is edited with several shares for its targets stands there once for each. `thresholds` [S, F] decide which
    are active; None where that takes the whole layer.
    """

    def __init__(
        self,
        coder: CrossLayerTranscoder,
        layer: int,
        edits: list[tuple[Intervention, slice]],
        thresholds: Float[Tensor, "S F"] | None,
    ):
        assert coder.input_scale is None, "scales are folded before a transcoder is used"
        self.coder, self.layer, self.targets = coder, layer, coder.wiring.targets(layer)
        known = sorted({(edit.feature, edit.writes or ()) for edit, _ in edits})
        place = {key: i for i, key in enumerate(known)}
        self.steps: list[_Step] = []
        for edit, rows in edits:
            last, column = self.steps[-1] if self.steps else None, place[edit.feature, edit.writes or ()]
            if last is None or column in last.columns or not last.takes(edit, rows):
                last = _Step(rows, edit.where, [], [])
                self.steps.append(last)
            last.actions.append(edit.action)
            last.columns.append(column)
        self.of = torch.tensor([feature for feature, _ in known], device=coder.b_dec.device)
        i = coder.sources.index(layer)
        self.thresholds = None if thresholds is None else thresholds[i][self.of].detach().clamp_min(0)
        self.W_enc, self.b_enc = fetch_rows(coder.W_enc[i], self.of).detach(), coder.b_enc[i][self.of].detach()
        shares = _shares([writes for _, writes in known], self.targets).to(coder.b_dec)
        vectors, constants = coder.decoder.vectors(i, self.of), coder.decoder.constants(i, self.of)
        self.constant = constants is not None
        self.vectors: Float[Tensor, "K T D"] = torch.cat(
            [part * shares for part in (vectors, constants) if part is not None]
        ).detach()

    def change(self, x: Float[Tensor, "B P D"], passes: Passes) -> Float[Tensor, "B P K"]:
        """The activations after the actions, less those before; the same of whether each feature is active."""
        acts = new = self.activations(x.to(self.b_enc))
        for step in self.steps:
            new = step.changed(new, passes)
        return torch.cat([new - acts, (new > 0).to(acts) - (acts > 0).to(acts)], 2) if self.constant else new - acts

    def activations(self, x: Float[Tensor, "B P D"]) -> Float[Tensor, "B P U"]:
        """Of the features edited, as in the replacement model, first positions included."""
        if self.thresholds is None:
            return self.coder.encode_layer(self.layer, x.flatten(0, 1)).dense()[:, self.of].unflatten(0, x.shape[:2])
        normed = x if self.coder.input_norm is None else self.coder.input_norm(x)
        pre = linear(normed, self.W_enc, self.b_enc)
        return pre * (pre > self.thresholds)


def _shares(known: Sequence[tuple[tuple[int, float], ...]], targets: range) -> Float[Tensor, "U T 1"]:
    """Of each feature's change, by target; all of it where none are named."""
    whole = dict.fromkeys(targets, 1.0)
    rows = [[share.get(target, 0.0) for target in targets] for share in (dict(writes) or whole for writes in known)]
    return torch.tensor(rows, dtype=torch.float64)[:, :, None]


@dataclass
class DirectionEdits:
    """The directions that one site is steered along."""

    steps: list[tuple[Steer, slice]]

    def change(self, x: Float[Tensor, "B P D"], passes: Passes) -> Float[Tensor, "B P D"]:
        """What they add to x, one after the other, at full strength; in float32 at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        total = torch.zeros_like(x)
        for steer, rows in self.steps:
            vector, mask = steer.vector.to(x), passes.mask(steer.where, x)[rows]
            along = (x + total)[rows] @ vector / vector.square().sum()
            total[rows] += torch.where(mask, steer.action(along) - along, 0.0)[:, :, None] * vector
        return total
