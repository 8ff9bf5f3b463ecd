"""The record of an attribution graph: nodes, weighted edges, and what makes every row add up. No model in sight.

On disk: `GRAPH.json` for the nodes and scores, beside it `GRAPH.safetensors` for the edges. Nothing is unpickled.

Axes: N nodes, E edges.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosslayer.attribution.influence import Edges, Influence, influence, sums
from crosslayer.attribution.node import INPUTS, Node
from crosslayer.attribution.pruning import Selection, select
from crosslayer.attribution.scores import Scores, completeness_score, replacement_score, row_gaps
from crosslayer.errors import UserError
from crosslayer.files import read_json, read_tensors, write_json, write_tensors

SCHEMA = 1
EDGES = ("target", "source", "weight", "preactivation", "target_weight")


@dataclass(frozen=True)
class Picture:
    """The prompt's image, as a figure shows it."""

    uri: str
    """A data URI, so that a graph needs no other file."""
    width: int
    height: int
    """In pixels: patches' boxes count in them."""
    rows: int
    columns: int
    """Of the grid of patches, or of the cells that they are pooled to."""


@dataclass(frozen=True, eq=False, kw_only=True)
class AttributionGraph:
    """One prompt's attribution graph: who contributes what to every feature and target.

    Every row closes: the weights of the edges into a node add up to its pre-activation.

    Raises:
        UserError: for edges that name no node, appear twice, or do not run forward; for nodes of one id.
    """

    prompt: str
    tokens: tuple[str, ...]
    """The text of each position."""
    model: str
    run: str
    n_layers: int
    """Decoder layers of the model."""
    nodes: tuple[Node, ...]
    target: Int[Tensor, " E"]
    """Index into `nodes` of what an edge runs to: a feature or a target."""
    source: Int[Tensor, " E"]
    """Index into `nodes` of what it comes from."""
    weight: Float[Tensor, " E"]
    """What the source contributes to the target's pre-activation or logit, signed."""
    preactivation: Float[Tensor, " N"]
    """What the edges into a node must add up to; NaN at a node whose row was not computed or that has none."""
    target_weight: Float[Tensor, " N"]
    """What a target counts in influence: its probability for a token; 0 elsewhere; at most 1 in all."""
    left_out: str = ""
    """What a budget left out, in words; the share of influence that it carries is among the scores."""
    picture: Picture | None = None

    def __post_init__(self):
        self._check_nodes()
        self._check_edges()
        self._check_target_weights()

    def _check_nodes(self) -> None:
        n = len(self.nodes)
        if len(self.index) < n:
            twice = next(node.id for i, node in enumerate(self.nodes) if self.index[node.id] != i)
            raise UserError(f"node {twice} is in the graph twice")
        for name in ("preactivation", "target_weight"):
            if len(getattr(self, name)) != n:
                raise UserError(f"{name} has {len(getattr(self, name))} values; {n}, one a node, are wanted")
        if stray := [node.id for node in self.nodes if node.position is not None and node.position >= len(self.tokens)]:
            raise UserError(f"node {stray[0]} lies beyond the prompt's {len(self.tokens)} tokens")
        if beyond := [node.id for node in self.nodes if (node.layer or 0) >= self.n_layers]:
            raise UserError(f"node {beyond[0]} lies beyond the model's {self.n_layers} layers")

    def _check_edges(self) -> None:
        n, (target, source) = len(self.nodes), (self.target.numpy(force=True), self.source.numpy(force=True))
        for name, ends in (("target", target), ("source", source)):
            if len(ends) and not (ends.min() >= 0 and ends.max() < n):
                raise UserError(
                    f"an edge's {name} is {ends.min()} or {ends.max()}; a graph of {n} nodes has no such node"
                )
        if (back := self.rank[source] >= self.rank[target]).any():
            i = int(back.argmax())
            ends = f"{self.nodes[source[i]].id} to {self.nodes[target[i]].id}"
            raise UserError(f"the edge from {ends} does not run forward, and edges must, from inputs through layers")
        if (odd := ~self.of_kind("feature", "target")[target]).any():
            raise UserError(f"an edge runs to {self.nodes[target[odd][0]].id}; only features and targets have rows")
        pairs = target * n
        pairs += source
        pairs.sort()
        if (pairs[1:] == pairs[:-1]).any():
            raise UserError("two edges run between the same nodes; add them up")
        if not torch.isfinite(self.weight).all():
            raise UserError("an edge's weight is not finite")

    def _check_target_weights(self) -> None:
        weights = self.target_weight.double()
        if not (weights >= 0).all() or weights.sum() > 1 + 1e-4:
            raise UserError(
                f"target weights reach from {weights.min()} and add up to {weights.sum()}; 0 ... 1 is wanted"
            )
        if (weights.numpy(force=True)[~self.of_kind("target")] != 0).any():
            raise UserError("a node other than a target has a target weight")

    @cached_property
    def index(self) -> dict[str, int]:
        """Where each id is in `nodes`."""
        return {node.id: i for i, node in enumerate(self.nodes)}

    @cached_property
    def rank(self) -> Int[np.ndarray, " N"]:
        """Topological order of the nodes."""
        return np.array([node.rank(self.n_layers) for node in self.nodes], np.int64)

    @cached_property
    def captions(self) -> list[str]:
        """What a person calls each node."""
        patches = {node.position: node.label for node in self.nodes if node.kind == "patch"}
        places = [
            f"{patches.get(p) or json.dumps(token, ensure_ascii=False)} ({p})" for p, token in enumerate(self.tokens)
        ]
        return [node.caption(places) for node in self.nodes]

    def of_kind(self, *kinds: str) -> Bool[np.ndarray, " N"]:
        """Which nodes are of these kinds."""
        return np.array([node.kind in kinds for node in self.nodes], bool)

    @cached_property
    def edges(self) -> Edges:
        """All edges, in float64."""
        weight = self.weight.double().numpy(force=True)
        return Edges(self.rank, self.target.numpy(force=True), self.source.numpy(force=True), weight)

    @cached_property
    def causes(self) -> Edges:
        """The same with weight 0 at the edges from biases, which are no cause of what this prompt does."""
        weight = np.where(self.of_kind("bias")[self.edges.source], 0.0, self.edges.weight)
        return Edges(self.rank, self.edges.target, self.edges.source, weight)

    @cached_property
    def influence(self) -> Influence:
        """Influence of nodes and edges on the targets; biases have none."""
        return influence(self.causes, self._target_weight)

    @cached_property
    def scores(self) -> Scores:
        """How much features explain, how well rows close, and what was left out."""
        errors, preactivation = self.of_kind("error"), self.preactivation.double().numpy(force=True)
        rowless = self.of_kind("feature") & np.isnan(preactivation)
        total = self._target_weight.sum()
        return Scores(
            replacement_score(self.influence.node, self.of_kind(*INPUTS), errors),
            completeness_score(self.causes, self._target_weight, errors),
            float(row_gaps(self.edges, preactivation).max(initial=0.0)),
            float(self.influence.node[rowless].sum() / total) if total > 0 else float("nan"),
        )

    @property
    def _target_weight(self) -> Float[np.ndarray, " N"]:
        return self.target_weight.double().numpy(force=True)

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> "AttributionGraph":
        """The graph of the most influential features and edges; inputs, biases and targets stay.

        Args:
            node_threshold: the share of all nodes' influence that the nodes kept carry.
            edge_threshold: the share of influence that the edges kept among these carry.

        Raises:
            UserError: for a threshold outside 0 ... 1.
        """
        kept = self.selection(node_threshold, edge_threshold)
        return self.keep(kept.nodes, kept.edges)

    def selection(self, node_threshold: float, edge_threshold: float) -> Selection:
        """The nodes and edges that `prune` keeps; the same arguments and errors."""
        fixed, features = self.of_kind(*INPUTS, "bias", "target"), self.of_kind("feature")
        return select(self.causes, self._target_weight, fixed, features, node_threshold, edge_threshold)

    def keep(self, nodes: Bool[np.ndarray, " N"], edges: Bool[np.ndarray, " E"]) -> "AttributionGraph":
        """The graph of some features and edges. What is dropped joins error nodes, so that every row still closes.

        A dropped edge from a feature, and all edges from a dropped one, join the error of its layer and position; a
        dropped edge from an input joins the error of its position that has no layer. Nodes other than features stay,
        and so do edges from errors and biases.

        Args:
            nodes: which features to keep.
            edges: which edges to keep.
        """
        nodes = nodes | ~self.of_kind("feature")
        stays = (edges & nodes[self.edges.source]) | self.of_kind("error", "bias")[self.edges.source]
        everybody, heir = self._heirs()
        source = np.where(stays, self.edges.source, heir[self.edges.source])
        row = nodes[self.edges.target]
        pairs, where = np.unique(self.edges.target[row] * len(everybody) + source[row], return_inverse=True)
        weight = sums(where, self.edges.weight[row], len(pairs))
        target, source = np.divmod(pairs, len(everybody))
        used = np.isin(np.arange(len(everybody)), source)
        used[: len(nodes)] |= nodes & ~self.of_kind("error")
        return self._reduced(everybody, used, target, source, weight)

    def _heirs(self) -> tuple[list[Node], Int[np.ndarray, " N"]]:
        """All nodes with the errors that may be needed, and which error takes over from each feature and input."""
        everybody, index = list(self.nodes), dict(self.index)
        heir = np.arange(len(self.nodes))
        for i, node in enumerate(self.nodes):
            if node.kind in (*INPUTS, "feature"):
                layer = node.layer if node.kind == "feature" else None
                error = Node(kind="error", layer=layer, position=node.position, pooled=node.pooled)
                if error.id not in index:
                    index[error.id] = len(everybody)
                    everybody.append(error)
                heir[i] = index[error.id]
        return everybody, heir

    def _reduced(
        self,
        everybody: list[Node],
        used: Bool[np.ndarray, " all"],
        target: Int[np.ndarray, " edges"],
        source: Int[np.ndarray, " edges"],
        weight: Float[np.ndarray, " edges"],
    ) -> "AttributionGraph":
        new = torch.from_numpy(np.cumsum(used) - 1)
        old = torch.from_numpy(np.flatnonzero(used))
        preactivation = torch.full((len(everybody),), float("nan"), dtype=self.preactivation.dtype)
        preactivation[: len(self.nodes)] = self.preactivation.cpu()
        target_weight = torch.zeros(len(everybody), dtype=self.target_weight.dtype)
        target_weight[: len(self.nodes)] = self.target_weight.cpu()
        return AttributionGraph(
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name not in (*EDGES, "nodes")},
            nodes=tuple(everybody[i] for i in old.tolist()),
            target=new[target],
            source=new[source],
            weight=torch.from_numpy(weight).to(self.weight.dtype),
            preactivation=preactivation[old],
            target_weight=target_weight[old],
        )

    def save(self, path: str | Path) -> None:
        """Write `GRAPH.json`, and `GRAPH.safetensors` beside it; each atomically, the edges first.

        Raises:
            UserError: when the name does not end in .json, or the file system refuses.
        """
        path = _checked(path)
        tensors = {name: getattr(self, name) for name in EDGES}
        write_tensors(edges_path(path), tensors)
        nodes = [
            {"id": node.id, **asdict(node), "influence": float(value)}
            for node, value in zip(self.nodes, self.influence.node, strict=True)
        ]
        record = {
            "schema": SCHEMA,
            **{name: getattr(self, name) for name in ("prompt", "tokens", "model", "run", "n_layers")},
            "targets": [node.id for node in self.nodes if node.kind == "target"],
            "scores": {k: None if isnan(v) else v for k, v in asdict(self.scores).items()} | {"note": self.left_out},
            "picture": asdict(self.picture) if self.picture else None,
            "edges_sha256": _digest(tensors),
            "nodes": nodes,
        }
        write_json(path, record)

    @classmethod
    def load(cls, path: str | Path) -> "AttributionGraph":
        """Read a graph that `save` wrote.

        Raises:
            UserError: when a file is missing, damaged, of another schema, or its edges are another graph's.
        """
        path = _checked(path)
        record = read_json(path)
        found = record.get("schema") if isinstance(record, dict) else None
        if found != SCHEMA:
            raise UserError(f"{path}: graph schema {found}, this crosslayer reads {SCHEMA}; make the graph again")
        edges = edges_path(path)
        tensors, _ = read_tensors(edges)
        if record.get("edges_sha256") != _digest(tensors):
            raise UserError(f"{edges}: these are not the edges of {path.name}; make the graph again")
        try:
            parts: dict[str, Any] = _texts(record) | tensors
            return cls(**parts, nodes=tuple(map(_node, record["nodes"])))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: damaged ({error}); make the graph again") from None


def edges_path(path: Path) -> Path:
    """GRAPH.safetensors, beside GRAPH.json."""
    return path.with_suffix(".safetensors")


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".json":
        raise UserError(f"{path}: a graph's file name ends in .json; its edges go beside it, in .safetensors")
    return path


def _texts(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{name: record[name] for name in ("prompt", "model", "run", "n_layers")},
        "tokens": tuple(record["tokens"]),
        "left_out": record["scores"]["note"],
        "picture": Picture(**record["picture"]) if record["picture"] else None,
    }


def _node(record: Mapping[str, Any]) -> Node:
    known: dict[str, Any] = {f.name: record[f.name] for f in fields(Node) if f.name != "pooled"}
    pooled = tuple(record.get("pooled", ()))  # which older graphs lack
    return Node(**{**known, "box": known["box"] and tuple(known["box"])}, pooled=pooled)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy(force=True).tobytes())
    return digest.hexdigest()
