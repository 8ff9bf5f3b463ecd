"""The settings of one training."""

from dataclasses import asdict, dataclass, field
from typing import Any

from crosslayer.coders.decoders import Decoder, Full, write_decoder
from crosslayer.coders.sparsity import BatchTopK, JointTopK, JumpReLU, Penalised, Sparsity, write_sparsity
from crosslayer.errors import UserError
from crosslayer.training.losses import FVU, Loss, write_loss
from crosslayer.training.optimizers import Adam, OptimizerSettings, write_optimizer
from crosslayer.training.revival import AuxK, DeadPenalty
from crosslayer.wiring import Wiring

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train a transcoder; the defaults suit a small model, see docs/decisions for why."""

    wiring: Wiring
    """Which layer writes to which."""
    sparsity: Sparsity | None = field(default_factory=lambda: BatchTopK(64))
    """Which features count as active; None, for a finetuning, keeps what the start has, its thresholds fixed."""
    decoder: Decoder = field(default_factory=Full)
    """How write vectors are stored and shared."""
    skip: Wiring | None = None
    """Which layer's input is passed on linearly to which layers' writes; None for no skip connection."""
    loss: Loss = field(default_factory=FVU)
    """What is minimised: reconstruction, or the replacement model's divergence from the original."""
    d_transcoder: int | None = None
    """Features a layer, F; `expansion` x d_model when left out."""
    expansion: int = 2
    """Features a layer in multiples of d_model, where d_transcoder is left out."""
    tokens: int = 1_000_000
    """Tokens to train on."""
    batch_tokens: int = 1024
    """Tokens a step, about."""
    micro_batches: int = 1
    """Parts that a step's tokens are processed in, one after the other: less memory, the same step."""
    precision: str = "fp32"
    """fp32, or bf16 for products under autocast; weights, gradients and moments stay fp32."""
    optimizer: OptimizerSettings = field(default_factory=Adam)
    """What makes a step of a gradient."""
    learning_rate: float | None = None
    """Peak learning rate; 12 / d_transcoder, but at most 0.016, when left out."""
    warmup_share: float = 0.02
    """Share of the tokens over which the learning rate rises from 0."""
    decay_share: float = 0.2
    """Share of the tokens over which it falls to 0 at the end."""
    auxk: AuxK = field(default_factory=AuxK)
    """Revival of dead features: they predict the residual."""
    dead_penalty: DeadPenalty = field(default_factory=DeadPenalty)
    """Revival of dead features: their scores are lifted."""
    dead_density: float = 1e-4
    """A feature counts as dead when it fires on a smaller share of recent tokens than this."""
    density_tokens: int = 5_000
    """Half-life, in tokens, of the moving average of firing."""
    calibration_tokens: int = 8_192
    """Tokens on which TopK is converted to JumpReLU at the end."""
    calibrate: bool = True
    """Convert to JumpReLU at the end; topk, groupmax and relu can also stay what they are."""
    seed: int = 0
    """Seed of the weights and of the order of the data."""

    def __post_init__(self):
        for name in ("expansion", "tokens", "batch_tokens", "micro_batches", "learning_rate", "density_tokens"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name} is {value}; choose more than 0")
        if self.d_transcoder is not None and self.d_transcoder < 1:
            raise UserError(f"d_transcoder is {self.d_transcoder}; choose at least 1 feature a layer")
        if self.calibration_tokens < 1:
            raise UserError(f"calibration_tokens is {self.calibration_tokens}; choose at least 1")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision is {self.precision!r}; choose one of {', '.join(PRECISIONS)}")
        if getattr(self.decoder, "topk_coalesced", None) and isinstance(self.sparsity, Penalised):
            raise UserError(
                f"topk_coalesced is set with {type(self.sparsity).__name__}, but it chooses among active features; "
                "use it with a topk sparsity"
            )
        if isinstance(self.sparsity, JointTopK) and not isinstance(self.loss, FVU):
            raise UserError(
                f"the loss is {type(self.loss).__name__}, through the replacement model, where JointTopK cannot encode "
                "a layer alone; use BatchTopK (batch-topk), which keeps the joint budget"
            )
        if not self.calibrate and isinstance(self.sparsity, JointTopK | BatchTopK | JumpReLU):
            raise UserError(
                f"calibrate is off with {type(self.sparsity).__name__}, which cannot be used without thresholds; "
                "leave it on, or choose topk, groupmax or relu"
            )
        if min(self.warmup_share, self.decay_share) < 0 or self.warmup_share + self.decay_share > 1:
            raise UserError(
                f"warmup_share {self.warmup_share} and decay_share {self.decay_share} must be at least 0 "
                "and together at most 1"
            )

    def width(self, d_model: int) -> int:
        """Features a layer for a model of this width."""
        return self.d_transcoder or self.expansion * d_model

    def record(self) -> dict[str, Any]:
        """The JSON form, to keep beside a run."""
        return {
            **asdict(self),
            "sparsity": None if self.sparsity is None else write_sparsity(self.sparsity),
            "decoder": write_decoder(self.decoder),
            "loss": write_loss(self.loss),
            "optimizer": write_optimizer(self.optimizer),
        }

    def peak_rate(self, d_transcoder: int) -> float:
        """The peak learning rate: 0.016 served widths to 768 best here, about 4e-4 is used at 25,000 and more."""
        return self.learning_rate or min(0.016, 12 / d_transcoder)

    def schedule(self, progress: float) -> float:
        """Share of the peak learning rate at `progress` (0 to 1): linear warm-up, flat, linear to 0."""
        rise = progress / self.warmup_share if self.warmup_share else 1.0
        fall = (1 - progress) / self.decay_share if self.decay_share else 1.0
        return max(0.0, min(1.0, rise, fall))
