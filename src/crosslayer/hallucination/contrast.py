"""Features that fire where a model hallucinates and not where it is right, ranked by what they add to the decision.

Only the images of the split `select` are looked at. Each hallucinated mention is compared with true ones of the same
object near the same position. What passes that test, with the false discovery rate held over all features and places,
is ranked by attribution to the decision, hallucinated minus true: firing beside a hallucination is not causing it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.distributed.crew import ALONE, Crew
from crosslayer.hallucination.beside import beside as look_beside
from crosslayer.hallucination.beside import best_match
from crosslayer.hallucination.comparing import Compared, compared
from crosslayer.hallucination.contrast_settings import ContrastSettings
from crosslayer.hallucination.decisions import Without
from crosslayer.hallucination.feature_table import Contrast, Feature
from crosslayer.hallucination.firing import PLACES
from crosslayer.hallucination.ranking import Ranked, Weighing, rank
from crosslayer.hallucination.responses import Response
from crosslayer.hallucination.showing import top_examples
from crosslayer.models.load import LoadedModel
from crosslayer.replacement.model import ReplacementModel

FIGURES = ("auroc", "q", "matched_auroc", "matched_q")
OBJECTS = 3
"""Objects that a feature is said to add most to."""


def contrast(
    model: LoadedModel,
    coder: CrossLayerTranscoder,
    responses: Sequence[Response],
    folder: str | Path = ".",
    settings: ContrastSettings | None = None,
    *,
    run: str = "",
    without: Without | None = None,
    beside: Mapping[str, CrossLayerTranscoder] | None = None,
    crew: Crew = ALONE,
) -> Contrast:
    """The table of features of one run.

    Args:
        model: the language model that the responses are of.
        coder: its transcoder.
        responses: labelled, as `crosslayer hallucination score` writes them; those of other splits are left alone.
        folder: that of their file, which the paths of their pictures start from.
        settings: how to compare.
        run: where the transcoder comes from, for the record.
        without: tells what a caption would be without a mention, where that is known; see `decisions`.
        beside: other runs of the same model, by name, to look for the same features in.
        crew: the processes that share the passes of the model; all of them have the table.

    Raises:
        UserError: for a run of another model, labels that do not fit the responses, or too few of them.
    """
    s, folder, runs = settings or ContrastSettings(), Path(folder), beside or {}
    for each in (coder, *runs.values()):
        ReplacementModel(model, each)  # refuses one that was trained on a model of another shape
    found = compared(
        model, responses, about=s.about, near=s.near, at_least=s.at_least, split_seed=s.split_seed, without=without
    )
    ours, *theirs = [rank(model, each, found, folder, s, crew) for each in (coder, *runs.values())]
    others = dict(zip(runs, theirs, strict=True))
    table = _with_examples(model, coder, found, _features(ours, coder, s, others), folder, s, crew)
    return Contrast(
        model=model.id,
        run=run,
        settings=asdict(s),
        **_counts(found, ours),
        left_out=found.left_out,
        margin=ours.traced.changes(ours.causes.margin[:, None])[0],
        alive=int(ours.tests.alive.sum()),
        tests=int(np.isfinite(ours.tests.q).sum()),
        passing=int(ours.passes.sum()),
        features=tuple(table),
        beside=tuple(look_beside(name, ours, other, s.top) for name, other in others.items()),
    )


def _counts(found: Compared, ours: Ranked) -> dict[str, int]:
    h, matched, traced = found.hallucinated, found.matched, ours.traced.compared.hallucinated
    counts = {"": h, "matched_": h[matched], "traced_": traced}
    both = {f"{name}hallucinated": int(part.sum()) for name, part in counts.items()}
    both |= {f"{name}true": int((~part).sum()) for name, part in counts.items()}
    return {"responses": len(_responses(found)), **both}


def _responses(found: Compared) -> list[Response]:
    return list({decision.response.id: decision.response for decision in found.decisions}.values())


def _with_examples(
    model: LoadedModel,
    coder: CrossLayerTranscoder,
    found: Compared,
    table: list[Feature],
    folder: Path,
    s: ContrastSettings,
    crew: Crew,
) -> list[Feature]:
    """The table with examples of its top."""
    if not s.examples:
        return table
    top, rest = table[: s.top], table[s.top :]
    places = [(coder.sources.index(feature.layer), feature.feature) for feature in top]
    how = {"n": s.examples, "batch_prompts": s.batch_prompts, "crew": crew}
    shown = top_examples(model, coder, _responses(found), places, folder, **how)
    return [*(replace(feature, examples=some) for feature, some in zip(top, shown, strict=True)), *rest]


def _features(
    ours: Ranked, coder: CrossLayerTranscoder, s: ContrastSettings, others: Mapping[str, Ranked]
) -> list[Feature]:
    """The rows of the table, without examples."""
    chosen = ours.order[: s.rows]
    total, image = (part[:, chosen].toarray() for part in (ours.causes.total, ours.causes.image))
    weighing = Weighing(ours.compared, s.resamples, s.seed)
    fired = np.stack(np.split(ours.activations(chosen.tolist()) > 0, len(PLACES))).astype(np.float64)  # [L, N, K]
    places = ours.tests.place[chosen]
    frequency = weighing.changes(fired[places, :, np.arange(len(chosen))].T)
    attribution, from_image = ours.traced.changes(total), ours.traced.means(image)
    fires = [dict(zip(PLACES, weighing.means(fired[:, :, k].T), strict=True)) for k in range(len(chosen))]
    match = {name: best_match(ours, other, chosen[: s.top].tolist()) for name, other in others.items()}
    auroc, q, matched_auroc, matched_q = (ours.tests.best(name)[chosen].tolist() for name in FIGURES)
    return [
        Feature(
            rank=k + 1,
            layer=coder.sources[column // coder.d_transcoder],
            feature=int(column % coder.d_transcoder),
            place=tuple(PLACES)[places[k]],
            passes=bool(ours.passes[column]),
            frequency=frequency[k],
            attribution=attribution[k],
            from_image=from_image[k][0],
            stability=float(ours.stability[column]),
            modality=float(ours.firing.modality.flat[column]),
            fires=fires[k],
            objects=_objects(ours, total[:, k]),
            match={name: float(r[k]) for name, r in match.items() if k < len(r)},
            auroc=auroc[k],
            q=q[k],
            matched_auroc=matched_auroc[k],
            matched_q=matched_q[k],
        )
        for k, column in enumerate(chosen.tolist())
    ]


def _objects(ours: Ranked, total: Float64[np.ndarray, " n"]) -> dict[str, float]:
    """The hallucinated objects that a feature adds most to, with the mean over their decisions."""
    these = ours.traced.compared
    sums: dict[str, list[float]] = {}
    for decision, value in zip(these.decisions, total, strict=True):
        if decision.hallucinated:
            sums.setdefault(decision.mention.object, []).append(float(value))
    means = sorted(((sum(v) / len(v), name) for name, v in sums.items()), reverse=True)
    return {name: mean for mean, name in means[:OBJECTS] if mean > 0}
