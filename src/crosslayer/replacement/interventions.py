"""Interventions: what to do with which feature, or which direction, where. Records; `editing` carries them out."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.replacement.actions import ACTIONS, Action
from crosslayer.replacement.where import WHERES, Everywhere, Where
from crosslayer.variants import read_variant, write_variant

SITES = ("write", "read")


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """One feature, changed: what it writes, to every layer that it writes to, changes with its activation.

    Several of one feature act one after the other; where they reach layers in other shares, beside each other.
    """

    layer: int
    """That the feature reads."""
    feature: int
    action: Action
    where: Where = Everywhere()  # noqa: RUF009
    writes: tuple[tuple[int, float], ...] | None = None
    """Layers whose writes change, each with its share of the change; None for all of the feature's, wholly."""

    def check(self, coder: CrossLayerTranscoder) -> None:
        """Refuse a feature that the transcoder does not have, and layers that it does not write to.

        Raises:
            UserError: naming it and those there are.
        """
        if self.layer not in coder.sources:
            raise UserError(f"an intervention is at layer {self.layer}; features are at layers {_span(coder.sources)}")
        if not 0 <= self.feature < coder.d_transcoder:
            raise UserError(
                f"an intervention is on feature {self.feature} of layer {self.layer}, which has features "
                f"0 to {coder.d_transcoder - 1}"
            )
        targets, layers = coder.wiring.targets(self.layer), [layer for layer, _ in self.writes or ()]
        if strange := [layer for layer in layers if layer not in targets]:
            raise UserError(
                f"an intervention is on what feature {self.layer}.{self.feature} writes to layer {strange[0]}; "
                f"it writes to layers {_span(targets)}"
            )
        if self.writes == () or len({*layers}) < len(layers) or not all(isfinite(s) for _, s in self.writes or ()):
            raise UserError(
                f"an intervention on feature {self.layer}.{self.feature} has writes {self.writes}; name one layer or "
                "more, each once and with a finite share"
            )

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads."""
        place = {"kind": "feature", "layer": self.layer, "feature": self.feature, **_how(self.action, self.where)}
        return place if self.writes is None else {**place, "writes": [list(write) for write in self.writes]}


@dataclass(frozen=True, kw_only=True, eq=False)
class Steer:
    """One direction, changed as if it were a feature that reads along `vector` and writes it.

    Its activation is the projection, x . vector / |vector|^2: `Add(2.0)` adds the vector twice, `Ablate()` removes the
    stream's part along it, `Set(1.0)` makes that part the vector itself.

    Raises:
        UserError: for a vector of zeros, or a site that there is not.
    """

    layer: int
    vector: Float[Tensor, " D"]
    action: Action
    where: Where = Everywhere()  # noqa: RUF009
    site: str = "write"
    """`write`: what the layer's MLP writes; `read`: the stream as that MLP, before its norm, and all that follows see
    it."""

    def __post_init__(self):
        if not (self.vector.isfinite().all() and self.vector.any()):
            raise UserError(f"the vector to steer layer {self.layer} with is all zeros or not finite")
        if self.site not in SITES:
            raise UserError(f"the site to steer at is {self.site!r}; choose one of {', '.join(SITES)}")

    def check(self, coder: CrossLayerTranscoder) -> None:
        """Refuse a layer or a vector of another model.

        Raises:
            UserError: naming both values.
        """
        if self.layer not in range(coder.wiring.n_layers):
            raise UserError(f"layer {self.layer} is to be steered; the model has 0 to {coder.wiring.n_layers - 1}")
        if len(self.vector) != coder.d_model:
            raise UserError(f"a steering vector has {len(self.vector)} entries; the model's width is {coder.d_model}")

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads."""
        place = {"kind": "direction", "layer": self.layer, "site": self.site, "vector": self.vector.tolist()}
        return {**place, **_how(self.action, self.where)}


Edit = Intervention | Steer


def from_json(record: dict[str, Any]) -> Edit:
    """The intervention that a JSON form describes.

    Raises:
        UserError: naming what is missing, unknown or wrong.
    """
    kinds = {"feature": Intervention, "direction": Steer}
    try:
        for name in {"layer", "feature"} & record.keys():
            if type(record[name]) is not int:
                raise UserError(f"an intervention has {name} {record[name]!r}; a whole number is wanted")
        settings = {
            **record,
            "action": read_variant("action", ACTIONS, record["action"]),
            "where": read_variant("where", WHERES, _tuples(record["where"])),
        }
        if settings.get("writes") is not None:
            settings["writes"] = tuple((layer, float(share)) for layer, share in settings["writes"])
        if "vector" in settings:
            settings["vector"] = torch.tensor(settings["vector"], dtype=torch.float32)
        return read_variant("an intervention", kinds, settings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"an intervention is damaged ({type(error).__name__}: {error})") from None


def check_all(edits: Sequence[Edit], coder: CrossLayerTranscoder) -> None:
    """Refuse what does not fit the transcoder, and a transcoder whose features have no write of their own.

    Raises:
        UserError: naming it.
    """
    if getattr(coder.decoder.settings, "topk_coalesced", None) is not None:
        raise UserError(
            "with topk_coalesced targets choose among features, so a feature has no write of its own to change"
        )
    for edit in edits:
        edit.check(coder)


def _tuples(record: dict[str, Any]) -> dict[str, Any]:
    """Lists as tuples, which JSON does not have."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}


def _how(action: Action, where: Where) -> dict[str, Any]:
    return {"action": write_variant(ACTIONS, action), "where": write_variant(WHERES, where)}


def _span(layers: Sequence[int]) -> str:
    return f"{layers[0]} to {layers[-1]}"
