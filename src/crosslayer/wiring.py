"""Which source layer writes to which target layers: the one place that knows."""

from dataclasses import dataclass

from crosslayer.errors import UserError


@dataclass(frozen=True)
class Wiring:
    """The targets of every source layer: `s + first_target ... min(s + first_target + span, L) - 1`.

    A per-layer transcoder (PLT) is span 1; a cross-layer transcoder (CLT) as in "Circuit Tracing" (Anthropic,
    2025) is span L; EleutherAI's `cross_layer=N` is span N. `first_target=1` leaves the own layer out, so layer 0
    is then written by nobody and keeps its mean.

    Args:
        n_layers: decoder layers L of the language model.
        span: how many layers a source may write to, 1 ... L - first_target.
        first_target: 0 when a source writes to its own layer first, 1 when it starts at the next.

    Raises:
        UserError: naming the value and the range it must lie in.
    """

    n_layers: int
    span: int
    first_target: int = 0

    def __post_init__(self):
        if self.n_layers < 1:
            raise UserError(f"n_layers is {self.n_layers}; a wiring needs at least 1 layer")
        if self.first_target not in (0, 1):
            raise UserError(f"first_target is {self.first_target}; choose 0 (own layer first) or 1 (next layer first)")
        if self.n_layers <= self.first_target:
            raise UserError(f"first_target 1 needs at least 2 layers, the model has {self.n_layers}")
        if not 1 <= self.span <= self.n_layers - self.first_target:
            raise UserError(
                f"span is {self.span}; with {self.n_layers} layers and first_target {self.first_target} "
                f"choose 1 to {self.n_layers - self.first_target}"
            )

    @classmethod
    def full(cls, n_layers: int, first_target: int = 0) -> "Wiring":
        """Every source writes to all layers from its own (or the next) to the last: the true CLT."""
        return cls(n_layers, n_layers - first_target, first_target)

    @classmethod
    def per_layer(cls, n_layers: int) -> "Wiring":
        """Every source writes to its own layer only: the PLT."""
        return cls(n_layers, 1)

    def targets(self, source: int) -> range:
        """Layers that `source` writes to, nearest first; empty where none is left."""
        start = source + self.first_target
        return range(start, max(start, min(start + self.span, self.n_layers)))

    def sources(self, target: int) -> range:
        """Layers that write to `target`, oldest first."""
        end = target - self.first_target + 1
        return range(max(0, end - self.span), max(0, end))

    def n_targets(self, source: int) -> int:
        """How many layers `source` writes to."""
        return len(self.targets(source))

    def n_sources(self, target: int) -> int:
        """How many layers write to `target`, its own included when first_target is 0."""
        return len(self.sources(target))

    @property
    def source_layers(self) -> tuple[int, ...]:
        """Layers with at least one target: those that have features at all."""
        return tuple(s for s in range(self.n_layers) if self.n_targets(s))

    @property
    def n_pairs(self) -> int:
        """Number of (source, target) pairs, so of decoders."""
        return sum(self.n_targets(s) for s in range(self.n_layers))

    def table(self) -> str:
        """A printable table: a line a layer with n_targets, the targets, n_sources and the sources."""
        lines = [f"{'layer':>5}  {'n_targets':>9}  {'writes to':<10}  {'n_sources':>9}  read from"]
        for layer in range(self.n_layers):
            targets, sources = self.targets(layer), self.sources(layer)
            lines.append(
                f"{layer:>5}  {len(targets):>9}  {_interval(targets):<10}  {len(sources):>9}  {_interval(sources)}"
            )
        return "\n".join(lines)


def _interval(layers: range) -> str:
    if not layers:
        return "-"
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}..{layers[-1]}"
