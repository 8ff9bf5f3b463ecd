"""Which PyTorch kernel computes the products of sparse codes fastest, by how dense the codes are and how wide the rows.

Axes: N tokens, F features, K the width that a feature writes, A active (token, feature) pairs. Times are the least of
several rounds in which the kernels take turns: CPU milliseconds summed over threads on a CPU, wall time on a GPU.
`csr` and `gemm` write into a matrix that is there already, as a gradient may be; `bag` cannot, and pays for a fresh
one. `gemm` gets its dense codes for nothing.
"""

import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from machine import keep, machine
from torch import Tensor
from torch.nn.functional import embedding_bag

Kernels = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Rows:
    """A sparse matrix [R, C] in compressed rows; `rows` repeats what `offsets` says, for each entry."""

    offsets: Tensor
    rows: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]

    def csr(self, values: Tensor) -> Tensor:
        """As PyTorch's own sparse tensor, with these values."""
        return torch.sparse_csr_tensor(self.offsets, self.columns, values, self.shape, check_invariants=False)

    def bag(self, table: Tensor) -> Tensor:
        """This matrix times a table [C, K]."""
        settings = {"mode": "sum", "include_last_offset": True}
        return embedding_bag(self.columns, table, self.offsets, per_sample_weights=self.values, **settings)

    def dense(self) -> Tensor:
        """This matrix with its zeros."""
        out = self.values.new_zeros(self.shape)
        out[self.rows, self.columns] = self.values
        return out

    def transposed(self) -> "Rows":
        """The same entries, sorted by column."""
        order = torch.argsort(self.columns, stable=True)
        offsets = self.offsets.new_zeros(self.shape[1] + 1)
        offsets[1:] = torch.bincount(self.columns, minlength=self.shape[1]).cumsum(0)
        return Rows(offsets, self.columns[order], self.rows[order], self.values[order], (self.shape[1], self.shape[0]))


def random_codes(n_tokens: int, n_features: int, density: float, device: str) -> Rows:
    """Codes with the same number of active features, chosen evenly, on each token."""
    k = max(1, round(density * n_features))
    features = torch.rand(n_tokens, n_features, device=device).topk(k).indices.sort().values.flatten()
    tokens = torch.arange(n_tokens, device=device).repeat_interleave(k)
    offsets = torch.arange(0, n_tokens * k + 1, k, device=device)
    return Rows(offsets, tokens, features, torch.rand(n_tokens * k, device=device) + 0.1, (n_tokens, n_features))


def sum_kernels(entries: Rows, table: Tensor) -> Kernels:
    """`entries` [R, C] times `table` [C, K]: the decoder, and its weights' gradient from the transposed codes."""
    csr, dense = entries.csr(entries.values), entries.dense()
    out = table.new_zeros(entries.shape[0], table.shape[1])
    return {
        "bag": lambda: entries.bag(table),
        "csr": lambda: torch.addmm(out, csr, table, beta=0, out=out),
        "gemm": lambda: torch.mm(dense, table, out=out),
    }


def dot_kernels(entries: Rows, left: Tensor, right: Tensor) -> Kernels:
    """left[row] . right[column] at every entry: the gradient of the activations."""
    zeros = entries.csr(torch.zeros_like(entries.values))  # beta = 0 would let a NaN through
    full = left.new_zeros(entries.shape)
    backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
    where = (entries.columns, entries.offsets[:-1], entries.rows, 0)
    return {
        "bag": lambda: backward(left, right, *where),
        "csr": lambda: torch.sparse.sampled_addmm(zeros, left, right.t(), beta=0.0).values(),
        "gemm": lambda: torch.mm(left, right.t(), out=full)[entries.rows, entries.columns],
    }


def least_times(kernels: Kernels, rounds: int, device: str) -> dict[str, float]:
    """The least milliseconds of each kernel; raises AssertionError where their results differ."""
    first, *others = [kernel().clone() for kernel in kernels.values()]
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-3, atol=1e-2)
    times = {name: float("inf") for name in kernels}
    for _ in range(rounds):
        for name, kernel in kernels.items():
            times[name] = min(times[name], 1e3 * _seconds(kernel, device))
    return times


def _seconds(kernel: Callable[[], Tensor], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        kernel()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    kernel()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def row(product: str, width: int, density: float, times: dict[str, float]) -> str:
    """One line of the table, the fastest in bold."""
    best = min(times.values())
    cells = [f"**{ms:.2f}**" if ms == best else f"{ms:.2f}" for ms in times.values()]
    return f"| {product} | {width} | {100 * density:g} % | " + " | ".join(cells) + " |"


def table(args: Namespace) -> Iterator[str]:
    """The lines of the table, as they are measured."""
    yield f"# Products of sparse codes, {datetime.now(UTC).date()}\n"
    yield machine(args.device)
    yield f"{args.tokens:,} tokens, {args.features:,} features; milliseconds.\n"
    yield "| product | width K | active | bag | csr | gemm |\n|---|---:|---:|---:|---:|---:|"
    for width in args.widths:
        W = torch.randn(args.features, width, device=args.device)
        grad = torch.randn(args.tokens, width, device=args.device)
        for density in args.densities:
            codes = random_codes(args.tokens, args.features, density, args.device)
            products = {
                "decode": sum_kernels(codes, W),
                "dW": sum_kernels(codes.transposed(), grad),
                "dvalues": dot_kernels(codes, grad, W),
            }
            for product, kernels in products.items():
                yield row(product, width, density, least_times(kernels, args.rounds, args.device))


def main() -> None:
    """Print the table as Markdown, and keep it where asked to."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1536])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.001, 0.004, 0.016, 0.06, 0.25])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/DATE-sparse-products-DEVICE.md")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    lines = []
    for line in table(args):
        lines.append(line)
        print(line, flush=True)
    if args.keep:
        keep("sparse-products", args.device, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
