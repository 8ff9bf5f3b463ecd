"""Whether a graph says what happens: its predictions against features ablated in the model itself.

For the features with the most influence, three predictions of what ablating one does to the target's logit:

* **direct**: minus the edge to the target: with attention, norms and all other features held;
* **total**: minus the sum over all paths of the products of edges, each over its target's pre-activation: with
  attention and norms held and all active features live and linear, errors and biases as they are, and where a path
  leads through a pooled feature as if all of its positions responded alike (see `effects`);
* **influence**: its size alone, as a share; compared with the size of the effect.

And two measurements: **frozen**, in the local replacement model with everything held, which must be the direct edge;
and **live**, by a delta edit of the model as it is. Both ablate a pooled feature at all of its positions at once. The
effect of other active features of the same layers and positions, drawn at random, is beside it. Source: "Circuit
Tracing" (Anthropic 2025), section "Evaluating mechanistic faithfulness".

Axes: N nodes, V vocabulary, P positions, D d_model, L layers.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import mannwhitneyu, spearmanr
from torch import Tensor

from crosslayer.attribution.activity import activations, feature_of
from crosslayer.attribution.effects import effects
from crosslayer.attribution.graph import AttributionGraph
from crosslayer.attribution.node import Node
from crosslayer.attribution.perturbation import Downstream, downstream
from crosslayer.attribution.targets import named
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch
from crosslayer.replacement.actions import Ablate
from crosslayer.replacement.interventions import Intervention
from crosslayer.replacement.local import LocalReplacement, trace
from crosslayer.replacement.sweeping import sweep
from crosslayer.replacement.where import Positions

LEAST = 3
"""Features that a rank correlation needs."""
SAME = 1e-3
"""Part of the largest logit that a target may be off when it is computed anew from its label."""


@dataclass(frozen=True, kw_only=True)
class Ablated:
    """One feature, ablated where its node stands: what was predicted of the main target's logit, and was measured."""

    id: str
    caption: str
    influence: float
    direct: float
    total: float
    frozen: float
    live: float
    size: float
    """|live effect| on all targets, weighted as in influence."""


@dataclass(frozen=True)
class Rank:
    """Spearman's rank correlation of a prediction and the live effect, its p value, and the number of features."""

    rho: float
    p: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """How a graph's predictions hold."""

    run: str
    target: str
    """The main one: that which counts most. Others count in sizes where they are at the same position."""
    influence: Rank
    """Against the size of the effect."""
    direct: Rank
    total: Rank
    worst_frozen_gap: float
    """|frozen + edge|, at worst, over the largest |edge|."""
    median_size: float
    """Of the effects of the features with the most influence ..."""
    median_size_random: float
    """... and of as many others, of the same layers and positions as far as there are any."""
    p_random: float
    """That both are of one size: Mann-Whitney, two-sided."""
    downstream: tuple[Downstream, ...]
    """By number of MLPs between."""
    features: tuple[Ablated, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what could not be measured is None."""
        return _nulls(asdict(self))


def faithfulness(
    model: LoadedModel,
    coder: CrossLayerTranscoder,
    graph: AttributionGraph,
    batch: Batch,
    *,
    features: int = 48,
    seed: int = 0,
) -> Faithfulness:
    """Ablate the features of a graph with the most influence, and as many others of the same layers.

    Args:
        model: the language model.
        coder: the transcoder that the graph was made with.
        graph: not pruned, so that paths are whole.
        batch: the prompt that it was made of.
        features: how many to ablate at most.
        seed: of the choice of others.

    Raises:
        UserError: for a graph without such features, or whose targets are no logits.
    """
    chosen = _most_influential(graph, features)
    targets, place = _targets(graph)
    local = trace(model, coder, batch, place)
    logits = local.logits_at(place).detach()
    vectors = torch.stack([_vector(graph, t, logits, model) for t in targets])
    weights, main = graph.target_weight[targets].to(vectors), 0
    nodes = [graph.nodes[i] for i in chosen]
    live = _effects(model, coder, batch, nodes, place) @ vectors.T
    random = _effects(model, coder, batch, _others(graph, chosen, seed), place) @ vectors.T
    active = activations(local, coder, batch, nodes)
    frozen = _frozen_effects(local, coder, nodes, active) @ vectors[main]
    direct, total = -_edges_to(graph, targets[main])[chosen], -effects(graph, _only(graph, targets[main])).node[chosen]
    sizes, random_sizes = (np.asarray((found.abs() @ weights).cpu(), float) for found in (live, random))
    influence = graph.influence.node[chosen]
    found = [
        Ablated(id=node.id, caption=graph.captions[i], influence=a, direct=b, total=c, frozen=d, live=e, size=f)
        for node, i, a, b, c, d, e, f in zip(
            nodes, chosen, *_lists(influence, direct, total, frozen, live[:, main], sizes), strict=True
        )
    ]
    return Faithfulness(
        run=graph.run,
        target=graph.captions[targets[main]],
        influence=_rank(influence, sizes),
        direct=_rank(direct, live[:, main]),
        total=_rank(total, live[:, main]),
        worst_frozen_gap=float(np.abs(frozen.numpy(force=True) - direct).max() / np.abs(direct).max()),
        median_size=float(np.median(sizes)),
        median_size_random=float(np.median(random_sizes)) if len(random_sizes) else float("nan"),
        p_random=float(mannwhitneyu(sizes, random_sizes).pvalue) if len(random_sizes) else float("nan"),
        downstream=downstream(model, coder, batch, nodes, active),
        features=tuple(found),
    )


def check_measurable(graph: AttributionGraph) -> None:
    """Refuse a graph that ablations cannot check, as far as that is known before any is made.

    Raises:
        UserError: when it has too few features, or its main target is no logit.
    """
    _most_influential(graph, LEAST)
    _targets(graph)


def _only(graph: AttributionGraph, target: int) -> Float[np.ndarray, " N"]:
    return (np.arange(len(graph.nodes)) == target).astype(np.float64)


def _edges_to(graph: AttributionGraph, target: int) -> Float[np.ndarray, " N"]:
    out, mine = np.zeros(len(graph.nodes)), graph.edges.target == target
    out[graph.edges.source[mine]] = graph.edges.weight[mine]
    return out


def _most_influential(graph: AttributionGraph, n: int) -> list[int]:
    features = np.flatnonzero(graph.of_kind("feature"))
    if len(features) < LEAST:
        raise UserError(f"the graph has {len(features)} features; a check by ablating them needs at least {LEAST}")
    return features[np.argsort(-graph.influence.node[features], kind="stable")][:n].tolist()


def _others(graph: AttributionGraph, chosen: Sequence[int], seed: int) -> list[Node]:
    """For each chosen feature another of its layer, at its position while there are any there; none twice."""
    rng, found = np.random.default_rng(seed), list[Node]()
    left = [graph.nodes[i] for i in rng.permutation(np.flatnonzero(graph.of_kind("feature"))) if i not in chosen]
    for node in (graph.nodes[i] for i in chosen):
        same = [other for other in left if other.layer == node.layer]
        if same:
            found.append(next((other for other in same if other.position == node.position), same[0]))
            left.remove(found[-1])
    return found


def _targets(graph: AttributionGraph) -> tuple[list[int], int]:
    """The targets at the position of the one that counts most, that one first, and the position."""
    order = np.argsort(-graph.target_weight.numpy(force=True), kind="stable").tolist()
    targets = [i for i in order if graph.nodes[i].kind == "target"]
    main = graph.nodes[targets[0]]
    if main.position is None or main.layer is not None:
        raise UserError(f"{graph.captions[targets[0]]} is no logit; a graph is checked by its effects on logits")
    here = [i for i in targets if (graph.nodes[i].position, graph.nodes[i].layer) == (main.position, None)]
    return here, main.position


def _vector(graph: AttributionGraph, target: int, logits: Float[Tensor, " V"], model: LoadedModel) -> Tensor:
    """The direction of the logits that a target stands for; a graph does not keep it, but tokens tell it."""
    node, found = graph.nodes[target], None
    if node.vocab is not None:
        found = torch.full_like(logits, -1 / len(logits))
        found[node.vocab] += 1
        return found
    with suppress(UserError):
        tokenizer = getattr(model.processor, "tokenizer", model.processor)
        found = named(node.label, logits, tokenizer, node.position or 0).vector
    value = graph.preactivation[target].item()
    if found is None or abs((found @ logits).item() - value) > SAME * logits.abs().max().item():
        raise UserError(
            f"target {node.label!r} is a direction of your own, which a graph does not keep; "
            "to check a graph, let its targets be tokens or weighted sums of tokens"
        )
    return found


def _ablation(node: Node) -> Intervention:
    """Of a feature, at all positions that its node stands for but the first, where none has features."""
    layer, feature = feature_of(node)
    where = Positions(tuple(position for position in node.positions if position))
    return Intervention(layer=layer, feature=feature, action=Ablate(), where=where)


def _effects(
    model: LoadedModel, coder: CrossLayerTranscoder, batch: Batch, nodes: Sequence[Node], place: int
) -> Float[Tensor, "n V"]:
    """What ablating each feature changes of the model's own logits at a position."""
    logits = sweep(model, coder, batch, [[], *([_ablation(node)] for node in nodes)], position=place)
    return logits[1:] - logits[0]


@torch.no_grad()
def _frozen_effects(
    local: LocalReplacement,
    coder: CrossLayerTranscoder,
    nodes: Sequence[Node],
    active: Float[Tensor, "N P"],
) -> Float[Tensor, "N V"]:
    """The same with everything else held, at the first position whose logits were wanted."""
    effects, before = [], local.logits[0, 0].detach()
    for node, acts in zip(nodes, active, strict=True):
        layer, feature = feature_of(node)
        i, number = coder.sources.index(layer), torch.tensor([feature], device=coder.b_dec.device)
        vectors, constants = coder.decoder.vectors(i, number)[0], coder.decoder.constants(i, number)
        constants, acts = torch.zeros_like(vectors) if constants is None else constants[0], acts[:, None].to(vectors)
        changes = {
            target: -(acts * vector + (acts != 0) * constant)[None].to(local.stream)
            for target, vector, constant in zip(coder.wiring.targets(layer), vectors, constants, strict=True)
        }
        effects.append(local.replay(0.0, changes)[1][0, 0] - before)
    return torch.stack(effects)


def _rank(prediction: Any, effect: Any) -> Rank:
    found: Any = spearmanr(np.asarray(prediction, float), np.asarray(effect.tolist(), float))
    return Rank(float(found.statistic), float(found.pvalue), len(prediction))


def _lists(*values: Any) -> list[list[float]]:
    return [v.tolist() for v in values]


def _nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nulls(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nulls(item) for item in value]
    return None if isinstance(value, float) and value != value else value
