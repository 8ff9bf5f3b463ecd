"""What a training step minimises: reconstruction of the MLP writes, and what can be added to it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosslayer.activations.record import Activations
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.training.revival import AuxK, DeadPenalty


@dataclass(frozen=True)
class Outcome:
    """What an objective found on one batch."""

    loss: Tensor
    """To be minimised."""
    terms: dict[str, Tensor]
    """The parts that the loss is the sum of, by name, for the log."""
    fvu: Tensor
    """Unexplained variance, mean over layers."""
    counts: Float[Tensor, "S F"]
    """On how many tokens each feature was active."""
    n_tokens: int

    def detached(self) -> "Outcome":
        """The same without the graph."""
        terms = {name: term.detach() for name, term in self.terms.items()}
        return replace(self, loss=self.loss.detach(), terms=terms, fvu=self.fvu.detach())


@runtime_checkable
class Objective(Protocol):
    """Turns a transcoder and a batch into a loss; the trainer knows nothing else of either."""

    def split(self, batch: Any, n: int) -> Sequence[Any]:
        """The batch in up to n parts, none of them empty."""
        ...

    def n_tokens(self, part: Any) -> int:
        """Tokens that a part trains on."""
        ...

    def __call__(self, coder: CrossLayerTranscoder, part: Any, progress: float, dead: Bool[Tensor, "S F"]) -> Outcome:
        """The loss, with gradients.

        Raises:
            UserError: when something is not a finite number, naming the layer.
        """
        ...


@dataclass(frozen=True)
class Reconstruction:
    """Fraction of variance unexplained, mean over layers, plus the sparsity's penalty and the revival of the dead."""

    variance: Float[Tensor, " L"]
    """Mean of |y - mean y|^2 of each layer."""
    auxk: AuxK
    dead_penalty: DeadPenalty

    def split(self, batch: Activations, n: int) -> Sequence[Activations]:
        """See `Objective.split`."""
        return [batch[rows] for rows in torch.arange(len(batch)).tensor_split(min(n, len(batch)))] if n > 1 else [batch]

    def n_tokens(self, part: Activations) -> int:
        """See `Objective.n_tokens`."""
        return len(part)

    def __call__(self, coder: CrossLayerTranscoder, part: Activations, progress: float, dead: Tensor) -> Outcome:
        """See `Objective.__call__`."""
        encoded = coder.encode_for_training(part.x, progress)
        revived = self.auxk.codes(coder, encoded, dead)
        if revived:
            y_hat, explained = coder.decode_beside(encoded.codes, part.x, revived)
        else:
            y_hat, explained = coder.decode(encoded.codes, part.x), None
        fvu = layer_fvu(part.y, y_hat, self.variance)
        terms = {"fvu": fvu.mean(), "penalty": coder.sparsity_at(progress).penalty(coder, encoded, progress)}
        terms["auxk"] = 0.0 if explained is None else self.auxk.loss(explained, part.y - y_hat)
        terms["dead_penalty"] = self.dead_penalty.loss(coder, encoded, dead)
        terms = {name: term for name, term in terms.items() if isinstance(term, Tensor)}
        loss = torch.stack(list(terms.values())).sum()
        if not (loss.isfinite() and part.x.sum().isfinite()):  # TopK passes over inputs that are not a number
            raise UserError(_diagnosis(part, fvu, terms))
        counts = torch.stack([codes.counts() for codes in encoded.codes])
        return Outcome(loss, terms, terms["fvu"].detach(), counts, len(part))


def layer_fvu(
    y: Float[Tensor, "N L D"], y_hat: Float[Tensor, "N L D"], variance: Float[Tensor, " L"]
) -> Float[Tensor, " L"]:
    """Fraction of each layer's variance left unexplained: mean |y - y_hat|^2 / mean |y - mean y|^2.

    The loss is its mean over layers: every target counts alike, however much it varies.
    """
    return (y - y_hat).square().sum(2).mean(0) / variance


def _diagnosis(batch: Activations, fvu: Tensor, terms: dict[str, Tensor]) -> str:
    for what, per_layer in (("input", batch.x.sum((0, 2))), ("target", batch.y.sum((0, 2))), ("reconstruction", fvu)):
        if not per_layer.isfinite().all():
            layer = int((~per_layer.isfinite()).nonzero()[0])
            return f"layer {layer}'s {what} is not a finite number; training stopped"
    bad = next((name for name, term in terms.items() if not term.isfinite()), "loss")
    return f"the {bad} is not a finite number; lower its coefficient"
