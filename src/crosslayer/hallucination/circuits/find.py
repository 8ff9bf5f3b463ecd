"""Find the circuits of hallucination: graphs of hallucinated and true answers, aggregated, compared, and put to use.

Only the images of the split `select` are looked at.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from crosslayer.attribution.aggregate import Aggregate
from crosslayer.attribution.many import Tracing, Workers, aggregate
from crosslayer.attribution.tally import Tally
from crosslayer.coders.transcoder import CrossLayerTranscoder
from crosslayer.distributed.crew import ALONE, Crew
from crosslayer.errors import UserError
from crosslayer.hallucination.circuits.cases import (
    DECISION,
    HALLUCINATED,
    NAMING,
    TRUE,
    Asked,
    asked,
    choose_sets,
    unsaid,
)
from crosslayer.hallucination.circuits.foresight import Block, Foresight, check_enough, foresee
from crosslayer.hallucination.circuits.looking import Looks, look
from crosslayer.hallucination.circuits.parts import TARGET, renamed
from crosslayer.hallucination.circuits.planted import WORDS, Naming, Planted, score_planted
from crosslayer.hallucination.circuits.record import Circuit, Circuits, Drawn, features_of
from crosslayer.hallucination.circuits.standing import LEAD_OF, parts
from crosslayer.hallucination.circuits.statistics import blocks
from crosslayer.hallucination.circuits.writing import writes
from crosslayer.hallucination.decisions import Decision, decisions
from crosslayer.hallucination.responses import Response
from crosslayer.hallucination.splits import split_responses
from crosslayer.models.load import LoadedModel
from crosslayer.replacement.model import ReplacementModel
from crosslayer.zoo.emoji_llava.world import OBJECTS

SHOWN_NODES, SHOWN_EDGES = 40, 80
"""Of a circuit that is drawn."""
ACTIVE = 256
"""Features whose activations a classifier sees."""


@dataclass(frozen=True, kw_only=True)
class CircuitSettings:
    """Which answers are traced, and how."""

    about: str = "caption"
    """Kind of responses: caption or question."""
    cases: int = 80
    """Hallucinated mentions at most; as many true ones, and half as many of objects that are never hallucinated."""
    share: float = 0.2
    """Nodes and edges are compared that the circuits of this share of the graphs have."""
    max_features: int | None = None
    """Features with a row of their own in each graph, the most influential first; or all."""
    max_positions: int | None = None
    """Rows only at so many positions of each graph, the most influential."""
    pool_patches: int | None = None
    """Take image patches together in N x N cells; not where it is known what stands in each."""
    seed: int = 0
    """Of the choice of answers, of folds and of bootstraps."""
    split_seed: int = 0
    """Of the splits; the same in every stage."""

    def __post_init__(self):
        if self.about not in ("caption", "question"):
            raise UserError(f"about is {self.about}; choose caption or question")
        if self.cases < 1:
            raise UserError(f"cases is {self.cases}; choose at least 1")


def find_circuits(
    model: LoadedModel,
    coder: CrossLayerTranscoder,
    responses: Sequence[Response],
    folder: str | Path,
    out: str | Path,
    settings: CircuitSettings | None = None,
    *,
    run: str = "",
    workers: Workers | None = None,
    crew: Crew = ALONE,
) -> Circuits:
    """The circuits of one run.

    Args:
        model: the language model that the responses are of.
        coder: its transcoder.
        responses: labelled, as `crosslayer hallucination score` writes them; those of other splits are left alone.
        folder: that of their file, which the paths of their pictures start from.
        out: a folder for the graphs; those that are there already are taken up.
        settings: which answers, and how.
        run: where the transcoder comes from, for the record.
        workers: processes to share the work.
        crew: the same of torchrun; all of them have the result.

    Raises:
        UserError: for a run of another model, responses without token spans, too few of them, with how many it would
            take, or graphs that were made otherwise.
    """
    s, folder = settings or CircuitSettings(), Path(folder)
    ReplacementModel(model, coder)  # refuses one that was trained on a model of another shape
    sets = _sets(model, responses, s)
    looks = look(model, coder, [d for some in sets.values() for d in some], folder, crew)
    graphs = asked(sets, looks, getattr(model.processor, "tokenizer", model.processor), folder)
    _check_sets(graphs)
    if s.pool_patches is not None and any(graph.case.patches for graph in graphs):
        raise UserError(
            "what stands in each patch of these pictures is known, and graphs are compared by it; "
            "leave --pool-patches out"
        )
    tracing = Tracing(features=s.max_features, positions=s.max_positions, pool_patches=s.pool_patches)
    cases = [graph.case for graph in graphs]
    found = aggregate(
        model, coder, cases, out, run=run, tracing=tracing, share=s.share, seed=s.seed, workers=workers, crew=crew
    ).tallies
    moments = [moment for moment in (DECISION, NAMING) if any(graph.moment == moment for graph in graphs)]
    circuits = tuple(_circuit(moment, graphs, found, s) for moment in moments)
    return Circuits(
        model=model.id,
        run=run,
        settings=asdict(s),
        counts=_counts(sets, graphs),
        circuits=circuits,
        features=features_of(circuits),
        foresight=_foresight(model, sets, looks, graphs, found, s),
        planted=_planted(model, coder, graphs, found),
    )


def _sets(model: LoadedModel, responses: Sequence[Response], s: CircuitSettings) -> dict[str, list[Decision]]:
    """The decisions of each set."""
    kind = [response for response in responses if response.kind == s.about]
    if not kind:
        raise UserError(f"there are no responses of kind {s.about}; score some, or choose the other kind with --about")
    bundled = all(response.setting for response in kind)
    made = decisions(model, split_responses(kind, seed=s.split_seed)["select"], unsaid if bundled else None)
    return choose_sets(made, s.cases, s.seed)


def _check_sets(graphs: Sequence[Asked]) -> None:
    check_enough(*_labels([graph for graph in graphs if graph.moment == DECISION]))


def _labels(graphs: Sequence[Asked]) -> tuple[np.ndarray, np.ndarray]:
    """Of each graph whether its mention is hallucinated, and the number of its image."""
    hallucinated = np.array([graph.decision.hallucinated for graph in graphs], bool)
    images = np.unique([graph.decision.response.image_id for graph in graphs], return_inverse=True)[1]
    return hallucinated, images


def _counts(sets: dict[str, list[Decision]], graphs: Sequence[Asked]) -> dict[str, int]:
    made = Counter(f"{graph.moment}_{graph.set}" for graph in graphs)
    traced = {id(graph.decision) for graph in graphs}
    return {**made, "left_out": sum(id(d) not in traced for some in sets.values() for d in some)}


def _circuit(moment: str, graphs: Sequence[Asked], found: Sequence[Tally], s: CircuitSettings) -> Circuit:
    """Hallucinated against true graphs, objects called by what they are to the mention."""
    chosen = [
        (graph, renamed(tally, _parts(graph)))
        for graph, tally in zip(graphs, found, strict=True)
        if graph.moment == moment
    ]
    here, there = (
        Aggregate(tallies=tuple(t for graph, t in chosen if graph.set == name), share=s.share, seed=s.seed)
        for name in (HALLUCINATED, TRUE)
    )
    pairs = dict.fromkeys(graph.decision.mention.object for graph, _ in chosen if graph.set == HALLUCINATED)
    by_pair = {
        f"{LEAD_OF[name]} → {name}": tuple(
            t for graph, t in chosen if graph.set == HALLUCINATED and graph.decision.mention.object == name
        )
        for name in LEAD_OF
        if name in pairs and any(graph.case.patches for graph, _ in chosen)
    }
    drawn = [_drawn(name, replace(here, tallies=some, share=0.5)) for name, some in by_pair.items()]
    scores = here.scores
    return Circuit(
        moment=moment,
        replacement_score=scores["replacement_score"],
        completeness_score=scores["completeness_score"],
        margin=scores["value"],
        margin_true=there.scores["value"],
        contrast=here.contrast(there),
        drawn=(_drawn("all hallucinated", here), *drawn),
    )


def _drawn(name: str, found: Aggregate) -> Drawn:
    nodes = found.nodes[:SHOWN_NODES]
    shown = {row.role for row in nodes} | {TARGET}
    edges = [row for row in found.edges if row.source in shown and row.target in shown]
    return Drawn(name=name, n=len(found), nodes=nodes, edges=tuple(edges[:SHOWN_EDGES]))


def _parts(graph: Asked) -> dict[str, str]:
    """What places and words are to a graph's mention."""
    if not graph.case.patches:
        return {}
    named = graph.decision.mention.object
    return parts(named, [*graph.case.patches.values(), *OBJECTS])


def _foresight(
    model: LoadedModel,
    sets: dict[str, list[Decision]],
    looks: Looks,
    graphs: Sequence[Asked],
    found: Sequence[Tally],
    s: CircuitSettings,
) -> tuple[Foresight, ...]:
    """Classifiers that see what is known before the decision's token is given."""
    row = {id(d): i for i, d in enumerate(d for some in sets.values() for d in some)}
    chosen = [(graph, tally) for graph, tally in zip(graphs, found, strict=True) if graph.moment == DECISION]
    rows = [row[id(graph.decision)] for graph, _ in chosen]
    hallucinated, image = _labels([graph for graph, _ in chosen])
    places = [list(graph.case.patches.values()) for graph, _ in chosen]
    graph_blocks = blocks([tally for _, tally in chosen], places, len(model.sites.layers))
    probability = Block(looks.log_odds[rows, None])
    activations = Block(looks.acts[rows].astype(float), ACTIVE)
    place = Block(np.array([[float(graph.decision.place)] for graph, _ in chosen]))
    columns = {
        "probability of the token": [probability],
        "place in the answer": [place],
        "activations": [activations],
        "graph": graph_blocks,
        "graph and activations": [*graph_blocks, activations],
    }
    return foresee(columns, hallucinated, image, s.seed)


def _planted(
    model: LoadedModel, coder: CrossLayerTranscoder, graphs: Sequence[Asked], found: Sequence[Tally]
) -> Planted | None:
    """The score against what is planted, where it is known what stands where."""
    namings = [
        Naming(
            tally=tally,
            object=graph.decision.mention.object,
            hallucinated=graph.decision.hallucinated,
            places=graph.case.patches,
        )
        for graph, tally in zip(graphs, found, strict=True)
        if graph.moment == NAMING and graph.case.patches
    ]
    return score_planted(namings, writes(model, coder, OBJECTS, WORDS)) if namings else None
