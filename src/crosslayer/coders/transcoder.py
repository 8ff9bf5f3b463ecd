"""The cross-layer transcoder: encoders that read one layer, decoders that write to many."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from crosslayer.coders.checkpoint import check_tensors, read_run, write_run
from crosslayer.coders.codes import Codes, SparseCodes, active_codes
from crosslayer.coders.sparsity import Encoded, Encoder, JumpReLU, Sparsity, read_sparsity, write_sparsity
from crosslayer.errors import UserError
from crosslayer.wiring import Wiring


@dataclass(frozen=True)
class Provenance:
    """Where a transcoder comes from: what it was trained on, how, and what it measured."""

    model_id: str = ""
    """Hub id, path or bundled name of the language model."""
    revision: str = ""
    """Revision of the model, where one was named."""
    read: str = "resid"
    """Site that the encoders read: `resid` or `mlp_in`."""
    training: dict[str, Any] = field(default_factory=dict)
    """Configuration of the training."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Figures measured at the end of the training."""


class CrossLayerTranscoder(nn.Module, Encoder):
    """A dictionary of F features a layer, each of which reads one layer and writes to several.

    `y_t = b_dec[t] + sum over sources s of t of a_s @ W_dec[s -> t]`, with `a_s = sparsity(x_s @ W_enc[s].T +
    b_enc[s])`. A layer without targets (the last one when first_target is 1) has no features. Parameters, by position
    in `sources`:

    * `W_enc[i]` [F, D], `b_enc[i]` [F]
    * `W_dec[i]` [F, T(s), D], source-major: a feature's writes are contiguous
    * `b_dec` [L, D]
    * `log_threshold[i]` [F] while a JumpReLU is trained; the buffer `thresholds` [S, F] in a finished one
    * the buffer `first_write` [L, D]: the mean write at a prompt's first position, which has no features (it is an
      attention sink with massive activations in most models, and left out of training)

    Source: "Circuit Tracing", Anthropic 2025, section "Building an interpretable replacement model".
    """

    thresholds: Tensor | None
    first_write: Tensor

    def __init__(self, wiring: Wiring, d_model: int, d_transcoder: int, sparsity: Sparsity):
        super().__init__()
        if d_transcoder < 1:
            raise UserError(f"d_transcoder is {d_transcoder}; choose at least 1 feature a layer")
        sparsity.check(len(wiring.source_layers), d_transcoder)
        self.wiring, self.d_model, self.d_transcoder, self.sparsity = wiring, d_model, d_transcoder, sparsity
        self.sources = wiring.source_layers
        self.provenance = Provenance()
        S, F, L, D = len(self.sources), d_transcoder, wiring.n_layers, d_model
        self.W_enc = nn.ParameterList(torch.zeros(F, D) for _ in range(S))
        self.b_enc = nn.ParameterList(torch.zeros(F) for _ in range(S))
        self.W_dec = nn.ParameterList(torch.zeros(F, wiring.n_targets(s), D) for s in self.sources)
        self.b_dec = nn.Parameter(torch.zeros(L, D))
        self.log_threshold = nn.ParameterList()
        self.register_buffer("thresholds", None)
        self.register_buffer("first_write", torch.zeros(L, D))

    def initialise(self, seed: int) -> "CrossLayerTranscoder":
        """Draw W_enc ~ U(+-F^-1/2) and W_dec ~ U(+-(L D)^-1/2); biases stay 0."""
        generator = torch.Generator().manual_seed(seed)
        encoder, decoder = self.d_transcoder**-0.5, (self.wiring.n_layers * self.d_model) ** -0.5
        for W_enc, W_dec in zip(self.W_enc, self.W_dec, strict=True):
            nn.init.uniform_(W_enc, -encoder, encoder, generator=generator)
            nn.init.uniform_(W_dec, -decoder, decoder, generator=generator)
        if isinstance(self.sparsity, JumpReLU):
            start = torch.full((self.d_transcoder,), self.sparsity.initial_threshold).log()
            self.log_threshold = nn.ParameterList(start.clone() for _ in self.sources)
        return self

    def with_thresholds(self, thresholds: Float[Tensor, "S F"]) -> "CrossLayerTranscoder":
        """This transcoder, in place, as a JumpReLU one with fixed thresholds."""
        self.sparsity, self.log_threshold = JumpReLU(), nn.ParameterList()
        self.thresholds = thresholds.detach().clone()
        return self

    def preactivations(self, x: Float[Tensor, "N L D"]) -> Float[Tensor, "N S F"]:
        """Encoder outputs of every source layer, before any non-linearity."""
        weights = zip(self.sources, self.W_enc, self.b_enc, strict=True)
        if torch.is_grad_enabled():
            return torch.stack([linear(x[:, s], W, b) for s, W, b in weights], 1)
        pre = x.new_empty(len(x), len(self.sources), self.d_transcoder)
        for i, (s, W, b) in enumerate(weights):
            torch.addmm(b, x[:, s], W.T, out=pre[:, i])
        return pre

    def decoder_norms(self) -> Float[Tensor, "S F"]:
        """Length of each feature's decoder rows over all its targets.

        An epsilon keeps the gradient of an all-zero row finite.
        """
        return torch.stack([(W.flatten(1).square().sum(1) + 1e-12).sqrt() for W in self.W_dec])

    def encode(self, x: Float[Tensor, "N L D"]) -> list[Codes]:
        """Codes of every source layer, each layer's x given (not the replaced stream's)."""
        if self.thresholds is None:
            return self.sparsity.encode(self, x).codes
        return [self.encode_layer(s, x[:, s]) for s in self.sources]

    def encode_for_training(self, x: Float[Tensor, "N L D"], progress: float) -> Encoded:
        """Codes and pre-activations under the sparsity in force at `progress` (0 to 1), with gradients."""
        return self.sparsity.at(progress).encode(self, x)

    def encode_layer(self, source: int, x: Float[Tensor, "N D"]) -> SparseCodes:
        """Codes of one source layer alone.

        Raises:
            UserError: when the sparsity needs all layers at once (joint TopK before calibration).
        """
        i = self.sources.index(source)
        pre = linear(x, self.W_enc[i], self.b_enc[i])
        threshold = None if self.thresholds is None else self.thresholds[i]
        return active_codes(pre, self.sparsity.active(pre, threshold))

    def empty_writes(self, n_tokens: int) -> Float[Tensor, "N K"]:
        """The decoder biases of all L targets side by side, to which sources add: K = L x D."""
        return self.b_dec.flatten().expand(n_tokens, -1).clone()

    def add_writes(self, total: Float[Tensor, "N K"], source: int, codes: Codes) -> Float[Tensor, "N K"]:
        """Add, in place, what a source writes to its targets."""
        i = self.sources.index(source)
        part = codes.decode(self.W_dec[i].flatten(1))
        return _AddSlice.apply(total, part, self.wiring.targets(source).start * self.d_model)

    def decode(self, codes: Sequence[Codes], n_tokens: int) -> Float[Tensor, "N L D"]:
        """The reconstructed writes of all layers from the codes of all sources."""
        total = self.empty_writes(n_tokens)
        for source, source_codes in zip(self.sources, codes, strict=True):
            total = self.add_writes(total, source, source_codes)
        return total.view(n_tokens, self.wiring.n_layers, self.d_model)

    def forward(self, x: Float[Tensor, "N L D"]) -> Float[Tensor, "N L D"]:
        """Reconstruct the MLP writes of N tokens from the streams that the MLPs read."""
        return self.decode(self.encode(x), x.shape[0])

    @torch.no_grad()
    def fold(self, input_scale: Float[Tensor, " L"], output_scale: Float[Tensor, " L"]) -> "CrossLayerTranscoder":
        """Absorb, in place, the scales of a coder that was trained on x / input_scale and y / output_scale."""
        for i, s in enumerate(self.sources):
            self.W_enc[i].div_(input_scale[s])
            self.W_dec[i].mul_(output_scale[list(self.wiring.targets(s))].view(1, -1, 1))
        self.b_dec.mul_(output_scale.view(-1, 1))
        return self

    def save(self, path: str | Path) -> None:
        """Write a run folder: `config.json` and `model.safetensors` (sharded past 5 GB), atomically.

        Raises:
            UserError: before JumpReLU thresholds are fixed, as another reader could not tell what is active.
        """
        if isinstance(self.sparsity, JumpReLU) and self.thresholds is None:
            raise UserError("this JumpReLU transcoder is still in training; fix its thresholds before saving it")
        write_run(Path(path), self._config(), self._tensors())

    @classmethod
    def load(cls, path: str | Path, revision: str | None = None) -> "CrossLayerTranscoder":
        """Read a run folder, local or on the hub.

        Raises:
            UserError: naming the file or tensor that is missing or wrong.
        """
        config, tensors = read_run(str(path), revision)
        try:
            coder = cls._from_config(config)
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path}: its config.json describes no transcoder ({type(error).__name__}: {error}); "
                "copy the run again or retrain it"
            ) from None
        coder._read_tensors(tensors)
        return coder

    @classmethod
    def _from_config(cls, config: dict[str, Any]) -> "CrossLayerTranscoder":
        wiring = Wiring(**config["wiring"])
        coder = cls(wiring, config["d_model"], config["d_transcoder"], read_sparsity(config["sparsity"]))
        coder.provenance = Provenance(**config["provenance"])
        if isinstance(coder.sparsity, JumpReLU):
            coder.thresholds = torch.zeros(len(coder.sources), coder.d_transcoder)
        return coder

    def _config(self) -> dict[str, Any]:
        return {
            "wiring": asdict(self.wiring),
            "d_model": self.d_model,
            "d_transcoder": self.d_transcoder,
            "sparsity": write_sparsity(self.sparsity),
            "provenance": asdict(self.provenance),
        }

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor of the run under its name in the file; views of this coder's own."""
        named = {}
        for i, s in enumerate(self.sources):
            named |= {f"W_enc.{s}": self.W_enc[i], f"b_enc.{s}": self.b_enc[i], f"W_dec.{s}": self.W_dec[i]}
            if self.thresholds is not None:
                named[f"threshold.{s}"] = self.thresholds[i]
        for t in range(self.wiring.n_layers):
            named |= {f"b_dec.{t}": self.b_dec[t], f"first_write.{t}": self.first_write[t]}
        return {name: tensor.detach() for name, tensor in named.items()}

    def _read_tensors(self, tensors: dict[str, Tensor]) -> None:
        own = self._tensors()
        check_tensors({name: tensor.shape for name, tensor in own.items()}, tensors)
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


class _AddSlice(torch.autograd.Function):
    """total[:, start : start + K] += part, in place; autograd's own slice assignment would copy the total each time."""

    @staticmethod
    def forward(ctx, total, part, start):
        total.narrow(1, start, part.shape[1]).add_(part)
        ctx.mark_dirty(total)
        ctx.span = (start, part.shape[1])
        return total

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], grads[0].narrow(1, *ctx.span), None
