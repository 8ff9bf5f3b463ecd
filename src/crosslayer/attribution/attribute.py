"""From a prompt to its attribution graph: trace, split, compute rows, put them together."""

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from crosslayer.attribution.graph import AttributionGraph, Picture
from crosslayer.attribution.influence import Edges, influence
from crosslayer.attribution.node import Box, Node
from crosslayer.attribution.parts import Parts, split
from crosslayer.attribution.rows import Rows, feature_rows, rows_of
from crosslayer.attribution.targets import Target, named, salient, weighted
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.data.examples import Example, open_image
from crosslayer.errors import UserError
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch, prepare
from crosslayer.replacement.local import LocalReplacement, trace
from crosslayer.replacement.model import ReplacementModel

BATCH_BYTES = 96 * 2**20
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

    def __post_init__(self):
        for name in ("features", "seconds"):
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
    token: int = 0,
    form: Literal["chat", "text"] = "chat",
    targets: Sequence[str] = (),
    probability: float = 0.95,
    at_most: int = 10,
    budget: Budget | None = None,
    run: str = "",
) -> AttributionGraph:
    """The attribution graph of one prompt: who contributes what to the next token.

    Args:
        model: the language model.
        coder: its transcoder.
        prompt: `<image>` marks where the image goes, first by default.
        image: a picture or the path of one.
        response: the answer, where it is known, so that a token in its middle can be explained.
        token: which token of the answer is explained, from 0 on.
        form: `chat` goes through the model's chat template, where it has one; `text` is taken as it is.
        targets: tokens, `"a" - "b"` for a difference; the likeliest tokens when left out.
        probability: of the likeliest tokens together.
        at_most: likeliest tokens at most.
        budget: how many features get a row; all by default.
        run: where the transcoder comes from, for the record.

    Raises:
        UserError: for a prompt, image, target or position that does not fit, with what would.
    """
    ReplacementModel(model, coder)  # refuses one that was trained on a model of another shape
    picture = Path(image) if isinstance(image, str) else image
    picture = open_image(picture) if isinstance(picture, Path) else picture
    batch = prepare(model.model, model.processor, [Example("prompt", prompt, response, image=picture, form=form)])
    place = _place(response, token, batch)
    local = trace(model, coder, batch)
    tokenizer = getattr(model.processor, "tokenizer", model.processor)
    logits = local.logits[0, place].detach()
    chosen = [named(text, logits, tokenizer) for text in targets]
    chosen = chosen or salient(logits, tokenizer, probability=probability, at_most=at_most)
    parts = split(local, coder, batch.position[0] == 0)
    if not parts.n_features:
        raise UserError("no feature is active on this prompt, so there is nothing to trace; is the run of this model?")
    growing = _Growing(local, parts, _inputs(batch, tokenizer, picture), chosen, place)
    growing.add_targets()
    growing.add_features(budget or Budget())
    return growing.graph(prompt, batch, tokenizer, model.id, run, picture)


def _place(response: str | None, token: int, batch: Batch) -> int:
    """The position that a token of the answer is predicted at."""
    n = 1 if response is None else int(batch.response.sum())
    if not 0 <= token < n:
        raise UserError(f"token is {token}, but the answer has {n}, its end mark included; choose 0 to {n - 1}")
    return batch.tokens.shape[1] - 1 - (0 if response is None else n - token)


def _inputs(batch: Batch, tokenizer: Any, picture: Image.Image | None) -> list[Node]:
    """A node for every position: a token, or an image patch with its box."""
    ids, image = batch.tokens[0].tolist(), batch.image[0].tolist()
    boxes = iter(_boxes(picture, sum(image)))
    return [
        Node(kind="patch", position=p, label=f"patch {p}", vocab=id, box=next(boxes))
        if seen
        else Node(kind="token", position=p, label=tokenizer.decode([id]), vocab=id)
        for p, (id, seen) in enumerate(zip(ids, image, strict=True))
    ]


def _boxes(picture: Image.Image | None, n: int) -> list[Box | None]:
    """Where each patch lies in the picture, row by row; unknown where patches are no square grid."""
    side = isqrt(n)
    if picture is None or side * side != n:
        return [None] * n
    width, height = picture.size
    return [
        (width * c // side, height * r // side, width * (c + 1) // side, height * (r + 1) // side)
        for r in range(side)
        for c in range(side)
    ]


class _Growing:
    """A graph that rows are added to."""

    def __init__(self, local: LocalReplacement, parts: Parts, inputs: list[Node], targets: list[Target], place: int):
        self.local, self.parts, self.targets, self.place = local, parts, targets, place
        self.nodes = list(inputs)
        P, L = len(inputs), local.n_layers
        self.at_between = {layer: self._place([_added(layer, node) for node in inputs]) for layer in local.between}
        self.at_biases = self._place([Node(kind="bias", layer=layer if layer < L else None) for layer in range(L + 1)])
        active = parts.active
        columns = (t.tolist() for t in (active.layers, active.positions, active.features, active.activations))
        self.at_features = self._place(
            [
                Node(kind="feature", layer=layer, position=p, feature=f, activation=a)
                for layer, p, f, a in zip(*columns, strict=True)
            ]
        )
        self.at_errors = self._place(
            [Node(kind="error", layer=layer, position=p) for layer in range(L) for p in range(P)]
        )
        self.at_targets = self._place(
            [
                Node(kind="target", position=place, label=t.label, probability=t.probability, vocab=t.vocab)
                for t in targets
            ]
        )
        self.preactivation = torch.full((len(self.nodes),), float("nan"))
        self.target_weight = torch.zeros(len(self.nodes))
        self.target_weight[self.at_targets] = torch.tensor(weighted(targets))
        self.edges: list[tuple[Tensor, Tensor, Tensor]] = []

    def _place(self, nodes: list[Node]) -> Int[Tensor, " n"]:
        """Add nodes; where they are."""
        self.nodes += nodes
        return torch.arange(len(self.nodes) - len(nodes), len(self.nodes))

    def add_targets(self) -> None:
        """Add the rows of the targets."""
        vectors = torch.stack([target.vector for target in self.targets])
        rows = rows_of(self.local, self.parts, self.local.into_logits(self.place, vectors))
        self._add(rows, self.at_targets, vectors.to(self.local.logits) @ self.local.logits[0, self.place].detach())

    def add_features(self, budget: Budget) -> None:
        """Add the rows of features, the most influential first where not all get one."""
        started, total, done = time.monotonic(), self.parts.n_features, 0
        wanted = min(budget.features or total, total)
        step = wanted if wanted == total and budget.seconds is None else -(-wanted // ROUNDS)
        left = self.at_features
        with tqdm(total=wanted, unit="row", desc="graph", disable=None, leave=False) as bar:
            while done < wanted and (budget.seconds is None or time.monotonic() - started < budget.seconds):
                chosen = self._most_influential(left, min(step, wanted - done))
                self._add_rows_of(chosen)
                left = left[~torch.isin(left, chosen)]
                done += len(chosen)
                bar.update(len(chosen))

    def _add_rows_of(self, chosen: Int[Tensor, " C"]) -> None:
        active, mine = self.parts.active, torch.isin(self.at_features, chosen).nonzero().squeeze(1)
        for some, rows in feature_rows(self.local, self.parts, mine, BATCH_BYTES):
            self._add(rows, self.at_features[some], active.preactivations[some] + active.bias[some])

    def _most_influential(self, candidates: Int[Tensor, " C"], n: int) -> Int[Tensor, " n"]:
        if n >= len(candidates):
            return candidates
        target, source, weight = (torch.cat(part) for part in zip(*self.edges, strict=True))
        rank = torch.tensor([node.rank(self.local.n_layers) for node in self.nodes])
        edges = Edges(rank.numpy(), target.numpy(), source.numpy(), weight.double().numpy())
        found = torch.from_numpy(influence(edges, self.target_weight.double().numpy()).node)
        return candidates[found[candidates].topk(n).indices]

    def _add(self, rows: Rows, places: Tensor, preactivations: Tensor) -> None:
        """Add the rows of the nodes at `places`, exact zeros left out."""
        columns = [torch.arange(rows.stream.shape[1]), *self.at_between.values(), self.at_biases]
        columns += [self.at_features, self.at_errors]
        values = [rows.stream, *rows.between.values(), rows.biases, rows.features, rows.errors.flatten(1)]
        all_columns, all_values = torch.cat(columns), torch.cat(values, 1).cpu()
        row, column = all_values.nonzero(as_tuple=True)
        self.edges.append((places[row], all_columns[column], all_values[row, column]))
        self.preactivation[places] = preactivations.detach().float().cpu()

    def graph(self, prompt: str, batch: Batch, tokenizer: Any, model: str, run: str, picture: Any) -> AttributionGraph:
        """What has grown."""
        target, source, weight = (torch.cat(part) for part in zip(*self.edges, strict=True))
        n_rows = int(self.preactivation.isfinite().sum()) - len(self.targets)
        n = self.parts.n_features
        return AttributionGraph(
            prompt=prompt,
            tokens=tuple(tokenizer.decode([id]) for id in batch.tokens[0].tolist()),
            model=model,
            run=run,
            n_layers=self.local.n_layers,
            nodes=tuple(self.nodes),
            target=target,
            source=source,
            weight=weight.float(),
            preactivation=self.preactivation,
            target_weight=self.target_weight,
            left_out="" if n_rows == n else f"{n - n_rows:,} of {n:,} active features have no row of their own",
            picture=None if picture is None else _picture(picture, int(batch.image.sum())),
        )


def _added(layer: int, node: Node) -> Node:
    return Node(kind="patch", layer=layer, position=node.position, label=node.label, box=node.box, vocab=node.vocab)


def _picture(picture: Image.Image, n_patches: int) -> Picture | None:
    side = isqrt(n_patches)
    if side * side != n_patches:
        return None
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(uri, *picture.size, side, side)
