"""What is measured of an edit from greedy answers: hallucination, and what must not be lost with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from crosslayer.coders.fingerprint import fingerprint
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.hallucination.chair import CHAIR
from crosslayer.hallucination.labelling import Said, label
from crosslayer.hallucination.measures import Measure
from crosslayer.hallucination.planted import PLANTED
from crosslayer.hallucination.pope import ADVERSARIAL, POPE
from crosslayer.hallucination.responses import CAPTION, QUESTION, YES, Response
from crosslayer.hallucination.suppress.objective import Collateral, batches, group
from crosslayer.hallucination.suppress.selection import under
from crosslayer.hallucination.synonyms import SynonymTable
from crosslayer.models.load import LoadedModel
from crosslayer.models.prompts import prepare
from crosslayer.replacement.interventions import Edit
from crosslayer.replacement.model import as_text, without_end
from crosslayer.replacement.prefix import AS_IT_IS, Prefixes, Under


def _of(kind: str, measure: Measure) -> Measure:
    """A measure of captions or questions alone."""
    return Measure(measure.name, *(partial(_if_kind, kind, count) for count in (measure.above, measure.below)))


def _if_kind(kind: str, count, response: Response) -> float:
    return float(count(response)) if response.kind == kind else 0.0


_CHAIR = {measure.name: _of(CAPTION, measure) for measure in CHAIR}
_POPE = {measure.name: _of(QUESTION, measure) for measure in POPE}
_PLANTED = {measure.name: measure for measure in PLANTED}
_FALSE_YES = _of(
    QUESTION,
    Measure(
        "false_yes",
        lambda r: r.answer == YES and r.object not in r.truth,
        lambda r: r.object not in r.truth,
    ),
)

HALLUCINATION = (_CHAIR["chair_s"], _FALSE_YES)
"""Captions that name something absent; absent objects that are affirmed."""
RETAINED = (
    _CHAIR["object_recall"],
    Measure("yes_recall", _POPE["recall"].above, _POPE["recall"].below),
    *(m for name, m in _PLANTED.items() if not name.startswith("absent")),
)
"""What an edit may not lose: true objects named and affirmed, planted partners that are really there above all."""
_THERE = tuple(m for name, m in _PLANTED.items() if not name.startswith("absent"))
POOLED = (
    *RETAINED[:2],
    Measure("partner_recall", lambda r: sum(m.above(r) for m in _THERE), lambda r: sum(m.below(r) for m in _THERE)),
)
"""The same in as few figures as possible, each of many responses: planted partners that are there taken together."""
ALSO = (
    *(m for name, m in _PLANTED.items() if name.startswith("absent")),
    _CHAIR["chair_i"],
    _CHAIR["length_words"],
    _POPE["accuracy"],
    _POPE["f1"],
    _POPE["yes_ratio"],
    _POPE["unparseable"],
)


@dataclass(frozen=True, kw_only=True)
class Dose:
    """What answers are like under an edit at one strength."""

    strength: float
    figures: dict[str, float]
    """By name of the measure; those that these queries do not allow are left out."""
    kl: float
    """Nats a token of clean responses."""


class Panel:
    """Queries about some images, prepared once, to be asked again and again under one edit after another.

    Args:
        model: the language model.
        responses: what the model answers as it is.
        folder: of their file.
        table: the words for the objects.
        clean: responses about images without hallucination, for the KL.
        batch_prompts: answered together.
    """

    def __init__(
        self,
        model: LoadedModel,
        responses: Sequence[Response],
        folder: Path,
        table: SynonymTable,
        *,
        clean: Sequence[Response],
        batch_prompts: int = 64,
    ):
        self.model, self.table = model, table
        self.asked = sorted(responses, key=lambda r: (r.kind, len(r.prompt)))
        # An edit that makes a model ramble is cut off at twice the longest answer.
        self.longest = {
            kind: 2 * max(len(r.token_ids or ()) for r in same) + 2
            for kind, same in group(self.asked, lambda r: r.kind).items()
        }
        self.batches = [
            (some, prepare(model.model, model.processor, [r.example(folder) for r in some]))
            for same in group(self.asked, lambda r: r.kind).values()
            for some in batches(same, batch_prompts)
        ]
        self.prefixes = Prefixes(model)
        self.collateral = Collateral(model, clean, folder, batch_prompts=batch_prompts, prefixes=self.prefixes)
        self.known: dict[str, tuple[Dose, list[Response]]] = {}

    def ask(self, edit: Under = AS_IT_IS) -> list[Response]:
        """What the model answers under an edit, labelled; without token spans, which nothing here needs."""
        answered = []
        for some, batch in tqdm(self.batches, unit="batch", desc="ask", disable=None, leave=False, delay=5):
            generated = self.prefixes.continuation(batch, edit, max_new_tokens=self.longest[some[0].kind])
            pairs = zip(as_text(self.model, generated), without_end(self.model, generated), strict=True)
            answered += [
                label(query, Said(text, tuple(ids)), self.table) for query, (text, ids) in zip(some, pairs, strict=True)
            ]
        return answered

    def dose(self, coder: CrossLayerTranscoder, edits: Sequence[Edit], strength: float) -> tuple[Dose, list[Response]]:
        """The figures under edits at a strength, and the answers themselves; the same edits are not tried twice."""
        key = repr((fingerprint(coder), [edit.to_json() for edit in edits], strength))
        if key not in self.known:
            edit = under(self.model, coder, edits, strength)
            answers = self.ask(edit)
            self.known[key] = Dose(strength=strength, figures=figures(answers), kl=self.collateral.kl(edit)), answers
        return self.known[key]


def figures(responses: Sequence[Response]) -> dict[str, float]:
    """Every measure that these responses allow, by name."""
    found = {}
    for measure in (*HALLUCINATION, *RETAINED, POOLED[-1], *ALSO):
        above, below = measure.counts(responses).sum(1)
        if below:
            found[measure.name] = float(above / below)
    return found


def asked_again(responses: Sequence[Response]) -> list[Response]:
    """Of each image the captions, and of its questions one about something there and one about something absent.

    Where there are several, those about a planted partner come first, then adversarial ones: the answers that were
    given play no part.
    """

    def order(r: Response) -> tuple[bool, bool, str]:
        planted = r.pair is not None and r.object == r.pair[1]
        return not planted, ADVERSARIAL not in r.samplings, r.id

    chosen = [r for r in responses if r.kind == CAPTION]
    for same in group(responses, lambda r: (r.kind, r.image_id, r.object in r.truth)).values():
        if same[0].kind == QUESTION:
            chosen.append(min(same, key=order))
    return chosen
