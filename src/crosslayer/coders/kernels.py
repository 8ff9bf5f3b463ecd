"""The three products of sparse codes, each at the cost of the active pairs, by the quickest kernel of a device.

Axes as in `codes`. All kernels run on every device and are tested for equality on a CPU, where sums of rows by
`embedding_bag` are up to three times as quick as MKL's CSR product (`benchmarks/sparse_products.py`). On a GPU none
was measured by us; cuSPARSE is chosen for sums because others found it within 4 % of a Triton kernel.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from crosslayer.coders.pattern import Pattern


def decode(pattern: Pattern, values: Float[Tensor, " A"], W: Float[Tensor, "F K"]) -> Float[Tensor, "N K"]:
    """For each token, the sum of its features' rows of W, weighted."""
    return SUMS[W.device.type](W, pattern.features, pattern.offsets, values)


def sum_by_feature(pattern: Pattern, weights: Float[Tensor, " A"], rows: Float[Tensor, "N K"]) -> Float[Tensor, "F K"]:
    """For each feature, the sum of its tokens' rows, weighted: the gradient of a weight matrix."""
    order, tokens, offsets = pattern.by_feature
    return SUMS[rows.device.type](rows.contiguous(), tokens, offsets, weights.index_select(0, order))


def dots(pattern: Pattern, rows: Float[Tensor, "N K"], W: Float[Tensor, "F K"]) -> Float[Tensor, " A"]:
    """rows[token] . W[feature] at every pair: the gradient of the activations."""
    if not len(pattern):
        return rows.new_empty(0)
    return DOTS[W.device.type](pattern, rows, W)


def sums_by_bags(
    table: Tensor, columns: Int[Tensor, " A"], starts: Int[Tensor, " R_plus_1"], weights: Tensor
) -> Tensor:
    """Weighted sums [R, K] of a table's rows, by `embedding_bag`."""
    return embedding_bag(columns, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)


def sums_by_csr(table: Tensor, columns: Int[Tensor, " A"], starts: Int[Tensor, " R_plus_1"], weights: Tensor) -> Tensor:
    """The same as a sparse product: MKL's, or cuSPARSE's on a GPU."""
    return _csr(starts, columns, weights, len(table)) @ table


def dots_by_bags(pattern: Pattern, rows: Tensor, W: Tensor) -> Tensor:
    """The gradient that `embedding_bag` has for its weights, token by token."""
    where = (pattern.features, pattern.offsets[:-1], pattern.tokens, 0)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(rows, W, *where)


def dots_by_csr(pattern: Pattern, rows: Tensor, W: Tensor) -> Tensor:
    """A sampled dense product in the order of the features, which reads W once; needs MKL or cuSPARSE."""
    order, tokens, offsets = pattern.by_feature
    sampled = _csr(offsets, tokens, rows.new_zeros(len(tokens)), len(rows))
    products = torch.sparse.sampled_addmm(sampled, W, rows.T, beta=0.0).values()
    return torch.empty_like(products).scatter_(0, order, products)


def _csr(starts: Tensor, columns: Tensor, values: Tensor, n_columns: int) -> Tensor:
    return torch.sparse_csr_tensor(starts, columns, values, (len(starts) - 1, n_columns), check_invariants=False)


Sums = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Dots = Callable[[Pattern, Tensor, Tensor], Tensor]

SUMS = defaultdict[str, Sums](lambda: sums_by_bags, cuda=sums_by_csr)
"""By device: what sums rows."""
DOTS = defaultdict[str, Dots](lambda: dots_by_bags, {"cpu": dots_by_csr} if torch.backends.mkl.is_available() else {})
"""By device: what multiplies rows."""
DENSE_FROM = defaultdict[str, float](lambda: 0.3, cuda=0.1)
"""Density of codes, by device, from which a dense product is quicker than sums of rows.

On a CPU they cross at 0.28 to 0.37. For a GPU it is a guess.
"""

with warnings.catch_warnings():  # said once a process, of a part of torch that is as it was for years
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)
