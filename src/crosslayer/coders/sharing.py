"""Two ways for the processes of a team to share a coder, and when which is the better one.

Each process encodes its share of the features of every layer; then either the features' write vectors are shared in the
same way (`ByRows`), and one dense sum makes the writes, or every process makes its share of d_model of the writes
(`ByColumns`), and tells the others which features are active.

Axes: N tokens, S source layers, F features a layer, H of them held, C columns of d_model held, A active pairs.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from crosslayer.coders.codes import Codes
from crosslayer.coders.gathered import gathered
from crosslayer.coders.sparsity import Selecting, Sparsity
from crosslayer.team import ALONE, Group, share, shares

ENCODER = {"W_enc": 0, "b_enc": 0, "log_threshold": 0, "threshold": -1, "thresholds": -1}
"""The axis of what belongs to an encoder that is that of features."""


class Sharing:
    """What a process has of a coder, and what it and the others do to decode together."""

    rows: range
    """Features whose write vectors it holds."""
    columns: range
    """Entries of the writes that it makes."""
    column_group: Group
    """Processes that make the other entries."""
    has_biases: bool
    """Whether it writes biases and what skip connections pass on."""
    axes: dict[str, int]
    """The axis along which a kind of tensor is shared; of kinds that are not named each process has all."""

    def __init__(self, features: Group, d_transcoder: int, d_model: int):
        raise NotImplementedError

    def codes(self, own: Sequence[Codes]) -> Sequence[Codes]:
        """What there is to decode here, from the codes [N, H] of the features that it encodes."""
        raise NotImplementedError

    def writes(self, part: Float[Tensor, "N L C"]) -> Float[Tensor, "N L C"]:
        """The writes, of what was decoded here."""
        raise NotImplementedError

    def norms(self, lengths: Float[Tensor, "S rows"]) -> Float[Tensor, "S H"]:
        """Lengths of the write vectors of the features that it encodes, from those of what it holds."""
        raise NotImplementedError


class ByRows(Sharing):
    """A process holds the write vectors of the features that it encodes; one sum of dense parts makes the writes.

    Each of P processes sends 2 (P - 1) / P x N L D numbers, whatever is active.
    """

    axes = ENCODER | {"W_dec": 0, "W_target": 0, "scale": 0, "offset": 0, "mix": 0}

    def __init__(self, features: Group, d_transcoder: int, d_model: int):
        self.features, self.rows, self.columns = features, share(features, d_transcoder), range(d_model)
        self.column_group, self.has_biases = ALONE.features, features.rank == 0

    def codes(self, own: Sequence[Codes]) -> Sequence[Codes]:
        """See `Sharing.codes`."""
        return own

    def writes(self, part: Tensor) -> Tensor:
        """See `Sharing.writes`."""
        return self.features.sum(part)

    def norms(self, lengths: Tensor) -> Tensor:
        """See `Sharing.norms`."""
        return lengths


class ByColumns(Sharing):
    """A process holds its columns of all write vectors; active pairs are told to all, and their gradients back.

    Each of P processes sends (P - 1) / P x A pairs and as many gradients. What has no columns (scales, offsets, mixes)
    all have. Source: EleutherAI's clt-training shards decoders so.
    """

    axes = ENCODER | {"W_dec": -1, "W_target": -1, "b_dec": -1, "W_skip": -2}

    def __init__(self, features: Group, d_transcoder: int, d_model: int):
        self.features, self.d_transcoder = features, d_transcoder
        self.rows, self.columns = range(d_transcoder), share(features, d_model)
        self.column_group, self.has_biases = features, True

    def codes(self, own: Sequence[Codes]) -> Sequence[Codes]:
        """See `Sharing.codes`."""
        return own if self.features.size == 1 else gathered(own, self.d_transcoder, self.features)

    def writes(self, part: Tensor) -> Tensor:
        """See `Sharing.writes`."""
        return part

    def norms(self, lengths: Tensor) -> Tensor:
        """See `Sharing.norms`."""
        if self.features.size == 1:
            return lengths
        held = [len(part) for part in shares(self.features.size, self.d_transcoder)]
        squares = lengths.detach().square().T.contiguous()
        return self.features.sum_back(squares.split(held)).sqrt().T


def better(sparsity: Sparsity) -> type[Sharing]:
    """The way that sends less under a sparsity.

    Told pairs take 8 bytes and their gradients 4, a sum 8 for each of L x D numbers: columns win while fewer than
    2/3 L D features are active on a token (0.8 L D with AuxK's sum), which is always so where k are selected, and never
    known where codes are dense. `docs/decisions` has the figures.
    """
    return ByColumns if isinstance(sparsity, Selecting) else ByRows


def axis_of(sharing: Sharing | type[Sharing], name: str) -> int | None:
    """The axis along which a parameter, buffer or tensor of a run is shared, by its name; None if all have all."""
    return sharing.axes.get([part for part in name.split(".") if not part.isdigit()][-1])
