"""How well a replacement model stands in for the original: fidelity, with intervals over prompts."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import nan

import torch
from torch import Tensor

from crosslayer import metrics
from crosslayer.activations.capture import capture_all
from crosslayer.coders.codes import Codes
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.data.examples import Example, apart, digest, hear
from crosslayer.distributed.crew import ALONE, Crew
from crosslayer.distributed.results import Result
from crosslayer.errors import UserError
from crosslayer.files import nulls
from crosslayer.metrics import Figure
from crosslayer.models.hooks import replacing
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import Batch, prepare_good
from crosslayer.replacement.model import ReplacementModel, generate_tokens

MODALITIES = ("all", "text", "image")
LOOPING = 0.25
"""Share of repeated 4-grams above which a continuation loops; a model's own answers rarely repeat any."""
MOST = 0.5
"""Share of looping or silent continuations above which the verdict says so."""


@dataclass(frozen=True)
class LayerFigures:
    """Reconstruction at one layer, on the original model's activations."""

    fvu: Figure
    """Of the layer as a target; NaN where its own MLP is kept."""
    l0: Figure
    """Active features a token of the layer as a source."""
    dead_fraction: float
    """Features of the layer that fired on no token of the modality."""


@dataclass(frozen=True)
class Evaluation:
    """Fidelity of a replacement model on a set of examples; teacher-forced unless said otherwise."""

    n_prompts: int
    n_tokens: int
    """Scored positions: those that predict response tokens (all text where there is no response)."""
    top1_agreement: Figure
    """Share of scored positions where original and replacement agree on the most likely next token."""
    top1_agreement_filtered: Figure
    """The same where the original is right with less than 80 % confidence."""
    n_filtered: int
    """Scored positions that pass the filter."""
    top1_agreement_text: Figure
    """The same as `top1_agreement` over all text positions, prompts included."""
    kl: Figure
    """KL(original || replacement) a scored position, in nats."""
    cross_entropy: Figure
    """Replacement's cross-entropy a scored token, in nats."""
    cross_entropy_original: Figure
    cross_entropy_ablated: Figure
    """With every MLP write at its mean."""
    cross_entropy_recovered: Figure
    """(ablated - replacement) / (ablated - original)."""
    generation_match: Figure
    """Share of the original's greedily generated tokens that the replacement generates too, position by position."""
    repetition_rate: Figure
    """Repeated 4-grams among the replacement's generated 4-grams."""
    degenerate_share: Figure
    """Share of the replacement's continuations in which more than a quarter of the 4-grams are repeated."""
    verdict: str
    """`speaks`, `silent`, or what the replacement repeats when most of its continuations are degenerate."""
    fvu: Figure
    """Mean over layers, those whose own MLP is kept left out."""
    l0: Figure
    """Active features a token, summed over layers."""
    dead_fraction: float
    """Features of all layers that fired on no token; no interval, as resampled prompts can only fire fewer."""
    layers: dict[str, list[LayerFigures]] = field(default_factory=dict)
    """By modality: `all`, `text`, `image`."""

    def to_dict(self) -> dict:
        """This record as JSON values; a figure that could not be measured is None."""
        return nulls(asdict(self))

    def to_json(self) -> str:
        """This record as JSON."""
        return json.dumps(self.to_dict(), indent=2)


def evaluate(
    model: LoadedModel,
    transcoder: CrossLayerTranscoder,
    examples: Sequence[Example],
    *,
    batch_prompts: int = 32,
    max_new_tokens: int = 32,
    crew: Crew = ALONE,
) -> Evaluation:
    """Compare the replacement model with the original on `examples`; a crew shares the batches.

    Raises:
        UserError: when there are no examples, or the transcoder does not fit the model.
    """
    if not len(examples):
        raise UserError("the data set is empty; give at least one example to evaluate on")
    replacement = ReplacementModel(model, transcoder)
    crew.agree(lambda: {"examples": len(examples), "digest": digest(examples)})
    batches = [range(i, min(i + batch_prompts, len(examples))) for i in range(0, len(examples), batch_prompts)]
    mean_write = _mean_write(model, examples, batches, crew)
    speech, sites = _Speech(replacement, mean_write), _Reconstruction(transcoder, mean_write)

    def measure(i: int) -> Result:
        data, notes = apart(examples, crew)
        batch, good = prepare_good(model.model, model.processor, data, batches[i])
        figures = {}
        if batch is not None:
            figures = speech.compare(batch) | speech.converse([data[number] for number in good], max_new_tokens)
            figures |= sites.compare(batch, *capture_all(model, batch))
        return {**figures, "prompts": len(good), "looks": notes.looks}

    n_prompts = 0
    for found in crew.map(measure, len(batches)):
        _hear(examples, found, crew)
        n_prompts += found["prompts"]
        if found["prompts"]:
            speech.keep(found)
            sites.keep(found)
    if not n_prompts:
        raise UserError("all examples of the data set are bad")
    return Evaluation(n_prompts=n_prompts, **speech.figures(), **sites.figures())


def _hear(examples: Sequence[Example], found: Result, crew: Crew) -> None:
    if crew.leads:
        hear(examples, found["looks"])


def agreement(replacement: ReplacementModel, batches: Sequence[Batch]) -> float:
    """Top-1 agreement at scored positions alone: the quick look taken while training."""
    agreed, scored = 0.0, 0.0
    for batch in batches:
        with torch.no_grad():
            original = replacement.model.model(**batch.inputs, use_cache=False).logits
        mask = batch.response[:, 1:]
        same = metrics.top1(original) == metrics.top1(replacement.logits(batch))
        agreed, scored = agreed + (same[:, :-1] & mask).sum().item(), scored + mask.sum().item()
    return agreed / scored


def _mean_write(model: LoadedModel, examples: Sequence[Example], batches: Sequence[range], crew: Crew) -> Tensor:
    """[L, D] mean of every MLP's write over all tokens but first positions and padding."""

    def add(i: int) -> Result:
        data, notes = apart(examples, crew)
        batch, _ = prepare_good(model.model, model.processor, data, batches[i])
        if batch is None:
            return {"tokens": 0, "looks": notes.looks}
        y = capture_all(model, batch)[1][batch.position > 0]
        return {"total": y.float().sum(0), "tokens": len(y), "looks": notes.looks}

    total, count = torch.zeros(model.n_layers, model.d_model, device=model.device), 0
    for found in crew.map(add, len(batches)):
        _hear(examples, found, crew)
        if found["tokens"]:
            total, count = total + found["total"].to(total), count + found["tokens"]
    return total / max(count, 1)


class _Speech:
    """Sums, by prompt, of what the original and the replacement say; a batch is compared, then kept, in order."""

    def __init__(self, replacement: ReplacementModel, mean_write: Tensor):
        self.replacement, self.model = replacement, replacement.model
        self.mean_write = mean_write.to(self.model.model.dtype)
        self.sums: dict[str, list[Tensor]] = {}
        self.generated: Counter[int] = Counter()

    @torch.no_grad()
    def compare(self, batch: Batch) -> dict[str, Tensor]:
        """Teacher-forced: predictions of the next token at scored positions."""
        following, mask = batch.tokens[:, 1:], batch.response[:, 1:]
        text = batch.attention[:, 1:] & ~batch.image[:, 1:]
        original = self.model.model(**batch.inputs, use_cache=False).logits[:, :-1]
        replaced = self.replacement.logits(batch)[:, :-1]
        ablated = self._ablated(batch)[:, :-1]
        same = metrics.top1(original) == metrics.top1(replaced)
        filtered = mask & metrics.hesitant(original, following)
        figures = {
            "scored": mask,
            "agreed": same & mask,
            "filtered": filtered,
            "agreed_filtered": same & filtered,
            "text": text,
            "agreed_text": same & text,
            "kl": metrics.kl(original, replaced) * mask,
        }
        for name, logits in (("original", original), ("replaced", replaced), ("ablated", ablated)):
            figures[f"ce_{name}"] = metrics.cross_entropy(logits, following) * mask
        return {f"speech/{name}": values.double().sum(1) for name, values in figures.items()}

    def converse(self, examples: list[Example], max_new_tokens: int) -> dict[str, Tensor]:
        """Greedy continuations of the prompts by both."""
        original = generate_tokens(self.model, examples, max_new_tokens=max_new_tokens)
        with self.replacement.replaced():
            replaced = generate_tokens(self.model, examples, max_new_tokens=max_new_tokens)
        ends, said, rows = _end_tokens(self.model), list[int](), list[list[float]]()
        for ours, theirs in zip(original.tolist(), replaced.tolist(), strict=True):
            ours, theirs = _until_end(ours, ends), _until_end(theirs, ends)
            said += theirs
            repeated, grams = metrics.repetition(theirs)
            matched = metrics.generation_match(ours, theirs)
            degenerate, silent = repeated > LOOPING * grams, len(theirs) <= 1 < len(ours)
            rows.append([*matched, repeated, grams, degenerate, silent])
        columns = torch.tensor(rows, dtype=torch.double).unbind(1)
        names = ("matched", "generated", "repeated", "grams", "degenerate", "silent")
        figures = {f"speech/{name}": column for name, column in zip(names, columns, strict=True)}
        return figures | {"said": torch.tensor(said, dtype=torch.long)}

    def keep(self, figures: Result) -> None:
        """Add those of the next batch."""
        self.generated.update(figures["said"].tolist())
        for name, values in figures.items():
            if name.startswith("speech/"):
                self.sums.setdefault(name.removeprefix("speech/"), []).append(values)

    def figures(self) -> dict:
        """The figures of `Evaluation` that concern speech."""
        s = {name: torch.cat(parts).cpu() for name, parts in self.sums.items()}
        each = torch.ones_like(s["degenerate"])
        return {
            "n_tokens": int(s["scored"].sum()),
            "n_filtered": int(s["filtered"].sum()),
            "top1_agreement": metrics.ratio(s["agreed"], s["scored"]),
            "top1_agreement_filtered": metrics.ratio(s["agreed_filtered"], s["filtered"]),
            "top1_agreement_text": metrics.ratio(s["agreed_text"], s["text"]),
            "kl": metrics.ratio(s["kl"], s["scored"]),
            "cross_entropy": metrics.ratio(s["ce_replaced"], s["scored"]),
            "cross_entropy_original": metrics.ratio(s["ce_original"], s["scored"]),
            "cross_entropy_ablated": metrics.ratio(s["ce_ablated"], s["scored"]),
            "cross_entropy_recovered": metrics.ratio(
                s["ce_ablated"] - s["ce_replaced"], s["ce_ablated"] - s["ce_original"]
            ),
            "generation_match": metrics.ratio(s["matched"], s["generated"]),
            "repetition_rate": metrics.ratio(s["repeated"], s["grams"]),
            "degenerate_share": metrics.ratio(s["degenerate"], each),
            "verdict": self._verdict(s["degenerate"].mean().item(), s["silent"].mean().item()),
        }

    def _ablated(self, batch: Batch) -> Tensor:
        shape = (*batch.tokens.shape, self.model.d_model)
        with replacing(self.model.sites, lambda layer: self.mean_write[layer].expand(shape)):
            return self.model.model(**batch.inputs, use_cache=False).logits

    def _verdict(self, degenerate: float, silent: float) -> str:
        if silent > MOST:
            return f"silent: {silent:.0%} of its answers end at once"
        if degenerate <= MOST:
            return "speaks"
        token, count = self.generated.most_common(1)[0]
        tokenizer = getattr(self.model.processor, "tokenizer", self.model.processor)
        share = count / self.generated.total()
        return f"degenerate: {share:.0%} of the generated tokens are {tokenizer.decode([token])!r}"


class _Reconstruction:
    """Sums, by prompt, layer and modality, of what the transcoder explains of the original's writes."""

    def __init__(self, transcoder: CrossLayerTranscoder, mean_write: Tensor):
        self.transcoder, self.mean_write = transcoder, mean_write
        self.sums: dict[str, list[Tensor]] = {}
        self.fired = {
            m: torch.zeros(len(transcoder.sources), transcoder.d_transcoder, dtype=torch.bool) for m in MODALITIES
        }

    @torch.no_grad()
    def compare(self, batch: Batch, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """One batch of the original's activations, [B, P, L, D] each."""
        usable = batch.position > 0
        x = x[usable].to(self.transcoder.b_dec.dtype)
        codes = self.transcoder.encode(x)
        error = (y[usable] - self.transcoder.decode(codes, x)).float().square().sum(2)
        spread = (y[usable].float() - self.mean_write).square().sum(2)
        modalities = {name: _modality(name, batch.image[usable]) for name in MODALITIES}
        counted = [_active(c, modalities) for c in codes]
        active = torch.stack([count for count, _ in counted], 1)
        prompt = torch.arange(len(usable), device=x.device)[:, None].expand_as(usable)[usable]
        figures = {}
        for name, rows in modalities.items():
            figures[f"fired/{name}"] = torch.stack([fired[name] for _, fired in counted])
            ones = torch.ones(int(rows.sum()), 1, device=x.device)
            for key, values in (("error", error), ("spread", spread), ("active", active), ("tokens", None)):
                chosen = ones if values is None else values[rows]
                total = torch.zeros(len(usable), chosen.shape[1], dtype=torch.double, device=x.device)
                total.index_add_(0, prompt[rows], chosen.double())
                figures[f"sites/{name}/{key}"] = total.cpu()
        return figures

    def keep(self, figures: Result) -> None:
        """Add those of the next batch."""
        for name in MODALITIES:
            self.fired[name] |= figures[f"fired/{name}"]
        for name, values in figures.items():
            if name.startswith("sites/"):
                self.sums.setdefault(name.removeprefix("sites/"), []).append(values)

    def figures(self) -> dict:
        """The figures of `Evaluation` that concern reconstruction."""
        sums = {key: torch.cat(parts) for key, parts in self.sums.items()}
        replaced = [t for t in range(self.transcoder.wiring.n_layers) if t not in self.transcoder.kept_layers]
        error, spread = sums["all/error"][:, replaced], sums["all/spread"][:, replaced]
        weights = spread.sum(0)
        dead = ~self.fired["all"]
        return {
            "fvu": metrics.ratio((error / weights).mean(1), (spread / weights).mean(1)),
            "l0": metrics.ratio(sums["all/active"].sum(1), sums["all/tokens"][:, 0]),
            "dead_fraction": dead.float().mean().item(),
            "layers": {name: self._layers(name, sums) for name in MODALITIES if sums[f"{name}/tokens"].sum()},
        }

    def _layers(self, name: str, sums: dict[str, Tensor]) -> list[LayerFigures]:
        sources, tokens = self.transcoder.sources, sums[f"{name}/tokens"][:, 0]
        nothing, unmeasured = Figure(0.0, 0.0, 0.0), Figure(nan, nan, nan)
        figures = []
        for layer in range(self.transcoder.wiring.n_layers):
            source = sources.index(layer) if layer in sources else None
            figures.append(
                LayerFigures(
                    unmeasured
                    if layer in self.transcoder.kept_layers
                    else metrics.ratio(sums[f"{name}/error"][:, layer], sums[f"{name}/spread"][:, layer]),
                    nothing if source is None else metrics.ratio(sums[f"{name}/active"][:, source], tokens),
                    0.0 if source is None else (~self.fired[name][source]).float().mean().item(),
                )
            )
        return figures


def _active(codes: Codes, modalities: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """How many features of a source are active on each token, and by modality which are on any."""
    active = codes.dense() > 0
    return active.sum(1), {name: active[rows].any(0).cpu() for name, rows in modalities.items()}


def _modality(name: str, image: Tensor) -> Tensor:
    return {"all": torch.ones_like(image), "image": image, "text": ~image}[name]


def _end_tokens(model: LoadedModel) -> set[int]:
    end = model.model.generation_config.eos_token_id
    return set(end) if isinstance(end, list) else {end}


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """The continuation up to and with its end mark."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens
