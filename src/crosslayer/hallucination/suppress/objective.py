"""What an edit is chosen by, on the images set apart for that: hallucinations undone, and what else changes.

Undone: the mean of softplus(margin + slack) over hallucinated decisions, of captions and, weighted, of questions; it
falls while a mention is still within the slack of being made. Kept: the same with the sign turned, over true decisions
about the same objects, which a mean over all tokens of responses would hardly see. Collateral: the mean
KL(original || edited), in nats, at the tokens of the model's own responses about images on which it does not
hallucinate, with planted partners that are really there among them. The objective is the weighted sum of the three, and
is differentiable in the strength of each write of each feature.

Axes: B rows, P positions, V vocabulary, S sources, F features, T targets.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus
from tqdm import tqdm

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.errors import UserError
from crosslayer.hallucination.decisions import Decided, Decision, Without, as_batch, decisions
from crosslayer.hallucination.responses import CAPTION, QUESTION, Response
from crosslayer.hallucination.suppress.strengths import turned_down
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch, prepare
from crosslayer.replacement.prefix import Prefixes, Under
from crosslayer.replacement.where import Where


@dataclass(frozen=True, kw_only=True)
class Weighing:
    """What the objective counts, and how much."""

    slack: float = 0.5
    """By which a margin must be below 0, in logits, before pushing it on is worth little."""
    questions: float = 1.0
    """Weight of hallucinated answers beside hallucinated mentions in captions."""
    kept: float = 1.0
    """Weight of true mentions and answers beside hallucinated ones."""
    kept_slack: float = 2.0
    """By which the margin of a true one must be above 0, in logits, before holding it is worth little."""
    collateral: float = 60.0
    """Weight of a nat of KL beside a logit of margin."""
    cases: int = 160
    """Hallucinated mentions of captions at most; of questions half as many."""
    clean: int = 200
    """Clean responses of each kind at most."""
    at_least: int = 20
    """Hallucinated decisions below which nothing can be chosen."""

    def __post_init__(self):
        numbers = (self.slack, self.kept_slack, self.questions, self.kept, self.collateral)
        if min(numbers) < 0:
            raise UserError(f"slacks and weights are {', '.join(map(str, numbers))}; choose 0 or more")


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The objective of one edit."""

    value: float
    captions: float
    """Mean softplus of hallucinated mentions in captions."""
    questions: float
    kept: float
    """The same of true ones, of both kinds, with the sign turned."""
    kl: float
    """Nats a token of clean responses."""
    named: float
    """Share of the hallucinated mentions in captions whose margin is still positive."""
    affirmed: float
    """The same of questions."""


class Objective:
    """The objective on some images' responses.

    Args:
        model: the language model.
        responses: labelled, of the images that may be chosen on.
        folder: of their file.
        weighing: what counts how much.
        without: what captions would be without a mention, where that is known.
        seed: of the choice among responses, where there are more than asked for.
        batch_prompts: responses in one pass.

    Raises:
        UserError: when too few decisions are hallucinated, or no image is free of hallucination.
    """

    def __init__(
        self,
        model: LoadedModel,
        responses: Sequence[Response],
        folder: Path,
        weighing: Weighing = Weighing(),
        *,
        without: Without | None = None,
        seed: int = 0,
        batch_prompts: int = 64,
    ):
        self.model, self.folder, self.weighing = model, folder, weighing
        self.hallucinated, self.true = cases(model, responses, weighing, without, seed)
        self.prefixes = Prefixes(model)
        self.groups: list[list[_Part]] = []
        for kind, weight in {CAPTION: 1.0, QUESTION: weighing.questions}.items():
            for sign, made, counts, slack in (
                (1, self.hallucinated, weight, weighing.slack),
                (-1, self.true, weighing.kept, weighing.kept_slack),
            ):
                same = [d for d in made if d.response.kind == kind]
                decided = [as_batch(model, some, folder) for some in batches(same, batch_prompts)]
                self.groups.append([_Mentions(some, kind, sign, counts, 1 / len(same), slack) for some in decided])
        self.collateral = Collateral(
            model,
            clean_responses(responses, weighing.clean, seed),
            folder,
            batch_prompts=batch_prompts,
            prefixes=self.prefixes,
        )
        self.groups.append([_Clean(part, weighing.collateral) for part in self.collateral.parts])

    @property
    def parts(self) -> list["_Part"]:
        """Batches, over which the objective is a sum: of hallucinated and true captions and answers, and clean ones."""
        return [part for group in self.groups for part in group]

    def drawn(self, n: int, generator: torch.Generator) -> list["_Part"]:
        """Of each of these five n batches by lot, which stand for all of them."""
        found = []
        for group in self.groups:
            order = torch.randperm(len(group), generator=generator)[:n].tolist()
            found += [replace(group[i], times=len(group) / len(order)) for i in order]
        return found

    @torch.no_grad()
    def measure(self, under: Under, parts: Sequence["_Part"] | None = None) -> Terms:
        """The objective under an edit, over all parts, or over what `drawn` returns."""
        sums: dict[str, float] = {}
        for part in _bar(parts or self.parts):
            _add(sums, part.figures(self._logits(part, under)))
        return _terms(sums)

    def gradient(
        self,
        coder: CrossLayerTranscoder,
        strengths: Float[Tensor, "S F T"],
        where: Where,
        parts: Sequence["_Part"] | None = None,
    ) -> tuple[Terms, Float[Tensor, "S F T"]]:
        """The same with writes turned down by these strengths, and its derivative in each of them."""
        leaf, sums = strengths.detach().clone().requires_grad_(), {}
        total = torch.zeros_like(leaf)
        for part in _bar(parts or self.parts):
            edit = Under(partial(turned_down, self.model, coder, leaf, where), (where,))
            figures = part.figures(self._logits(part, edit))
            _add(sums, figures)
            total += torch.autograd.grad(figures["value"], leaf)[0]
        return _terms(sums), total

    def _logits(self, part: "_Part", under: Under) -> Tensor:
        return self.prefixes.logits(part.batch, under, part.first)


class Collateral:
    """How far an edit moves what the model says where it says nothing wrong: KL at the tokens of clean responses.

    Responses of one kind and setting, and those about planted partners, are means of their own, which count alike.
    Every batch holds some of each, as far as there are enough. The original's distributions are kept for all tokens.
    """

    def __init__(
        self,
        model: LoadedModel,
        responses: Sequence[Response],
        folder: Path,
        *,
        batch_prompts: int = 64,
        prefixes: Prefixes | None = None,
    ):
        self.prefixes = prefixes or Prefixes(model)
        strata = group(responses, stratum)
        mixed = batches(spread(strata.values()), batch_prompts)
        made = [_reference(model, some, folder) for some in mixed]
        tokens = dict.fromkeys(strata, 0)
        for some, part in zip(mixed, made, strict=True):
            for response, n in zip(some, part.n_tokens.tolist(), strict=True):
                tokens[stratum(response)] += n
        self.parts = [
            replace(part, weights=part.log_p.new_tensor([1 / (tokens[stratum(r)] * len(strata)) for r in some]))
            for some, part in zip(mixed, made, strict=True)
        ]

    @torch.no_grad()
    def kl(self, under: Under) -> float:
        """Nats a token, the mean over the kinds of responses."""
        return sum(float(part.kl(self.prefixes.logits(part.batch, under, part.first))) for part in self.parts)


@dataclass(frozen=True)
class _Reference:
    """Clean responses and what the original predicts at their tokens."""

    batch: Batch
    predicts: Bool[Tensor, "B P"]
    """True where a token of the response is predicted."""
    log_p: Float[Tensor, "N V"]
    weights: Float[Tensor, " B"]
    """Of a token of each row."""

    @property
    def n_tokens(self) -> Int[Tensor, " B"]:
        """That count, of each row."""
        return self.predicts.sum(1)

    @property
    def first(self) -> Int[Tensor, " B"]:
        """Column of each row's first token that counts."""
        return self.predicts.long().argmax(1)

    def kl(self, logits: Float[Tensor, "B P V"]) -> Tensor:
        log_q = precise(logits[self.predicts]).log_softmax(-1)
        return (self.log_p.exp() * (self.log_p - log_q)).sum(1) @ self.weights.repeat_interleave(self.n_tokens)


@dataclass(frozen=True)
class _Mentions:
    """Decisions of one kind, all hallucinated or all true."""

    decided: Decided
    kind: str
    sign: int
    """1 of hallucinated ones, which are to be undone; -1 of true ones, which are to be kept."""
    weight: float
    each: float
    """One over how many there are."""
    slack: float
    times: float = 1.0
    """How many batches this one stands for."""

    @property
    def batch(self) -> Batch:
        return self.decided.batch

    @property
    def first(self) -> Int[Tensor, " B"]:
        return self.decided.position

    def figures(self, logits: Tensor) -> dict[str, Tensor]:
        margin, each = self.decided.margin(precise(logits)), self.each * self.times
        loss = softplus(self.sign * margin + self.slack).sum() * each
        if self.sign < 0:
            return {"value": self.weight * loss, "kept": loss}
        named = {CAPTION: ("captions", "named"), QUESTION: ("questions", "affirmed")}[self.kind]
        return {"value": self.weight * loss, named[0]: loss, named[1]: (margin > 0).sum() * each}


@dataclass(frozen=True)
class _Clean:
    reference: _Reference
    weight: float
    times: float = 1.0
    """How many batches this one stands for."""

    @property
    def batch(self) -> Batch:
        return self.reference.batch

    @property
    def first(self) -> Int[Tensor, " B"]:
        return self.reference.first

    def figures(self, logits: Tensor) -> dict[str, Tensor]:
        kl = self.reference.kl(logits) * self.times
        return {"value": self.weight * kl, "kl": kl}


_Part = _Mentions | _Clean


def _bar(parts: Sequence[_Part]) -> Iterable[_Part]:
    return tqdm(parts, unit="batch", desc="objective", disable=None, leave=False, delay=5)


def cases(
    model: LoadedModel, responses: Sequence[Response], weighing: Weighing, without: Without | None, seed: int
) -> tuple[list[Decision], list[Decision]]:
    """Hallucinated decisions, and true ones about the same objects as far as there are some.

    Raises:
        UserError: when too few are hallucinated, with how many are needed.
    """
    limits = {CAPTION: weighing.cases, QUESTION: weighing.cases // 2}
    wrong, right = [], []
    for kind, limit in limits.items():
        same = [r for r in responses if r.kind == kind and r.mentions]
        found = decisions(model, [r for r in same if r.hallucinates], without)
        wrong += drawn([d for d in found if d.hallucinated], limit, seed, lambda d: d.response.id)
        objects = {d.mention.object for d in wrong}
        clean = decisions(model, drawn([r for r in same if not r.hallucinates], 4 * limit, seed), without)
        right += sorted(clean, key=lambda d: d.mention.object not in objects)[:limit]
    if len(wrong) < weighing.at_least:
        raise UserError(
            f"{len(wrong)} hallucinated mentions fall to the images that edits are chosen on, {weighing.at_least} are "
            f"needed; score about {max(2, -(-2 * weighing.at_least // max(len(wrong), 1)))} times as many images"
        )
    return wrong, right


def clean_responses(responses: Sequence[Response], limit: int, seed: int) -> list[Response]:
    """Responses about images with no hallucination in any response, at most `limit` of each kind (see `stratum`).

    Raises:
        UserError: when there are none.
    """
    wrong = {r.image_id for r in responses if r.hallucinates}
    clean = [r for r in responses if r.image_id not in wrong and r.response]
    if not clean:
        raise UserError(
            "the model hallucinates on every image, so nothing tells what an edit spoils; score more images"
        )
    return [r for same in group(clean, stratum).values() for r in drawn(same, limit, seed)]


def stratum(response: Response) -> tuple[Any, ...]:
    """Which responses are alike: a kind, in a setting, about a planted partner or not."""
    return response.kind, response.setting, response.pair is not None and response.object == response.pair[1]


def group(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Items by key, keys in the order of their first item."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def spread(groups: Iterable[Sequence[Any]]) -> list[Any]:
    """The items of all groups, so that any stretch holds about as large a share of one group as of another."""
    placed = [((i + 0.5) / len(same), item) for same in groups for i, item in enumerate(same)]
    return [item for _, item in sorted(placed, key=lambda pair: pair[0])]


def drawn(items: Sequence[Any], n: int, seed: int, id: Callable[[Any], str] = lambda r: r.id) -> list[Any]:
    """At most n items, in their order; which ones depends on their ids and the seed alone."""

    def lot(i: int) -> bytes:
        return blake2b(f"{seed}:{id(items[i])}".encode(), digest_size=8).digest()

    return [items[i] for i in sorted(sorted(range(len(items)), key=lot)[:n])]


def batches(items: Sequence[Any], n: int) -> list[Sequence[Any]]:
    """Runs of at most n items."""
    return [items[i : i + n] for i in range(0, len(items), n)]


def precise(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def _reference(model: LoadedModel, responses: Sequence[Response], folder: Path) -> _Reference:
    batch = prepare(model.model, model.processor, [r.answered(folder) for r in responses])
    predicts = torch.zeros_like(batch.response)
    predicts[:, :-1] = batch.response[:, 1:]
    logits = model.model(**batch.inputs, use_cache=False).logits
    log_p = precise(logits[predicts]).log_softmax(-1)
    return _Reference(batch, predicts, log_p, log_p.new_zeros(len(responses)))


def _add(sums: dict[str, float], figures: dict[str, Tensor]) -> None:
    for name, figure in figures.items():
        sums[name] = sums.get(name, 0.0) + float(figure.detach())


def _terms(sums: dict[str, float]) -> Terms:
    return Terms(**{name: sums.get(name, 0.0) for name in Terms.__dataclass_fields__})
