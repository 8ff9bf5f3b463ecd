"""From a prompt to its attribution graph: trace, split, compute rows, put them together."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from crosslayer.attribution.columns import Columns
from crosslayer.attribution.forecast import check_memory, forecast
from crosslayer.attribution.graph import AttributionGraph, Picture
from crosslayer.attribution.influence import Edges, influence
from crosslayer.attribution.inputs import Inputs, added, inputs_of
from crosslayer.attribution.node import Node
from crosslayer.attribution.parts import Parts, split
from crosslayer.attribution.rising import Rising, middle_of
from crosslayer.attribution.rows import Rows, feature_rows, rows_of
from crosslayer.attribution.targets import Target, checked, feature_target, is_feature, named, salient, weighted
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.data.examples import Example, open_image
from crosslayer.errors import UserError
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch, TooLong, prepare
from crosslayer.replacement.local import LocalReplacement, trace
from crosslayer.replacement.model import ReplacementModel

BATCH_BYTES = 256 * 2**20
"""What the gradients of one batch of rows may take."""
ROUNDS = 8
"""Times that the most influential features are chosen anew when not all get a row."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many features get a row of their own: the most influential first, as far as that is known by then."""

    features: int | None = None
    """At most so many; None for all."""
    seconds: float | None = None
    """No further batch after this time; None for no limit."""
    positions: int | None = None
    """Only at so many positions, the most influential ones; pooled ones count as one. None for all."""

    def __post_init__(self):
        for name in ("features", "seconds", "positions"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"the budget of {name} is {value}; choose more than 0, or leave it out for all")


def attribute(
    model: LoadedModel,
    coder: CrossLayerTranscoder,
    prompt: str,
    image: Image.Image | Path | str | None = None,
    *,
    response: str | None = None,
    history: tuple[tuple[str, str], ...] = (),
    token: int | Sequence[int] = 0,
    form: Literal["chat", "text"] = "chat",
    targets: str | Target | Sequence[str | Target] = (),
    probability: float = 0.95,
    at_most: int = 10,
    budget: Budget | None = None,
    pool_patches: int | None = None,
    run: str = "",
) -> AttributionGraph:
    """The attribution graph of one prompt: who contributes what to the next token.

    Where tokens alone are explained, it ends at the last of them: nothing that comes later has a part in it.

    Args:
        model: the language model.
        coder: its transcoder.
        prompt: `<image>` marks where the image goes, first by default.
        image: a picture or the path of one.
        response: the answer, where it is known, so that a token in its middle can be explained.
        history: earlier turns of the conversation: what was asked and what was answered.
        token: which token of the answer is explained, from 0 on, or which ones together.
        form: `chat` goes through the model's chat template, where it has one; `text` is taken as it is.
        targets: one or several tokens, weighted sums of some (`"a" - 0.5 "b"`), features (`feature 5/123 @ 17`), or
            directions; the likeliest tokens when left out.
        probability: of the likeliest tokens together.
        at_most: likeliest tokens at most.
        budget: how many features get a row; all by default.
        pool_patches: image patches are taken together in a grid of so many cells a side; each alone by default.
        run: where the transcoder comes from, for the record.

    Raises:
        UserError: for a prompt, image, target or position that does not fit, with what would; for a graph that memory
            does not suffice for.
    """
    ReplacementModel(model, coder)  # refuses one that was trained on a model of another shape
    picture = Path(image) if isinstance(image, str) else image
    picture = open_image(picture) if isinstance(picture, Path) else picture
    example = Example(shorten(prompt, 40, placeholder=" ..."), prompt, response, picture, history, form)
    batch = _prepared(model, example)
    if batch.tokens.shape[1] < 2:
        raise UserError("the prompt is empty: nothing comes after the token that begins it, so nothing can be traced")
    targets = [targets] if isinstance(targets, str | Target) else targets
    places = [_place(response, number, batch) for number in ([token] if isinstance(token, int) else token)]
    tokenizer = getattr(model.processor, "tokenizer", model.processor)
    if not places:
        raise UserError("no token of the answer is named; give at least one, or leave token out")
    if not any(isinstance(asked, Target) or is_feature(asked) for asked in targets):
        batch = batch.until(max(places) + 1)
    inputs = inputs_of(batch, tokenizer, picture, pool_patches)
    of_logits = [made.position for made in targets if isinstance(made, Target) and made.layer is None]
    local = trace(model, coder, batch, min(at % batch.tokens.shape[1] for at in (*places, *of_logits)))
    first, limits = batch.position[0] == 0, budget or Budget()
    most = (limits.features, limits.positions)
    check_memory(forecast(local, coder, first, inputs.cell, BATCH_BYTES, *most), local)
    local.rest()

    def wanted(parts: Parts) -> list[Target]:
        if targets:
            return [made for asked in targets for made in _made(asked, local, parts, coder, tokenizer, places)]
        likely = {"probability": probability, "at_most": at_most}
        return [made for at in places for made in salient(local.logits_at(at).detach(), tokenizer, at, **likely)]

    grown = _grown(local, split(local, coder, first), inputs, wanted, limits)
    return grown.graph(prompt, batch, tokenizer, model.id, run)


def _prepared(model: LoadedModel, example: Example) -> Batch:
    try:
        return prepare(model.model, model.processor, [example])
    except TooLong as error:
        if example.image is None:
            raise
        raise UserError(f"{error} (--pool-patches leaves it as long: it takes nodes together, no tokens)") from None


def _place(response: str | None, token: int, batch: Batch) -> int:
    """The position that a token of the answer is predicted at."""
    n = 1 if response is None else int(batch.response.sum())
    if not 0 <= token < n:
        raise UserError(f"token is {token}, but the answer has {n}, its end mark included; choose 0 to {n - 1}")
    return batch.tokens.shape[1] - 1 - (0 if response is None else n - token)


def _made(
    asked: str | Target,
    local: LocalReplacement,
    parts: Parts,
    coder: CrossLayerTranscoder,
    tokenizer: Any,
    places: Sequence[int],
) -> list[Target]:
    """What a target that was asked for is: tokens are explained at each of the places."""
    if isinstance(asked, Target):
        return [checked(asked, local)]
    if is_feature(asked):
        return [feature_target(asked, parts, coder, local.stream.shape[1])]
    return [named(asked, local.logits_at(place).detach(), tokenizer, place) for place in places]


@dataclass(frozen=True)
class _Grown:
    """What there is once all rows are, when nothing else of the prompt is needed any more."""

    n_layers: int
    nodes: tuple[Node, ...]
    edges: list[tuple[Tensor, Tensor, Tensor]]
    preactivation: Float[Tensor, " N"]
    target_weight: Float[Tensor, " N"]
    left_out: str
    picture: Picture | None

    def graph(self, prompt: str, batch: Batch, tokenizer: Any, model: str, run: str) -> AttributionGraph:
        """The record, which the edges then live on in alone."""
        target, source, weight = _joined(self.edges)
        self.edges.clear()
        return AttributionGraph(
            prompt=prompt,
            tokens=tuple(tokenizer.decode([id]) for id in batch.tokens[0].tolist()),
            model=model,
            run=run,
            n_layers=self.n_layers,
            nodes=self.nodes,
            target=target,
            source=source,
            weight=weight.float(),
            preactivation=self.preactivation,
            target_weight=self.target_weight,
            left_out=self.left_out,
            picture=self.picture,
        )


def _grown(
    local: LocalReplacement,
    parts: Parts,
    inputs: Inputs,
    wanted: Callable[[Parts], list[Target]],
    budget: Budget,
) -> _Grown:
    """All rows that a budget allows; the parts, and what rose and fell, are let go of."""
    if not parts.n_features:
        raise UserError("no feature is active on this prompt, so there is nothing to trace; is the run of this model?")
    growing = _Growing(local, parts, inputs, wanted(parts))
    if not growing.limited(budget):
        growing.rise()
    growing.add_targets()
    growing.add_features(budget)
    return growing.grown()


class _Growing:
    """A graph that rows are added to."""

    def __init__(self, local: LocalReplacement, parts: Parts, inputs: Inputs, targets: list[Target]):
        L = local.n_layers
        top = max(L if target.layer is None else target.layer for target in targets)
        self.local, self.parts, self.inputs, self.targets = local, parts, inputs, targets
        self.nodes: list[Node] = []
        cell, entering = inputs.cell, inputs.nodes
        self.at = Columns(
            self._place(entering)[cell],
            {layer: self._place([added(layer, node) for node in entering])[cell] for layer in local.between},
            self._place([Node(kind="bias", layer=layer if layer < L else None) for layer in range(L + 1)]),
            self._place_features(parts.below(top)),
            torch.stack([self._place([_error(layer, node) for node in entering])[cell] for layer in range(L)]),
        )
        self.at_targets = self._place([target.node for target in targets])
        self.position = torch.tensor([-1 if node.position is None else node.position for node in self.nodes])
        self.preactivation = torch.full((len(self.nodes),), float("nan"))
        parts_of_it = (parts.active.preactivations + parts.active.bias)[: len(self.at.features)].cpu()
        self.whole = parts_of_it.new_zeros(len(self.nodes)).index_add_(0, self.at.features, parts_of_it)
        self.target_weight = torch.zeros(len(self.nodes))
        self.target_weight[self.at_targets] = torch.tensor(weighted(targets))
        self.edges: list[tuple[Tensor, Tensor, Tensor]] = []
        self.risen: Rising | None = None

    def _place(self, nodes: Sequence[Node]) -> Int[Tensor, " n"]:
        """Add nodes; where they are."""
        self.nodes += nodes
        return torch.arange(len(self.nodes) - len(nodes), len(self.nodes))

    def _place_features(self, n: int) -> Int[Tensor, " n"]:
        """Add a node for each of the first n features and its cell; where that of each is."""
        active = self.parts.active
        layers, positions, features = (part[:n].cpu() for part in (active.layers, active.positions, active.features))
        keys, which = torch.stack([layers, self.inputs.cell[positions], features], 1).unique(dim=0, return_inverse=True)
        activations = torch.zeros(len(keys)).index_add_(0, which, active.activations[:n].float().cpu())
        nodes = []
        for (layer, cell, feature), activation in zip(keys.tolist(), activations.tolist(), strict=True):
            at = {"position": self.inputs.nodes[cell].position, "pooled": self.inputs.nodes[cell].pooled}
            nodes.append(Node(kind="feature", layer=layer, feature=feature, activation=activation, **at))
        return self._place(nodes)[which]

    def rise(self) -> None:
        """Add the rows of the lower layers, so that others need to be carried down to one in the middle alone."""
        last = self.local.n_layers - 1
        highest = min(last if target.layer is None else target.layer for target in self.targets)
        middle = middle_of(self.local, self.parts, self.at, highest, BATCH_BYTES)
        if middle:
            self.risen = Rising(self.local, self.parts, self.at, middle, len(self.nodes), BATCH_BYTES)
            for read in self.risen.rows():
                self._keep(read.targets, read.edges.cpu(), read.sources)
                self.preactivation[read.targets] = self.whole[read.targets].float()
            for layer in range(middle):
                del self.parts.written[layer]
            self.local.rest()

    @property
    def lowest(self) -> int:
        """The layer that rows are carried down to."""
        return 0 if self.risen is None else self.risen.middle

    def add_targets(self) -> None:
        """Add the rows of the targets, those of one place together."""
        at = [(target.layer, target.position) for target in self.targets]
        for layer, position in dict.fromkeys(at):
            mine = [k for k, place in enumerate(at) if place == (layer, position)]
            self._add_targets(layer, position, mine)

    def _add_targets(self, layer: int | None, position: int, mine: list[int]) -> None:
        n, vectors = len(mine), torch.stack([self.targets[k].vector for k in mine])
        if layer is None:
            sources, output = self.local.into_logits(position, vectors), self.local.logits_at(position)
        else:
            sources = self.local.into_reads(torch.full((n,), layer), torch.full((n,), position), vectors)
            output = self.local.reads[layer][0, position]
        bias = torch.tensor([self.targets[k].bias for k in mine])
        rows = rows_of(self.local, self.parts, sources, self.lowest)
        rows.biases[:, self.local.n_layers if layer is None else layer] += bias.to(rows.biases)
        value = vectors.to(output) @ output + bias.to(output)
        self._add(rows, self.at_targets[mine], value)

    def limited(self, budget: Budget) -> bool:
        """Whether not all features get a row."""
        features = self.at.features.unique()
        limits = ((budget.features, len(features)), (budget.positions, len(self.position[features].unique())))
        return budget.seconds is not None or any(limit is not None and limit < n for limit, n in limits)

    def add_features(self, budget: Budget) -> None:
        """Add the rows of features, the most influential first where not all get one."""
        features = self.at.features.unique()
        started, done, left = time.monotonic(), 0, features[self.preactivation[features].isnan()]
        wanted, positions = min(budget.features or len(left), len(left)), self.position[left].unique()
        n_open = min(budget.positions or len(positions), len(positions))
        limited = self.limited(budget)
        rounds, opened = (ROUNDS, positions[:0]) if limited else (1, positions)
        with tqdm(total=wanted, unit="row", desc="graph", disable=None, leave=False) as bar:
            while done < wanted and (budget.seconds is None or time.monotonic() - started < budget.seconds):
                influence = self._influence() if limited else self.target_weight
                if len(opened) < n_open:
                    opened = self._open(opened, left, influence, min(-(-n_open // rounds), n_open - len(opened)))
                inside = left[torch.isin(self.position[left], opened)]
                chosen = _largest(inside, influence[inside], min(-(-wanted // rounds), wanted - done))
                if not len(chosen):
                    break
                self._add_rows_of(chosen)
                left = left[~torch.isin(left, chosen)]
                done += len(chosen)
                bar.update(len(chosen))

    def _open(self, opened: Tensor, left: Tensor, influence: Tensor, n: int) -> Tensor:
        """The positions whose features get rows, and n more: those whose features left carry most influence."""
        at = self.position[left]
        total = torch.zeros(int(at.max()) + 1).index_add_(0, at, influence[left].float())
        closed = at[~torch.isin(at, opened)].unique()
        return torch.cat([opened, _largest(closed, total[closed], n)])

    def _influence(self) -> Float[Tensor, " N"]:
        """Of all nodes, by the rows that are known so far."""
        target, source, weight = _joined(self.edges)
        rank = torch.tensor([node.rank(self.local.n_layers) for node in self.nodes])
        edges = Edges(rank.numpy(), target.numpy(), source.numpy(), weight.double().numpy())
        return torch.from_numpy(influence(edges, self.target_weight.double().numpy()).node)

    def _add_rows_of(self, chosen: Int[Tensor, " C"]) -> None:
        mine = torch.isin(self.at.features, chosen).nonzero().squeeze(1)
        nodes, row = self.at.features[mine].unique(return_inverse=True)
        for some, rows in feature_rows(self.local, self.parts, mine, BATCH_BYTES, row, self.lowest):
            self._add(rows, nodes[some], self.whole[nodes[some]])
            del rows  # before the next ones are computed

    def _add(self, rows: Rows, places: Tensor, preactivations: Tensor) -> None:
        """Add the rows of the nodes at `places`: what comes from one node summed up, exact zeros left out."""
        by_node = self.at.by_node(rows, len(self.nodes))
        if self.risen is not None:
            self.risen.add_met(rows.entry, by_node)
        self._keep(places, by_node)
        self.preactivation[places] = preactivations.float().cpu()

    def _keep(self, targets: Int[Tensor, " R"], weights: Float[Tensor, "R S"], sources: Tensor | None = None) -> None:
        """Keep edges that are not exactly zero; from all nodes, or from some."""
        kept = weights != 0
        columns = torch.arange(weights.shape[1]) if sources is None else sources
        source = columns.int().expand_as(kept).masked_select(kept)
        self.edges.append((targets.int().repeat_interleave(kept.sum(1)), source, weights.masked_select(kept)))

    def grown(self) -> _Grown:
        """What has grown."""
        found = (self.edges, self.preactivation, self.target_weight, self._left_out(), self.inputs.picture)
        return _Grown(self.local.n_layers, tuple(self.nodes), *found)

    def _left_out(self) -> str:
        """What got no row, in words; nothing when all did."""
        features = self.at.features.unique()
        have = self.preactivation[features].isfinite()
        if have.all():
            return ""
        n_all, n_have = (len(self.position[some].unique()) for some in (features, features[have]))
        where = f", those at {n_all - n_have} of {n_all} positions among them" if n_have < n_all else ""
        return f"{int((~have).sum()):,} of {len(features):,} active features have no row of their own{where}"


def _joined(
    edges: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> tuple[Int[Tensor, " E"], Int[Tensor, " E"], Float[Tensor, " E"]]:
    """Targets, sources and weights of all edges."""
    target, source, weight = zip(*edges, strict=True)
    return torch.cat(target).long(), torch.cat(source).long(), torch.cat(weight)


def _error(layer: int, node: Node) -> Node:
    return Node(kind="error", layer=layer, position=node.position, pooled=node.pooled)


def _largest(candidates: Int[Tensor, " C"], values: Float[Tensor, " C"], n: int) -> Int[Tensor, " n"]:
    return candidates if n >= len(candidates) else candidates[values.topk(n).indices]
