"""The proof that a model's sites are what the table, or the search, says: on one small batch, in three forward passes.

1. As it is: the norm's output is what the MLP gets; a layer's output is the stream read + the write + what else the
   pattern names; and it is what the next layer gets.
2. With one position of every MLP's stream negated: the write changes there alone, so it is the MLP's and nothing else.
3. With every MLP's own output written back: the logits are unchanged.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from crosslayer.errors import UserError
from crosslayer.models.hooks import entering, feeding, reading, recording, replacing, watching
from crosslayer.models.sites import Sites

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest relative gap allowed, by dtype of the model."""


@dataclass(frozen=True)
class Proof:
    """What the checks measured: largest gap at any position, relative to what is largest at that position."""

    residual_gaps: tuple[float, ...]
    """Per layer: |layer output - (stream read + write)|, with what else the pattern says is added."""
    input_gaps: tuple[float, ...]
    """Per layer: |MLP's input - norm's output|."""
    locality_gaps: tuple[float, ...]
    """Per layer: change of the write at positions where the stream that its MLP reads did not change."""
    between_gaps: tuple[float, ...]
    """Per layer: |next layer's input - layer output|; one fewer than layers."""
    self_replacement_gap: float
    """|logits with every MLP replaced by its own output - logits|."""


def prove_sites(model: PreTrainedModel, sites: Sites, inputs: dict[str, Any]) -> tuple[Sites, Proof]:
    """Run all checks.

    Args:
        model: in eval mode.
        sites: with `read` as used later; the checks themselves are always of the raw stream.
        inputs: keyword arguments of one forward pass, without padding.

    Returns:
        The sites, with what had to be measured filled in, and the proof.

    Raises:
        UserError: naming the first layer, or the logits, that does not add up.
    """
    stream = replace(sites, read="resid")
    with torch.no_grad():
        first = _Pass(stream)
        logits = first.run(model, inputs)
        _check_called(first, sites)
        stream = first.measured()
        local = _locality(model, stream, inputs, first)
        with replacing(stream, first.writes.__getitem__):
            replayed = model(**inputs, use_cache=False).logits
    proof = Proof(tuple(first.residual), tuple(first.entry), tuple(local), tuple(first.between), _gap(replayed, logits))
    _check(proof, sites, TOLERANCE.get(logits.dtype, 1e-4))
    return replace(stream, read=sites.read), proof


class _Pass:
    """One forward pass as it is: streams and writes kept, everything else compared as soon as it is there."""

    def __init__(self, sites: Sites):
        self.sites = sites
        self.reads, self.writes = dict[int, Tensor](), dict[int, Tensor]()
        self.n_returned = [0] * len(sites.layers)
        self.calls = [0] * len(sites.layers)
        self.residual, self.entry, self.between = list[float](), list[float](), list[float]()
        self._normed: Tensor | None = None
        self._added = torch.zeros(())
        self._last: Tensor | None = None

    def run(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
        """Logits of the pass."""
        sites, layers = self.sites.layers, [site.layer for site in self.sites.layers]
        with (
            entering(layers, self._on_enter),
            recording(self.sites, self._on_read, self._on_write),
            reading(replace(self.sites, read="mlp_in"), self._on_norm),
            entering([site.mlp for site in sites], self._on_mlp),
            ExitStack() as stack,
        ):
            for index, site in enumerate(sites):
                stack.enter_context(watching(site.adds, self._on_add))
                stack.callback(site.write.register_forward_hook(self._on_returned(index)).remove)
            stack.enter_context(watching(layers, self._on_leave))
            return model(**inputs, use_cache=False).logits

    def measured(self) -> Sites:
        """The sites with what this pass saw of them."""
        pairs = zip(self.sites.layers, self.n_returned, strict=True)
        return replace(self.sites, layers=tuple(replace(site, n_returned=n) for site, n in pairs))

    def _on_returned(self, layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple, output: Any) -> None:
            self.n_returned[layer] = 0 if isinstance(output, Tensor) else len(output)

        return hook

    def _on_enter(self, layer: int, x: Tensor) -> None:
        if self._last is not None:
            self.between.append(_gap(x, self._last))
        self._added = torch.zeros((), device=x.device, dtype=x.dtype)

    def _on_read(self, layer: int, x: Tensor) -> None:
        self.reads[layer] = x.clone()

    def _on_norm(self, layer: int, x: Tensor) -> None:
        self._normed = x

    def _on_mlp(self, layer: int, x: Tensor) -> None:
        self.entry.append(torch.inf if self._normed is None else _gap(x.reshape(self._normed.shape), self._normed))

    def _on_write(self, layer: int, y: Tensor) -> None:
        self.writes[layer] = y.clone()

    def _on_add(self, _: int, y: Tensor) -> None:
        self._added = self._added + y

    def _on_leave(self, layer: int, out: Tensor) -> None:
        self.calls[layer] += 1
        self._last = out.clone()
        scale = self.sites.layers[layer].output_scale
        if layer in self.reads and layer in self.writes:
            expected = self.reads[layer] + self.writes[layer] + self._added
            self.residual.append(_gap(expected if scale is None else expected * scale, out))


def _locality(model: PreTrainedModel, sites: Sites, inputs: dict[str, Any], first: _Pass) -> list[float]:
    """How much each write changes elsewhere when its MLP sees the first pass's stream with one position negated."""
    place = first.reads[0].shape[1] // 2
    elsewhere = torch.arange(first.reads[0].shape[1]) != place
    gaps = []

    def negated(layer: int) -> Tensor:
        stream = first.reads[layer].clone()
        stream[:, place] *= -1
        return stream

    def compare(layer: int, y: Tensor) -> None:
        gaps.append(_gap(y[:, elsewhere], first.writes[layer][:, elsewhere]))

    with recording(sites, lambda *_: None, compare), feeding(sites, negated):
        model(**inputs, use_cache=False)
    return gaps


def _check_called(first: _Pass, sites: Sites) -> None:
    for layer, (name, calls) in enumerate(zip(sites.names, first.calls, strict=True)):
        if calls != 1 or layer not in first.reads or layer not in first.writes:
            what = "its MLP, or the MLP's norm, did not run" if calls == 1 else f"its layer ran {calls} times"
            raise UserError(f"{name}: {what} in one forward pass, where once was expected; it is not supported")


def _check(proof: Proof, sites: Sites, tolerance: float) -> None:
    measured = {
        "the MLP's input differs from its norm's output": proof.input_gaps,
        "stream read + MLP write differs from the layer's output": proof.residual_gaps,
        "the write depends on more than the stream that the MLP reads, changing": proof.locality_gaps,
        "something that this family is not known for is added after the layer, changing the stream": (
            () if sites.between else proof.between_gaps
        ),
    }
    for layer, name in enumerate(sites.names):
        for what, gaps in measured.items():
            if layer < len(gaps) and not gaps[layer] <= tolerance:
                raise UserError(
                    f"{name}: {what} by {gaps[layer]:.2g} relative (at most {tolerance:g}); it is not supported"
                )
    if not proof.self_replacement_gap <= tolerance:
        raise UserError(
            f"writing each MLP's own output back changes the logits by {proof.self_replacement_gap:.2g} relative "
            f"(at most {tolerance:g}); the MLPs are used in another way too, so the model is not supported"
        )


def _gap(found: Tensor, wanted: Tensor) -> float:
    """Position by position, so that one of massive activations hides nothing elsewhere."""
    size = wanted.abs().amax(-1).clamp_min(torch.finfo(wanted.dtype).tiny)
    return ((found.to(wanted.device) - wanted).abs().amax(-1) / size).max().item()
