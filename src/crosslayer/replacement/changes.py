"""What the edits of one layer change: of what its features write, or of a site along directions.

Axes: B prompts, P positions of the pass, D d_model, S source layers, F features a layer, U of them that are edited,
T targets of the layer.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from crosslayer.coders.far import fetch_rows
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.replacement.actions import Action
from crosslayer.replacement.interventions import Intervention, Steer
from crosslayer.replacement.passes import Passes
from crosslayer.replacement.where import Everywhere, Where


@dataclass
class _Step:
    """One action on some features of a layer, in some rows of the batch, at some positions."""

    rows: slice
    where: Where
    action: Action
    columns: list[int]
    """Of the features among those edited."""


class FeatureEdits:
    """The features of one layer that are edited: their encoder rows, write vectors and actions.

    `thresholds` [S, F] decide which are active; None where that takes the whole layer.
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
        features = sorted({edit.feature for edit, _ in edits})
        place = {feature: i for i, feature in enumerate(features)}
        self.steps: list[_Step] = []
        for edit, rows in edits:
            last = self.steps[-1] if self.steps else None
            same = last is not None and (last.rows, last.where, last.action) == (rows, edit.where, edit.action)
            if last is not None and same and place[edit.feature] not in last.columns:
                last.columns.append(place[edit.feature])
            else:
                self.steps.append(_Step(rows, edit.where, edit.action, [place[edit.feature]]))
        self.of = torch.tensor(features, device=coder.b_dec.device)
        i = coder.sources.index(layer)
        self.thresholds = None if thresholds is None else thresholds[i][self.of].detach().clamp_min(0)
        self.W_enc, self.b_enc = fetch_rows(coder.W_enc[i], self.of).detach(), coder.b_enc[i][self.of].detach()
        self.vectors = coder.decoder.vectors(i, self.of).detach().flatten(1)
        constants = coder.decoder.constants(i, self.of)
        self.constants = None if constants is None else constants.detach().flatten(1)

    def change(self, x: Float[Tensor, "B P D"], passes: Passes) -> Float[Tensor, "B P T D"]:
        """What the features write to each target after the actions, less what they write as it is."""
        acts = self.activations(x.to(self.b_enc))
        acts = acts * passes.mask(Everywhere(), acts)[:, :, None]
        new = acts.clone()
        for step in self.steps:
            mask, part = passes.mask(step.where, new)[step.rows, :, None], new[step.rows]
            columns = slice(None) if len(step.columns) == len(self.of) else step.columns
            old = part[:, :, columns]
            part[:, :, columns] = torch.where(mask, step.action(old), old)
        out = (new - acts) @ self.vectors
        if self.constants is not None:
            out = out + ((new > 0).to(out) - (acts > 0).to(out)) @ self.constants
        return out.unflatten(2, (len(self.targets), -1))

    def activations(self, x: Float[Tensor, "B P D"]) -> Float[Tensor, "B P U"]:
        """Of the features edited, as in the replacement model, first positions included."""
        if self.thresholds is None:
            return self.coder.encode_layer(self.layer, x.flatten(0, 1)).dense()[:, self.of].unflatten(0, x.shape[:2])
        normed = x if self.coder.input_norm is None else self.coder.input_norm(x)
        pre = linear(normed, self.W_enc, self.b_enc)
        return pre * (pre > self.thresholds)


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
