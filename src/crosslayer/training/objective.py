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
from crosslayer.team import agree
from crosslayer.training.part import Part
from crosslayer.training.revival import AuxK, DeadPenalty


@dataclass(frozen=True)
class Outcome:
    """What an objective found on one batch."""

    loss: Tensor
    """To be minimised: the part of these tokens in the mean over all of the batch, like the other figures here."""
    terms: dict[str, Tensor]
    """The parts that the loss is the sum of, by name, for the log."""
    fvu: Tensor
    """Unexplained variance, mean over layers."""
    counts: Float[Tensor, "S F"]
    """On how many of these tokens each feature was active."""
    n_tokens: int
    """Tokens of the batch, wherever they are looked at."""

    def detached(self) -> "Outcome":
        """The same without the graph."""
        terms = {name: term.detach() for name, term in self.terms.items()}
        return replace(self, loss=self.loss.detach(), terms=terms, fvu=self.fvu.detach())


@runtime_checkable
class Objective(Protocol):
    """Turns a transcoder and a batch into a loss; the trainer knows nothing else of either."""

    def split(self, batch: Any, n: int) -> Sequence[Any]:
        """The batch in up to n batches, none of them empty."""
        ...

    def n_tokens(self, part: Any) -> int:
        """Tokens that a part trains on, those that other processes look at included."""
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

    def split(self, batch: Activations | Part, n: int) -> Sequence[Part]:
        """See `Objective.split`."""
        return Part.of(batch).split(n)

    def n_tokens(self, part: Part) -> int:
        """See `Objective.n_tokens`."""
        return part.places.total

    def __call__(self, coder: CrossLayerTranscoder, part: Part, progress: float, dead: Tensor) -> Outcome:
        """See `Objective.__call__`."""
        tokens, places, team = part.tokens, part.places, coder.team
        encoded = coder.encode_for_training(tokens.x, progress, places)
        revived = self.auxk.codes(coder, encoded, dead)
        if revived:
            y_hat, explained = coder.decode_beside(encoded.codes, tokens.x, revived)
        else:
            y_hat, explained = coder.decode(encoded.codes, tokens.x), None
        columns, column_group = coder.sharing.columns, coder.sharing.column_group
        y = tokens.y.narrow(2, columns.start, len(columns))
        fvu = column_group.sum(layer_fvu(y, y_hat, self.variance, places.total))
        terms = {"fvu": fvu.mean(), "penalty": coder.sparsity_at(progress).penalty(coder, encoded, progress)}
        terms["auxk"] = 0.0 if explained is None else self.auxk.loss(explained, y - y_hat, team.tokens, column_group)
        terms["dead_penalty"] = self.dead_penalty.loss(coder, encoded, dead)
        terms = {name: term for name, term in terms.items() if isinstance(term, Tensor)}
        loss = torch.stack(list(terms.values())).sum()
        finite = loss.isfinite() and tokens.x.sum().isfinite()  # TopK passes over inputs that are not a number
        agree(team.everyone, None if finite else UserError(_diagnosis(tokens, fvu, terms)))
        counts = torch.stack([codes.counts() for codes in encoded.codes])
        return Outcome(loss, terms, terms["fvu"].detach(), counts, places.total)


def layer_fvu(
    y: Float[Tensor, "N L D"], y_hat: Float[Tensor, "N L D"], variance: Float[Tensor, " L"], n: int | None = None
) -> Float[Tensor, " L"]:
    """Fraction of each layer's variance left unexplained: mean |y - y_hat|^2 / mean |y - mean y|^2.

    The loss is its mean over layers: every target counts alike, however much it varies. Of n tokens, these may be a
    part; they are all when n is left out.
    """
    return (y - y_hat).square().sum((0, 2)) / (len(y) if n is None else n) / variance


def _diagnosis(batch: Activations, fvu: Tensor, terms: dict[str, Tensor]) -> str:
    for what, per_layer in (("input", batch.x.sum((0, 2))), ("target", batch.y.sum((0, 2))), ("reconstruction", fvu)):
        if not per_layer.isfinite().all():
            layer = int((~per_layer.isfinite()).nonzero()[0])
            return f"layer {layer}'s {what} is not a finite number; training stopped"
    bad = next((name for name, term in terms.items() if not term.isfinite()), "loss")
    return f"the {bad} is not a finite number; lower its coefficient"
