"""The cross-layer transcoder: encoders that read one layer, decoders that write to many."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from crosslayer.coders.checkpoint import check_tensors, read_run, write_run
from crosslayer.coders.codes import Codes
from crosslayer.coders.decoders import Decoder, Full, read_decoder, write_decoder
from crosslayer.coders.draw import Draw
from crosslayer.coders.input_norm import InputNorm, read_norm, write_norm
from crosslayer.coders.products import affine
from crosslayer.coders.sharing import Sharing, axis_of, better
from crosslayer.coders.sparsity import (
    BatchTopK,
    Encoded,
    Encoder,
    JumpReLU,
    Sparsity,
    Thresholds,
    read_sparsity,
    write_sparsity,
)
from crosslayer.coders.writes import CoalescedWrites, RunningWrites, Writes
from crosslayer.errors import UserError
from crosslayer.files import size_text
from crosslayer.memory import memory_room
from crosslayer.team import ALONE, Places, Team, share
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

    `y_t = b_dec[t] + sum over sources s of t of a_s @ W[s -> t]`, with `a_s = sparsity(x_s @ W_enc[s].T + b_enc[s])`,
    plus `x_s @ W_skip[s -> t].T` where there is a skip connection. A layer without targets (the last one when
    first_target is 1) has no features. Parameters, by position in `sources`:

    * `W_enc[i]` [F, D], `b_enc[i]` [F]
    * `decoder`, a bank that holds the write vectors W (`crosslayer.coders.decoders`)
    * `b_dec` [L, D]
    * `W_skip[j]` [T, D, D], by position in the skip wiring's sources; each is [out, in]
    * `log_threshold[i]` [F] while a JumpReLU is trained; the buffer `threshold` [S, F] in a finished one
    * the buffer `first_write` [L, D]: the mean write at a prompt's first position, which has no features (it is an
      attention sink with massive activations in most models, and left out of training)
    * the buffers `input_scale` and `output_scale` [L] while it is trained: it then works on x / input_scale and
      multiplies what it writes by output_scale. `fold` absorbs them into the weights.

    Source: "Circuit Tracing", Anthropic 2025, section "Building an interpretable replacement model".

    Args:
        wiring: which layer's features write to which layers.
        d_model: width of the language model, D.
        d_transcoder: features a layer, F.
        sparsity: which features count as active.
        decoder: how write vectors are stored and shared.
        skip: which layer's x is passed on linearly to which layers' writes; None for no skip connection.
        input_norm: what x passes before the encoders read it; None for x itself. Skip connections pass x itself on.
        kept_layers: layers that no source writes to and whose own MLP stays in a replacement model; the others of
            that kind are written their bias.
        team: processes that hold it together, each its share of the features of every encoder.
        sharing: how they share the rest; what sends less under `sparsity` when left out. The D of what is written, in
            the shapes above and in what is decoded, are then C, the columns of a process.

    Raises:
        UserError: for parts that do not go together, naming them.
    """

    cut: Tensor
    thresholds: Tensor | None
    input_scale: Tensor | None
    output_scale: Tensor | None
    first_write: Tensor

    def __init__(
        self,
        wiring: Wiring,
        d_model: int,
        d_transcoder: int,
        sparsity: Sparsity,
        decoder: Decoder | None = None,
        skip: Wiring | None = None,
        input_norm: InputNorm | None = None,
        kept_layers: Sequence[int] = (),
        team: Team = ALONE,
        sharing: type[Sharing] | None = None,
    ):
        super().__init__()
        if d_transcoder < 1:
            raise UserError(f"d_transcoder is {d_transcoder}; choose at least 1 feature a layer")
        if skip is not None and skip.n_layers != wiring.n_layers:
            raise UserError(f"the skip connection is for {skip.n_layers} layers, the wiring for {wiring.n_layers}")
        if written := [t for t in kept_layers if t not in range(wiring.n_layers) or wiring.n_sources(t)]:
            raise UserError(f"kept_layers names layer {written[0]}; only one that no source writes to can keep its MLP")
        sparsity.check(len(wiring.source_layers), d_transcoder)
        self.wiring, self.d_model, self.d_transcoder, self.sparsity = wiring, d_model, d_transcoder, sparsity
        self.skip, self.sources = skip, wiring.source_layers
        self.input_norm, self.kept_layers = input_norm, tuple(kept_layers)
        self.provenance, self.offloaded = Provenance(), False
        self.team, self.held = team, share(team.features, d_transcoder)
        self.sharing = (sharing or better(sparsity))(team.features, d_transcoder, d_model)
        F, L, D, C = len(self.held), wiring.n_layers, d_model, len(self.sharing.columns)
        self.W_enc = nn.ParameterList(torch.zeros(F, D) for _ in self.sources)
        self.b_enc = nn.ParameterList(torch.zeros(F) for _ in self.sources)
        self.decoder = (decoder or Full()).build(wiring, C, len(self.sharing.rows))
        self.b_dec = nn.Parameter(torch.zeros(L, C))
        skips = skip.source_layers if skip else ()
        self.W_skip = nn.ParameterList(torch.zeros(skip.n_targets(s), C, D) for s in skips if skip)
        self.log_threshold = nn.ParameterList()
        for name in ("thresholds", "input_scale", "output_scale"):
            self.register_buffer(name, None)
        self.register_buffer("cut", torch.zeros(()))
        self.register_buffer("first_write", torch.zeros(L, D))

    @property
    def W_dec(self) -> nn.ParameterList:
        """The write vectors of a full decoder, [F, T, D] each; what other banks store under this name."""
        weights = self.decoder.W_dec
        assert isinstance(weights, nn.ParameterList)
        return weights

    def initialise(self, seed: int) -> "CrossLayerTranscoder":
        """Draw W_enc ~ U(+-F^-1/2) and write vectors ~ U(+-(L D)^-1/2); biases and skips stay 0."""
        F, D, generator = self.d_transcoder, self.d_model, torch.Generator().manual_seed(seed)
        draw = Draw(generator, self.held, F, range(D), D)
        for W_enc in self.W_enc:
            draw(W_enc, F**-0.5)
        draw = Draw(generator, self.sharing.rows, F, self.sharing.columns, D)
        self.decoder.initialise(draw, (self.wiring.n_layers * D) ** -0.5)
        return self.learn_thresholds()

    def learn_thresholds(self) -> "CrossLayerTranscoder":
        """Make, in place, what a JumpReLU learns: thresholds that start from those there are, or from its setting."""
        if isinstance(self.sparsity, JumpReLU):
            start = torch.full((len(self.sources), len(self.held)), self.sparsity.initial_threshold)
            start = start if self.thresholds is None else self.thresholds.clamp_min(1e-6).nan_to_num(posinf=1e6)
            self.log_threshold = nn.ParameterList(row.log().clone() for row in start.to(self.b_dec.device))
            self.thresholds = None
        return self

    def with_thresholds(self, thresholds: Float[Tensor, "S F"]) -> "CrossLayerTranscoder":
        """This transcoder, in place, as a JumpReLU one with fixed thresholds."""
        self.sparsity, self.log_threshold = JumpReLU(), nn.ParameterList()
        self.thresholds = thresholds.detach().clone()
        return self

    def preactivations(self, x: Float[Tensor, "N L D"]) -> Float[Tensor, "N S F"]:
        """Encoder outputs of every source layer, before any non-linearity; x in the coder's own units."""
        layers = enumerate(self.sources)
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return torch.stack([self.layer_preactivations(i, x[:, s]) for i, s in layers]).transpose(0, 1)
        pre = x.new_empty(len(self.sources), len(x), len(self.held))  # each layer in one piece
        for i, s in layers:
            pre[i] = self.layer_preactivations(i, x[:, s])
        return pre.transpose(0, 1)

    def layer_preactivations(self, i: int, x: Float[Tensor, "N D"]) -> Float[Tensor, "N F"]:
        """The same for source number i, from that layer's x."""
        return affine(x, self.W_enc[i].to(x.device), self.b_enc[i])

    def held_by_all(self) -> list[nn.Parameter]:
        """The parameters that every process of the team has in whole; they have their share of the others."""
        return [p for name, p in self.named_parameters() if axis_of(self.sharing, name) is None]

    def decoder_norms(self) -> Float[Tensor, "S F"]:
        """Length of each feature's write vectors over all its targets."""
        return self.sharing.norms(self.decoder.norms()).to(self.b_dec.device)

    def encode(self, x: Float[Tensor, "N L D"]) -> list[Codes]:
        """Codes of every source layer, each layer's x given (not the replaced stream's); layer by layer if possible."""
        if self.thresholds is None:
            return self.encode_for_training(x, 1.0).codes
        return [self.encode_layer(s, x[:, s]) for s in self.sources]

    def encode_for_training(self, x: Float[Tensor, "N L D"], progress: float, places: Places | None = None) -> Encoded:
        """Codes and pre-activations under the sparsity in force at `progress` (0 to 1), with gradients.

        `places` say where the tokens stand in a batch of which others look at the rest.
        """
        return self.sparsity_at(progress).encode(self, self.scaled(x), places or Places.whole(len(x)))

    def encode_layer(self, source: int, x: Float[Tensor, "N D"], progress: float = 1.0) -> Codes:
        """Codes of one source layer alone.

        Raises:
            UserError: when the sparsity needs all layers at once (joint TopK before calibration).
        """
        return self.encode_layer_for_training(source, x, progress)[1]

    def encode_layer_for_training(
        self, source: int, x: Float[Tensor, "N D"], progress: float
    ) -> tuple[Float[Tensor, "N F"], Codes]:
        """Pre-activations and codes of one source layer alone, under the sparsity in force, with gradients."""
        if self.input_norm is not None:
            x = self.input_norm(x)
        if self.input_scale is not None:
            x = x / self.input_scale[source]
        return self.sparsity_at(progress).encode_layer(self, self.sources.index(source), x)

    def sparsity_at(self, progress: float) -> Sparsity:
        """The sparsity in force: fixed thresholds where there are some."""
        return self.sparsity.at(progress) if self.thresholds is None else Thresholds(self.thresholds)

    def scaled(self, x: Float[Tensor, "N L D"]) -> Float[Tensor, "N L D"]:
        """What encoders read, normalised and in the coder's own units; in memory, each layer in one piece."""
        if self.input_norm is not None:
            x = self.input_norm(x)
        if self.input_scale is None:
            return x
        return (x.transpose(0, 1).contiguous() / self.input_scale[:, None, None]).transpose(0, 1)

    def writes(self, n_tokens: int, n_bare: int = 0) -> Writes:
        """A collector of what sources write, in the coder's own units, to N tokens and to some more.

        Biases are in it already for the N, not for the bare ones after them.
        """
        start = torch.cat([self.b_dec.flatten().expand(n_tokens, -1), self.b_dec.new_zeros(n_bare, self.b_dec.numel())])
        if not self.sharing.has_biases:
            start = torch.zeros_like(start)
        k = getattr(self.decoder.settings, "topk_coalesced", None)
        return RunningWrites(self.decoder, start) if k is None else CoalescedWrites(self.decoder, start, k)

    def add_layer(self, writes: Writes, layer: int, codes: Codes | None, x: Float[Tensor, "N D"]) -> None:
        """Add, in place, what a layer's features and its skip connection write; codes of None for no features."""
        if codes is not None:
            writes.add(self.sources.index(layer), codes)
        if self.skip is not None and layer in self.skip.source_layers and self.sharing.has_biases:
            writes.add_linear(self.skip.targets(layer).start, self.skipped(layer, x))

    def skipped(self, layer: int, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N K"]:
        """What the skip connection of a layer that has one passes on, to its targets side by side."""
        assert self.skip is not None
        W = self.W_skip[self.skip.source_layers.index(layer)]
        return linear(x if self.input_scale is None else x / self.input_scale[layer], W.flatten(0, 1).to(x.device))

    def write(self, writes: Writes, target: int) -> Float[Tensor, "N D"]:
        """What stands in for one layer's MLP output, once the layers up to it were added."""
        y = writes.write(target)
        return y if self.output_scale is None else y * self.output_scale[target]

    def decode(self, codes: Sequence[Codes], x: Float[Tensor, "N L D"]) -> Float[Tensor, "N L C"]:
        """The reconstructed writes of all layers, from the codes of all sources and what the layers read."""
        return self._decode(codes, x, 0)

    def decode_beside(
        self, codes: Sequence[Codes], x: Float[Tensor, "N L D"], others: Sequence[Codes]
    ) -> tuple[Float[Tensor, "N L C"], Float[Tensor, "M L C"]]:
        """The same, and what other codes write to M tokens of their own, without biases and skips.

        In one pass, so that weights get one gradient instead of the sum of two.
        """
        both = [code.followed_by(other) for code, other in zip(codes, others, strict=True)]
        y = self._decode(both, x, others[0].n_tokens)
        return y[: len(x)], y[len(x) :]

    def _decode(self, codes: Sequence[Codes], x: Tensor, n_bare: int) -> Tensor:
        everybodys = self.sharing.codes(codes)
        writes, by_layer = self.writes(len(x), n_bare), dict(zip(self.sources, everybodys, strict=True))
        for layer in range(self.wiring.n_layers):
            self.add_layer(writes, layer, by_layer.get(layer), x[:, layer])
        y = self.sharing.writes(writes.everything())
        return y if self.output_scale is None else y * self.output_scale[:, None]

    def forward(self, x: Float[Tensor, "N L D"]) -> Float[Tensor, "N L C"]:
        """Reconstruct the MLP writes of N tokens from the streams that the MLPs read."""
        return self.decode(self.encode(x), x)

    @torch.no_grad()
    def unfold(self, input_scale: Float[Tensor, " L"], output_scale: Float[Tensor, " L"]) -> "CrossLayerTranscoder":
        """Take, in place, scales out of the weights: the same function, to be trained in units of norm sqrt(D)."""
        if self.input_norm is not None:
            input_scale = torch.ones_like(input_scale)  # what was normalised has that norm already
        self._multiply(1 / input_scale, 1 / output_scale)
        self.input_scale, self.output_scale = input_scale.clone(), output_scale.clone()
        return self

    @torch.no_grad()
    def fold(self) -> "CrossLayerTranscoder":
        """Absorb, in place, the scales that it is trained with: the same function of raw x without them."""
        if self.input_scale is not None and self.output_scale is not None:
            self._multiply(self.input_scale, self.output_scale)
        self.input_scale = self.output_scale = None
        return self

    def place(self, device: torch.device) -> "CrossLayerTranscoder":
        """Move it, in place, to where it is to compute; if it is offloaded, without the weights that features have.

        Those stay where they are, and what is used of them is brought: rows of active features, and one layer's
        encoder at a time. Biases and thresholds come along.

        Raises:
            UserError: when the device has no room for it.
        """
        if self.offloaded:
            self.b_enc.to(device)
            self.b_dec.data = self.b_dec.to(device)
            for name, buffer in [*self.named_buffers()]:
                setattr(self, name, buffer.to(device))
            return self
        size = sum(p.nbytes for p in self.parameters() if p.device != device)
        room = memory_room(device) if size else None
        if room is not None and size > room:
            raise UserError(f"the run takes {size_text(size)} and {device} has {size_text(room)} free; add --offload")
        return self.to(device)

    def save(
        self, path: str | Path, write: Callable[[Path, dict[str, Any], dict[str, Tensor]], None] = write_run
    ) -> None:
        """Write a run folder: `config.json` and `model.safetensors` (sharded past 5 GB), atomically.

        `write` is for a team, whose processes write the rows that they hold.

        Raises:
            UserError: before JumpReLU thresholds are fixed, as another reader could not tell what is active.
        """
        if isinstance(self.sparsity, JumpReLU) and self.thresholds is None:
            raise UserError("this JumpReLU transcoder is still in training; fix its thresholds before saving it")
        assert self.input_scale is None, "scales are folded before a transcoder is saved"
        write(Path(path), self._config(), self._tensors())

    @classmethod
    def load(cls, path: str | Path, revision: str | None = None, *, offload: bool = False) -> "CrossLayerTranscoder":
        """Read a run folder, local or on the hub.

        Weights are maps of its files (`crosslayer.mapped`): those that are never used are never read, and a run may be
        larger than memory. Under `offload` they stay so where a model on a GPU uses it (`place`), and do not learn.

        Raises:
            UserError: naming the file or tensor that is missing or wrong.
        """
        config, tensors = read_run(str(path), revision)
        try:
            with torch.device("meta"):  # shapes alone: what they hold comes from the files
                coder = cls._from_config(config)
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path}: its config.json describes no transcoder ({type(error).__name__}: {error}); "
                "copy the run again or retrain it"
            ) from None
        coder._read_tensors(tensors)
        coder.offloaded = offload
        return coder.requires_grad_(not offload)

    @classmethod
    def _from_config(cls, config: dict[str, Any]) -> "CrossLayerTranscoder":
        skip = config.get("skip")
        coder = cls(
            Wiring(**config["wiring"]),
            config["d_model"],
            config["d_transcoder"],
            read_sparsity(config["sparsity"]),
            read_decoder(config.get("decoder", {"kind": "full"})),
            None if skip is None else Wiring(**skip),
            read_norm(config.get("input_norm")),
            config.get("kept_layers", ()),
        )
        coder.provenance = Provenance(**config["provenance"])
        if isinstance(coder.sparsity, JumpReLU):
            coder.thresholds = torch.zeros(len(coder.sources), len(coder.held))
        return coder

    def _config(self) -> dict[str, Any]:
        return {
            "wiring": asdict(self.wiring),
            "d_model": self.d_model,
            "d_transcoder": self.d_transcoder,
            "sparsity": write_sparsity(self.sparsity),
            "decoder": write_decoder(self.decoder.settings),
            "skip": None if self.skip is None else asdict(self.skip),
            "input_norm": write_norm(self.input_norm),
            "kept_layers": self.kept_layers,
            "provenance": asdict(self.provenance),
        }

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor of the run under its name in the file; views of this coder's own."""
        named, state = dict[str, Tensor](), self.state_dict()
        for own, files in self._names().items():
            named |= {files: state[own]} if isinstance(files, str) else dict(zip(files, state[own], strict=True))
        return named

    def _read_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take the run's tensors for this coder's own: no copy is made of weights in its precision."""
        own = self._tensors()
        check_tensors({name: tensor.shape for name, tensor in own.items()}, tensors)
        found = {name: tensors[name].to(tensor.dtype) for name, tensor in own.items()}
        state = {"cut": torch.zeros(())}
        for name, files in self._names().items():
            state[name] = found[files] if isinstance(files, str) else _stack([found[file] for file in files])
        self.load_state_dict(state, assign=True)

    def _names(self) -> dict[str, str | list[str]]:
        """Of each tensor of this module: its name in the file, by layer number, or those of its rows."""
        names: dict[str, str | list[str]] = {f"decoder.{own}": file for own, file in self.decoder.names().items()}
        for i, s in enumerate(self.sources):
            names |= {f"W_enc.{i}": f"W_enc.{s}", f"b_enc.{i}": f"b_enc.{s}"}
        for name in ("b_dec", "first_write"):
            names[name] = [f"{name}.{t}" for t in range(self.wiring.n_layers)]
        for j, s in enumerate(self.skip.source_layers if self.skip else ()):
            targets = self.skip.targets(s) if self.skip else ()
            names[f"W_skip.{j}"] = [f"W_skip.{t}" if s == t else f"W_skip.{s}.{t}" for t in targets]
        if self.thresholds is not None:
            names["thresholds"] = [f"threshold.{s}" for s in self.sources]
        return names | ({"cut": "cut"} if isinstance(self.sparsity, BatchTopK) else {})

    def _skip_pairs(self) -> list[tuple[int, int, Tensor]]:
        """Source, target and matrix [D, D] of every skip connection."""
        if self.skip is None:
            return []
        layers = zip(self.skip.source_layers, self.W_skip, strict=True)
        return [(s, t, W) for s, Ws in layers for t, W in zip(self.skip.targets(s), Ws, strict=True)]

    def _multiply(self, input_scale: Tensor, output_scale: Tensor) -> None:
        """Make this the function of x * input_scale that writes y * output_scale, in place."""
        for W_enc, s in zip(self.W_enc, self.sources, strict=True):
            W_enc.div_(input_scale[s])
        for s, t, W in self._skip_pairs():
            W.mul_(output_scale[t] / input_scale[s])
        self.decoder.fold(output_scale)
        self.b_dec.mul_(output_scale.view(-1, 1))


def _stack(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows) if len(rows) > 1 else rows[0][None]  # which is no copy
