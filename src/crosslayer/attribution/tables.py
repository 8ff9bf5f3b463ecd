"""Tallies side by side: a row an example, a column for each node or edge that any of them has.

Axes: n examples, C columns, S chosen columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from crosslayer.attribution.roles import Role
from crosslayer.attribution.tally import Tally


@dataclass(frozen=True, eq=False)
class Table:
    """Sparse: what a graph lacks counts 0 in it."""

    keys: Sequence[Any]
    """What each column is: a role, or those of an edge's source and target."""
    influence: csr_array
    effect: csr_array
    active: csr_array
    """1 where the graph has it at all; of edges, where its circuit does."""
    kept: csr_array
    """1 where the graph's circuit has it."""

    def kept_by(self, n_graphs: float) -> Int[np.ndarray, " S"]:
        """The columns that the circuits of at least so many graphs, and of any, have."""
        graphs = self.kept.sum(0)
        return np.flatnonzero((graphs > 0) & (graphs >= n_graphs - 1e-9))

    def columns(self, chosen: Int[np.ndarray, " S"]) -> "Dense":
        """Some columns."""
        return Dense(
            [self.keys[i] for i in chosen],
            *(getattr(self, name)[:, chosen].toarray() for name in ("influence", "effect", "active", "kept")),
        )


@dataclass(frozen=True, eq=False)
class Dense:
    """Some columns of a table."""

    keys: list[Any]
    influence: Float[np.ndarray, "n S"]
    effect: Float[np.ndarray, "n S"]
    active: Float[np.ndarray, "n S"]
    kept: Float[np.ndarray, "n S"]

    def rows(self, some: slice) -> "Dense":
        """Some examples."""
        return Dense(self.keys, self.influence[some], self.effect[some], self.active[some], self.kept[some])


class EdgeKeys(Sequence[tuple[Role, Role]]):
    """The source and the target of every edge, made when asked for."""

    def __init__(self, roles: Sequence[Role], pairs: Int[np.ndarray, " C"]):
        self.roles, self.pairs = roles, pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i):
        source, target = divmod(int(self.pairs[i]), len(self.roles))
        return self.roles[source], self.roles[target]


def tables(tallies: Sequence[Tally]) -> tuple[Table, Table]:
    """The nodes and the edges of all graphs."""
    number: dict[Role, int] = {}
    nodes = [np.array([number.setdefault(role, len(number)) for role in t.roles], np.int64) for t in tallies]
    roles = list(number)
    joined = [own[t.source] * len(roles) + own[t.target] for own, t in zip(nodes, tallies, strict=True)]
    pairs, columns = np.unique(np.concatenate(joined), return_inverse=True)
    edges = np.split(columns, np.cumsum([len(t.source) for t in tallies])[:-1])
    return (
        _table(roles, nodes, [(t.influence, t.effect, t.kept) for t in tallies]),
        _table(
            EdgeKeys(roles, pairs),
            edges,
            [(t.edge_influence, t.edge_effect, np.ones(len(t.source))) for t in tallies],
        ),
    )


def _table(keys: Sequence[Any], columns: list[np.ndarray], values: list[tuple[np.ndarray, ...]]) -> Table:
    """Each example's columns, and its influence, effect and `kept` there, as one table."""
    row, column = np.repeat(np.arange(len(columns)), [len(own) for own in columns]), np.concatenate(columns)
    influence, effect, kept = (np.concatenate(parts).astype(float) for parts in zip(*values, strict=True))

    def sparse(numbers: Float[np.ndarray, " all"]) -> csr_array:
        return csr_array((numbers, (row, column)), shape=(len(columns), len(keys)))

    return Table(keys, sparse(influence), sparse(effect), sparse(np.ones(len(row))), sparse(kept))
