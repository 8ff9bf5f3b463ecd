"""The proof that a model's sites are what the table says, on one small batch.

Two checks: what a layer adds to the stream after the read is exactly the recorded write, and writing every MLP's own
output back leaves the logits unchanged.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from crosslayer.errors import UserError
from crosslayer.models.hooks import recording, replacing, watching
from crosslayer.models.sites import Sites

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest relative gap allowed, by dtype of the model."""


@dataclass(frozen=True)
class Proof:
    """What the two checks measured, relative to the largest magnitude of the tensor compared."""

    residual_gaps: tuple[float, ...]
    """Per layer: |layer output - (stream read + write)|."""
    self_replacement_gap: float
    """|logits with every MLP replaced by its own output - logits|."""


def prove_sites(model: PreTrainedModel, sites: Sites, inputs: dict[str, Tensor]) -> Proof:
    """Run both checks.

    Args:
        model: in eval mode.
        sites: with `read` as used later; the residual identity itself is always checked on the raw stream.
        inputs: keyword arguments of one forward pass.

    Raises:
        UserError: naming the first layer, or the logits, that does not add up.
    """
    stream = Sites(sites.layers, sites.names, sites.d_model, "resid")
    reads, writes, outputs = {}, {}, {}
    layers = [site.layer for site in sites.layers]
    with (
        torch.no_grad(),
        watching(layers, outputs.__setitem__),
        recording(stream, reads.__setitem__, writes.__setitem__),
    ):
        logits = model(**inputs).logits
    with torch.no_grad(), replacing(sites, writes.__getitem__):
        replayed = model(**inputs).logits
    gaps = tuple(_gap(reads[i] + writes[i], outputs[i]) for i in range(len(sites.layers)))
    proof = Proof(gaps, _gap(replayed, logits))
    _check(proof, sites, TOLERANCE.get(logits.dtype, 1e-4))
    return proof


def _check(proof: Proof, sites: Sites, tolerance: float) -> None:
    for name, gap in zip(sites.names, proof.residual_gaps, strict=True):
        if not gap <= tolerance:
            raise UserError(
                f"{name}: stream read + MLP write differs from the layer's output by {gap:.2g} relative "
                f"(at most {tolerance:g}); this architecture adds something else, so it is not supported"
            )
    if not proof.self_replacement_gap <= tolerance:
        raise UserError(
            f"writing each MLP's own output back changes the logits by {proof.self_replacement_gap:.2g} relative "
            f"(at most {tolerance:g}); the MLPs are used in another way too, so the model is not supported"
        )


def _gap(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()
