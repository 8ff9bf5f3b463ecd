"""The options of `crosslayer train`, and the settings that they stand for."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from crosslayer.activations.manifest import Manifest
from crosslayer.coders.decoders import DECODERS, read_decoder
from crosslayer.coders.sparsity import KINDS, Sparsity, read_sparsity
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.data.reading import DATA_KINDS, Reading
from crosslayer.distributed.mesh import TIMEOUT
from crosslayer.errors import UserError
from crosslayer.mesh_options import MeshOptions
from crosslayer.model_options import AS_IT_IS, ModelOptions
from crosslayer.training.config import TrainConfig
from crosslayer.training.losses import LOSSES, read_loss
from crosslayer.training.optimizers import OPTIMIZERS, read_optimizer
from crosslayer.training.revival import AuxK, DeadPenalty
from crosslayer.wiring import Wiring

ARCHITECTURE = ("span", "first_target", "d_transcoder", "expansion", "decoder", "rank", "topk_coalesced", "skip")
ARCHITECTURE += ("pair_scale", "pair_offset")
"""Options that a finetuning takes from its start."""
DEFAULT_K = {"joint-topk": 64, "batch-topk": 64, "topk": 8, "groupmax": 8}


def _names(kinds: dict[str, type]) -> str:
    return ", ".join(kinds)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `crosslayer train`; one that does not go with the others is refused, never ignored."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Bundled name (emoji-llava, smollm2), model folder, or hub id; for --dry-run a configuration is enough."""
    data: Annotated[Positional[str | None], arg(metavar="DATA", help=DATA_KINDS)] = None
    out: Path
    """Folder of the run."""
    store: Path | None = None
    """Captured activations to train on, instead of DATA; MODEL, which is then not loaded, must be the store's own."""
    reading: Annotated[Reading, arg(name="")] = Reading()  # noqa: RUF009
    """How DATA is read."""
    tokens: int = TrainConfig.tokens
    """Tokens to train on; data is repeated in new orders as needed."""
    seed: tuple[int, ...] = (0,)
    """Seed of the weights and of the order of the data; of several, each trains a run of its own, OUT/seed-N."""
    dry_run: bool = False
    """Print parameters, memory, disk and time for this machine, and what would fit where it does not; train nothing."""
    mesh: Annotated[MeshOptions, arg(name="")] = MeshOptions()  # noqa: RUF009
    resume: bool = False
    """Go on from the state in --out, to the result of an unbroken training."""
    overwrite: bool = False
    """Replace what an earlier run left in the output folder."""
    finetune: str | None = None
    """Run to start from, a folder or hub id; wiring, width, decoder and skip are its own, thresholds stay as they are
    unless --sparsity is given."""

    span: int | None = None
    """Layers a source writes to: 1 is a PLT, all (default) the full CLT."""
    first_target: int | None = None
    """0 (default): a source writes to its own layer first; 1: to the next."""
    d_transcoder: int | None = None
    """Features a layer; overrides --expansion."""
    expansion: int | None = None
    """Features a layer in multiples of d_model; 2 by default."""
    decoder: Annotated[str | None, arg(help=f"Decoder bank, one of {_names(DECODERS)}; full by default.")] = None
    rank: int | None = None
    """Write directions a feature of a low-rank decoder."""
    pair_scale: bool = False
    """Learn a factor of each feature for each target."""
    pair_offset: bool = False
    """Learn an offset of each active feature for each target."""
    topk_coalesced: int | None = None
    """Of a target-tied decoder: active features of all sources that a target keeps a token."""
    skip: str | None = None
    """Skip connection: own (each layer to itself) or pairs (each source to all its targets); none by default."""

    sparsity: Annotated[str | None, arg(help=f"One of {_names(KINDS)}; batch-topk by default.")] = None
    k: int | None = None
    """Active features a token: over all layers (joint-topk, batch-topk; 64) or in each (topk, groupmax; 8)."""
    anneal_from: float | None = None
    """K starts at this multiple of --k (6) ..."""
    anneal_share: float | None = None
    """... and falls to it over this share of the training (0.2)."""
    penalty: float | None = None
    """Weight of the sparsity penalty of relu and jumprelu."""
    target_l0: float | None = None
    """Active features a token that jumprelu's quadratic penalty pulls to; switches it on."""
    calibrate: bool = True
    """Convert to JumpReLU at the end; topk, groupmax and relu can also stay what they are."""
    auxk: Annotated[float, arg(help="Weight of the loss by which dead features learn the residual; 0: off.")] = (
        AuxK.coefficient
    )
    dead_penalty: Annotated[float, arg(help="Weight of the penalty that lifts dead features; 0: off.")] = (
        DeadPenalty.coefficient
    )

    loss: Annotated[str, arg(help=f"One of {_names(LOSSES)}: reconstruction, or end to end, on predictions.")] = "fvu"
    loss_weight: float | None = None
    """Weight of the kl or ce part."""
    fvu_weight: float | None = None
    """Weight of the unexplained variance beside kl or ce; 1 with kl is EleutherAI's kl-fvu."""
    optimizer: Annotated[str, arg(help=f"One of {_names(OPTIMIZERS)}.")] = "adam"
    learning_rate: float | None = None
    """Peak rate; 12 / features a layer, at most 0.016, by default."""
    warmup_share: float = TrainConfig.warmup_share
    """Share of the tokens over which the rate rises from 0."""
    decay_share: float = TrainConfig.decay_share
    """Share of the tokens over which it falls to 0 at the end."""
    batch_tokens: int = TrainConfig.batch_tokens
    """Tokens a step, about."""
    micro_batches: int = TrainConfig.micro_batches
    """Parts that a step is computed in, for less memory; the step stays the same."""
    precision: str = TrainConfig.precision
    """fp32, or bf16 for products under autocast, with fp32 weights and moments."""
    read: str = "resid"
    """What the encoders read: resid (before the MLP's norm) or mlp_in (after)."""
    feature_ranks: int = 1
    """Under torchrun: processes that share the features of every layer; groups of so many share the prompts."""
    shard_model: bool = False
    """Under torchrun: spread the language model's weights over all processes, instead of a copy in each."""
    timeout: float = TIMEOUT
    """Under torchrun: seconds to wait for another process before giving up."""
    loading: Annotated[ModelOptions, arg(name="")] = AS_IT_IS

    def check_alone(self) -> None:
        """Refuse options of a training by several processes where there is one, and none is only priced.

        Raises:
            UserError: naming the option.
        """
        if self.mesh.ranks is not None:
            return
        for name, given in (("feature-ranks", self.feature_ranks != 1), ("shard-model", self.shard_model)):
            if given:
                raise UserError(
                    f"--{name} is given, but there is one process; start several with torchrun: "
                    f"torchrun --nproc-per-node {max(2, self.feature_ranks)} -m crosslayer train ..."
                )

    def check_store(self, store: Manifest) -> None:
        """Refuse a store of another model or read than the options name, and options that it has no use for.

        Raises:
            UserError: naming both values.
        """
        if store.model and self.model != store.model and Path(self.model).resolve() != Path(store.model).resolve():
            raise UserError(f"{self.store}: is of {store.model}, MODEL is {self.model}; name the store's own")
        for name, asked in (("revision", self.loading.revision or ""), ("read", self.read)):
            found = getattr(store, name)
            if asked != found:
                raise UserError(f"{self.store}: has {name} {found!r}, --{name} is {asked!r}; give the store's own")
        if self.data:
            raise UserError(f"{self.data} and a store are given; give DATA or --store, not both")
        if self.reading != Reading():
            raise UserError("options of how DATA is read are given with --store, which has been read; leave them out")
        if self.shard_model:
            raise UserError("--shard-model is given with --store, which needs no language model; leave it out")
        if self.dry_run:
            raise UserError("--dry-run prices a training with its captures; give DATA instead of --store")

    def config(self, n_layers: int, start: CrossLayerTranscoder | None, seed: int) -> TrainConfig:
        """The settings of one training.

        Raises:
            UserError: for options that do not go together.
        """
        config = TrainConfig(
            wiring=self._wiring(n_layers),
            sparsity=None if start is not None and self.sparsity is None else self._sparsity(),
            decoder=self._decoder(),
            skip=self._skip(n_layers),
            loss=read_loss({"kind": self.loss, **_given(weight=self.loss_weight, fvu_weight=self.fvu_weight)}),
            d_transcoder=self.d_transcoder,
            expansion=self.expansion or TrainConfig.expansion,
            tokens=self.tokens,
            batch_tokens=self.batch_tokens,
            micro_batches=self.micro_batches,
            precision=self.precision,
            optimizer=read_optimizer({"kind": self.optimizer}),
            learning_rate=self.learning_rate,
            warmup_share=self.warmup_share,
            decay_share=self.decay_share,
            auxk=AuxK(coefficient=self.auxk),
            dead_penalty=DeadPenalty(self.dead_penalty),
            calibrate=self.calibrate,
            seed=seed,
        )
        return config if start is None else self._of_start(config, start)

    def _wiring(self, n_layers: int) -> Wiring:
        first = self.first_target or 0
        return Wiring.full(n_layers, first) if self.span is None else Wiring(n_layers, self.span, first)

    def _decoder(self) -> Any:
        implied = "low-rank" if self.rank is not None else "full" if self.topk_coalesced is None else "target-tied"
        kind = self.decoder or implied
        settings = _given(rank=self.rank, topk_coalesced=self.topk_coalesced)
        flags = {"scale": self.pair_scale, "offset": self.pair_offset}
        return read_decoder({"kind": kind, **settings, **{name: True for name, on in flags.items() if on}})

    def _skip(self, n_layers: int) -> Wiring | None:
        kinds = {None: None, "own": Wiring.per_layer(n_layers), "pairs": self._wiring(n_layers)}
        if self.skip not in kinds:
            raise UserError(f"skip is {self.skip!r}; choose own or pairs, or leave it out")
        return kinds[self.skip]

    def _sparsity(self) -> Sparsity:
        kind = self.sparsity or "batch-topk"
        quadratic = None if self.target_l0 is None else 1.0
        settings = _given(
            k=DEFAULT_K.get(kind) if self.k is None else self.k,
            anneal_from=self.anneal_from,
            anneal_share=self.anneal_share,
            coefficient=self.penalty,
            target_l0=self.target_l0,
            quadratic_coefficient=quadratic,
        )
        return read_sparsity({"kind": kind, **settings})

    def _of_start(self, config: TrainConfig, start: CrossLayerTranscoder) -> TrainConfig:
        """The settings with the start's own architecture, and a refusal of options that ask for another."""
        for name in ARCHITECTURE:
            if getattr(self, name) not in (None, False):
                raise UserError(
                    f"--{name.replace('_', '-')} is given, but --finetune keeps the run's own; leave it out"
                )
        sparse = _given(k=self.k, anneal_from=self.anneal_from, anneal_share=self.anneal_share, penalty=self.penalty)
        if self.sparsity is None and sparse:
            raise UserError(f"--{next(iter(sparse)).replace('_', '-')} is given without --sparsity; name one")
        return replace(
            config,
            wiring=start.wiring,
            d_transcoder=start.d_transcoder,
            decoder=start.decoder.settings,
            skip=start.skip,
        )


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
