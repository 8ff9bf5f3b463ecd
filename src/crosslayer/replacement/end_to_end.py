"""Training through the replacement model: its predictions, not only its writes, are to match the original's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crosslayer.activations.capture import capture_batch
from crosslayer.activations.record import Activations
from crosslayer.activations.usable import usable
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.data.examples import Example
from crosslayer.errors import UserError
from crosslayer.metrics import cross_entropy, kl
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch, prepare
from crosslayer.replacement.model import ReplacementModel
from crosslayer.team import ALONE, Group, Places, agree, count, together
from crosslayer.training.losses import KL, CrossEntropy
from crosslayer.training.objective import Outcome, Reconstruction
from crosslayer.training.part import Part


class EndToEnd:
    """KL divergence from the original, or cross-entropy, of the replacement model on whole prompts, teacher-forced.

    Every position that predicts a text token counts alike. On the original's stream the same transcoder is looked at
    by `reconstruction`, for the sparsity's penalty, the revival of dead features and, weighted, its unexplained
    variance. Batches are lists of examples.

    Source: "Circuit Tracing" (Anthropic, 2025) trains on reconstruction alone; end-to-end losses after Braun et al.
    2024, "Identifying functionally important features with end-to-end sparse dictionary learning".

    Args:
        model: the language model; its weights are not trained.
        loss: KL or CrossEntropy, with the weights of the parts.
        reconstruction: what is measured on the original's stream.
        tokens: processes that look at other prompts of the same batches.
    """

    def __init__(
        self,
        model: LoadedModel,
        loss: KL | CrossEntropy,
        reconstruction: Reconstruction,
        tokens: Group = ALONE.tokens,
    ):
        self.model, self.loss, self.reconstruction, self.tokens = model, loss, reconstruction, tokens

    def split(self, batch: Sequence[Example], n: int) -> Sequence[Batch]:
        """See `Objective.split`; parts that hold nothing but first positions are left out.

        Raises:
            UserError: when all do, or a process has no prompt.
        """
        n = min(n, int(self.tokens.smallest(torch.tensor(len(batch)))))
        if not n:
            raise UserError("a process has no prompt of a batch; raise the tokens a batch or mend the data's bad rows")
        cut = [batch[i * len(batch) // n : (i + 1) * len(batch) // n] for i in range(n)]
        with together(self.tokens):
            parts = [prepare(self.model.model, self.model.processor, part) for part in cut]
        sizes = [self.n_tokens(part) for part in parts]
        if not any(sizes):
            raise UserError("a batch has no token to train on; its prompts need more than one token each")
        return [part for part, size in zip(parts, sizes, strict=True) if size]

    def n_tokens(self, part: Batch) -> int:
        """See `Objective.n_tokens`: all tokens but padding and first positions."""
        return count(self.tokens, int((part.position > 0).sum()))

    def __call__(self, coder: CrossLayerTranscoder, part: Batch, progress: float, dead: Tensor) -> Outcome:
        """See `Objective.__call__`."""
        activations, logits = capture_batch(self.model, part)
        inner = self.reconstruction(coder, self._usable(activations), progress, dead)
        divergence = self._divergence(coder, part, logits, progress)
        bad = UserError("the replacement model's predictions are not finite numbers; lower the learning rate")
        agree(self.tokens, None if divergence.isfinite() else bad)
        weights = {"fvu": self.loss.fvu_weight}
        terms = {name: term * weights.get(name, 1.0) for name, term in inner.terms.items()}
        terms["kl" if isinstance(self.loss, KL) else "ce"] = self.loss.weight * divergence
        loss = torch.stack(list(terms.values())).sum()
        return Outcome(loss, terms, inner.fvu, inner.counts, self.n_tokens(part))

    def _usable(self, activations: Activations) -> Part:
        """The tokens to look at on the original's stream, after those of the ranks below."""
        chosen = activations[usable(activations, self.tokens).keep]
        counts = torch.cat(self.tokens.gather(torch.tensor([len(chosen)])))
        before = int(counts[: self.tokens.rank].sum())
        return Part(chosen, Places(torch.arange(before, before + len(chosen)), int(counts.sum())))

    def _divergence(self, coder: CrossLayerTranscoder, part: Batch, original: Tensor, progress: float) -> Tensor:
        with ReplacementModel(self.model, coder).replaced(progress):
            logits: Any = self.model.model(**part.inputs, use_cache=False).logits[:, :-1]
        scored = (part.attention & ~part.image)[:, 1:] & part.attention[:, :-1]
        if isinstance(self.loss, KL):
            each = kl(original[:, :-1][scored][None], logits[scored][None])
        else:
            each = cross_entropy(logits[scored][None], part.tokens[:, 1:][scored][None])
        return each.sum() / max(1, count(self.tokens, each.numel()))  # pictures alone have no text to predict
