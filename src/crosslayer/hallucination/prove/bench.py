"""What is tried on the model to prove an edit, each try kept in files of its own, so that nothing is asked twice."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import Any

import torch

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.files import read_json, write_json
from crosslayer.hallucination.decisions import decisions
from crosslayer.hallucination.prove.biasing import bias_for, biased
from crosslayer.hallucination.responses import CAPTION, QUESTION, YES, Response, read_responses, write_responses
from crosslayer.hallucination.suppress.figures import Panel, asked_again, figures
from crosslayer.hallucination.suppress.outcome import Outcome
from crosslayer.hallucination.suppress.protocol import Trial
from crosslayer.hallucination.suppress.selection import under
from crosslayer.replacement.prefix import AS_IT_IS, Under

FOLDER = "report"
"""Of what is tried here, in the folder of results."""
HIGHEST, STEPS = 4.0, 12
"""Strength up to which a collateral KL is looked for, and halvings of that range."""
ROUNDS = 3
"""In which the plain and the edited model take turns to be timed."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """Answers under an edit at one strength."""

    strength: float
    kl: float
    """Nats a token of clean responses about the same images."""
    answers: list[Response]


@dataclass(frozen=True, kw_only=True)
class Control:
    """A plain bias, set on the images for calibrating so that one figure is that of the edited model."""

    name: str
    tokens: tuple[str, ...]
    """Whose logits are biased."""
    measure: str
    """That is matched."""
    wanted: float
    """The edited model's, on the images for calibrating."""
    got: float
    """The control's there."""
    bias: float
    """Logits."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """CPU seconds a generated token of captions, all threads, the least of several rounds."""

    plain: float
    edited: float

    @property
    def ratio(self) -> float:
        """Edited / plain."""
        return self.edited / self.plain


_Made = tuple[dict[str, Any], list[Response]]
"""What a try leaves: figures, and answers."""


class Bench:
    """Tries edits and controls.

    Args:
        trial: the responses, split.
        coders: of a method, by name; "" is that of all methods not named.
        kept: the edit that is to be proved.
    """

    def __init__(self, trial: Trial, coders: Mapping[str, CrossLayerTranscoder], kept: Outcome):
        self.trial, self.coders, self.kept = trial, coders, kept

    def coder(self, method: str) -> CrossLayerTranscoder:
        """That of a method."""
        return self.coders.get(method, self.coders[""])

    def edit(self, outcome: Outcome, strength: float) -> Under:
        """A method's edit at a strength; the model as it is where the method found nothing to edit."""
        return under(self.trial.model, self.coder(outcome.method), outcome.edits, strength)

    def dose(self, outcome: Outcome, strength: float) -> Tried:
        """Answers under a method's edit at a strength, on the images for control."""

        def make() -> _Made:
            return self._under(outcome, strength, self.trial.control)

        return self._tried(f"{outcome.method}-dose-{strength:g}", (outcome.digest, "dose", strength), make)

    def at_equal_kl(self, outcome: Outcome) -> Tried:
        """A method's edit as strong as it takes for the kept edit's KL on clean responses of the test."""
        assert self.kept.test is not None
        wanted, testing = self.kept.test.kl, self.trial.testing

        def make() -> _Made:
            low, high = 0.0, HIGHEST
            for _ in range(STEPS):
                middle = (low + high) / 2
                below = testing.collateral.kl(self.edit(outcome, middle)) < wanted
                low, high = (middle, high) if below else (low, middle)
            return self._under(outcome, round((low + high) / 2, 3), testing)

        return self._tried(f"{outcome.method}-equal-kl", (outcome.digest, wanted), make)

    def unchanged(self) -> dict[str, int]:
        """Prompts of the images for control whose logits a strength of 0 leaves the same, bit by bit, and all."""
        return self._once("unchanged", self.kept.digest, lambda: (self._unchanged(), []))[0]

    @torch.no_grad()
    def _unchanged(self) -> dict[str, int]:
        same, n, model = 0, 0, self.trial.model
        for some, batch in self.trial.control.batches:
            plain = model.model(**batch.inputs, use_cache=False).logits
            with self.edit(self.kept, 0.0).on(batch):
                edited = model.model(**batch.inputs, use_cache=False).logits
            same += int((plain == edited).flatten(1).all(1).sum())
            n += len(some)
        return {"same": same, "prompts": n}

    def control(self, name: str) -> tuple[Control, list[Response]] | None:
        """That of `CONTROLS`, and the answers under it to the test's queries of its kind; None where there is none."""
        (kind, measure, tokens), dose = CONTROLS[name], self._kept_dose()
        biased = tokens(self.trial, self.trial.splits["calibrate"])
        return self._control(name, kind, measure, dose[measure], biased) if measure in dose and biased else None

    def cost(self) -> Cost:
        """Of generating the captions of the images for control."""
        record, _ = self._once("cost", self.kept.digest, lambda: (self._timed(), []))
        return Cost(**record)

    def _timed(self) -> dict[str, float]:
        panel = self._panel("test", CAPTION, 64)
        edit = self.edit(self.kept, self.kept.strength or 0.0)
        times: dict[str, list[float]] = {"plain": [], "edited": []}
        for _ in range(ROUNDS):
            times["plain"].append(_seconds_a_token(panel, AS_IT_IS))
            times["edited"].append(_seconds_a_token(panel, edit))
        return {name: min(some) for name, some in times.items()}

    def _control(
        self, name: str, kind: str, measure: str, wanted: float, tokens: Sequence[int]
    ) -> tuple[Control, list[Response]]:
        tokenizer = getattr(self.trial.model.processor, "tokenizer", self.trial.model.processor)

        def edit(bias: float) -> Under:
            return Under(lambda _: biased(self.trial.model, tokens, bias), ())

        def make() -> _Made:
            panel = self._panel("calibrate", kind)
            figure = cache(lambda bias: figures(panel.ask(edit(bias)))[measure])
            bias = bias_for(figure, wanted)
            return {"bias": bias, "got": figure(bias)}, self._panel("test", kind).ask(edit(bias))

        record, answers = self._once(name, (self.kept.digest, wanted, tuple(tokens)), make)
        words = tuple(str(tokenizer.decode([token])).strip() for token in tokens)
        return Control(name=name, tokens=words, measure=measure, wanted=wanted, **record), answers

    def _kept_dose(self) -> dict[str, float]:
        return next(dose.figures for dose in self.kept.doses if dose.strength == self.kept.strength)

    def _panel(self, split: str, kind: str, n: int | None = None) -> Panel:
        """The same queries of one kind as in the trial's panel of the split."""
        trial = self.trial
        asked = [r for r in asked_again(trial.splits[split]) if r.kind == kind][:n]
        return Panel(
            trial.model, asked, trial.folder, trial.table, clean=[], batch_prompts=trial.settings.batch_prompts
        )

    def _under(self, outcome: Outcome, strength: float, panel: Panel) -> _Made:
        edit = self.edit(outcome, strength)
        return {"strength": strength, "kl": panel.collateral.kl(edit)}, panel.ask(edit)

    def _tried(self, name: str, of: Any, make: Callable[[], _Made]) -> Tried:
        record, answers = self._once(name, of, make)
        return Tried(**record, answers=answers)

    def _once(self, name: str, of: Any, make: Callable[[], _Made]) -> _Made:
        """What was tried, from its files if these are of the same trial."""
        folder = self.trial.folder / FOLDER
        record_path, answers_path = folder / f"{name}.json", folder / f"{name}.jsonl"
        digest = blake2b(repr((self.trial.digest, of)).encode(), digest_size=8).hexdigest()
        kept = read_json(record_path) if record_path.exists() else {}
        if kept.pop("digest", None) == digest:
            return kept, read_responses(answers_path) if answers_path.exists() else []
        record, answers = make()
        if answers:
            write_responses(answers_path, answers)
        write_json(record_path, {"digest": digest, **record})
        return record, answers


def _seconds_a_token(panel: Panel, edit: Under) -> float:
    start = time.process_time()
    answers = panel.ask(edit)
    return (time.process_time() - start) / sum(len(r.token_ids or ()) + 1 for r in answers)


def _yes_tokens(trial: Trial, responses: Sequence[Response]) -> list[int]:
    """Which tokens say yes."""
    affirmed = [r for r in responses if r.kind == QUESTION and r.answer == YES]
    return sorted({decision.chosen for decision in decisions(trial.model, affirmed)})


def _last_tokens(trial: Trial, responses: Sequence[Response]) -> list[int]:
    """Which tokens end a caption: its last, and the end itself."""
    end = trial.model.model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [] if end is None else [end]
    return sorted({r.token_ids[-1] for r in responses if r.kind == CAPTION and r.token_ids} | {*ends})


def _commas(trial: Trial, responses: Sequence[Response]) -> list[int]:
    """Which tokens of captions are a comma."""
    tokenizer = getattr(trial.model.processor, "tokenizer", trial.model.processor)
    used = {id for r in responses if r.kind == CAPTION for id in r.token_ids or ()}
    return sorted(id for id in used if str(tokenizer.decode([id])).strip() == ",")


CONTROLS = {
    "yes-bias": (QUESTION, "yes_ratio", _yes_tokens),
    "stop-bias": (CAPTION, "length_words", _last_tokens),
    "comma-bias": (CAPTION, "length_words", _commas),
}
"""The yes-ratio matched by a bias on "yes"; caption length by one on what ends a caption, one on commas.

Of each, the kind of responses, the measure that is matched, and which tokens are biased.
"""
