"""Circuits against planted pairs, and graphs under other names: hand-made graphs whose scores are known."""

import numpy as np
import pytest

from crosslayer.attribution.paths import path_lengths
from crosslayer.attribution.roles import Role
from crosslayer.attribution.tally import Pruning, Tally, tally
from crosslayer.hallucination.circuits.parts import renamed, starts
from crosslayer.hallucination.circuits.planted import Naming, average_precision, rank_pairs, score_planted
from crosslayer.hallucination.circuits.standing import parts, patches
from crosslayer.hallucination.circuits.statistics import blocks, path_length, statistics
from crosslayer.hallucination.responses import Response
from crosslayer.zoo.emoji_llava.world import PAIRS, scenes
from making_graphs import random_graph

ALL = Pruning(node_threshold=1.0, edge_threshold=1.0)


def made(effects: dict[Role, float]) -> Tally:
    """A graph of roles with these effects, as much influence, and no edges."""
    effect = np.array(list(effects.values()))
    none = np.zeros(0)
    return Tally(
        id="x", label="", targets=("t",), value=1.0, replacement_score=0.9, completeness_score=0.9, left_out=0.0,
        edges_left_out=0.0, roles=tuple(effects), influence=np.abs(effect), effect=effect, kept=effect != 0,
        source=none.astype(int), target=none.astype(int), edge_influence=none, edge_effect=none,
    )  # fmt: skip


def patch(place):
    return Role("patch", None, None, place, "")


def word(text, place="answer"):
    return Role("token", None, None, place, text)


def naming(named, seen, hallucinated=True, words=None, features=None):
    """The naming of an object in a picture, and what each object's patch, and word, adds to it."""
    effects = {patch(name): effect for name, effect in seen.items()}
    effects |= {word(f" {name}"): effect for name, effect in (words or {}).items()}
    effects |= {Role("feature", 2, number, "last", ""): effect for number, effect in (features or {}).items()}
    places = dict(enumerate([*seen, *(f"background {i}" for i in range(9 - len(seen)))]))
    return Naming(tally=made(effects), object=named, hallucinated=hallucinated, places=places)


def test_pairs_are_ranked_by_patch_and_word_and_hits_counted():
    namings = []
    for lead, partner in PAIRS[:4]:
        namings += 2 * [naming(partner, {lead: 2.0, "star": 0.5}, words={lead: 1.0})]
    namings += 2 * [naming("moon", {"heart": 2.5, "moon": 9.0}, hallucinated=False)]
    namings += [naming("crown", {"gift": 99.0})]
    found = score_planted(namings, lambda layer, feature: ())
    assert [(s.object, s.named) for s in found.strengths[:4]] == sorted(PAIRS[:4])
    assert (found.strengths[4].object, found.strengths[4].total) == ("heart", 2.5)
    assert len(found.strengths) == 4 + 1 + 4  # gift was seen but once
    assert {cut.k: (cut.precision, cut.recall) for cut in found.cuts}[4] == (1.0, 0.5)
    assert {cut.k: (cut.precision, cut.recall) for cut in found.cuts}[8] == (0.5, 0.5)
    assert found.average_precision == 0.5


def test_sights_tell_leads_from_other_objects():
    namings = [naming("bone", {"dog": 3.0, "star": -1.0, "moon": 1.0}), naming("bone", {"dog": 1.0, "star": 4.0})]
    namings += [naming("gift", {"gift": 8.0, "dog": 2.0}, hallucinated=False)]
    found = {s.name: s for s in score_planted(namings, lambda layer, feature: ()).sights}
    assert found["lead, hallucinated"].share == pytest.approx(4 / 9)
    assert found["lead, hallucinated"].first == 0.5
    assert found["lead, hallucinated"].influence == pytest.approx(4 / 10)
    assert (found["other objects, hallucinated"].n, found["other objects, hallucinated"].patch) == (3, 4 / 3)
    assert found["named object, no partner"].share == 0.8
    assert "lead, true" not in found


def test_features_that_write_the_word_are_told_from_those_that_write_anothers():
    (found,) = score_planted(
        [naming("bone", {"dog": 1.0}, features={1: 3.0, 2: 1.0, 3: -5.0})],
        lambda layer, feature: {1: ("bone", "star"), 2: ("cheese",), 3: ()}[feature],
    ).writing
    assert (found.pair, found.features, found.by_chance) == (("dog", "bone"), 1, pytest.approx(1 / 7))
    assert found.effect == pytest.approx(3 / (3 + 1 - 5))


def test_average_precision_is_the_mean_precision_at_each_hit():
    assert average_precision(np.array([1, 0, 1, 0]), 4) == pytest.approx((1 + 2 / 3) / 4)


def test_other_names_add_up_what_becomes_one():
    whole = tally(random_graph(3), patches={0: "dog", 1: "star"}, pruning=ALL)
    found = renamed(whole, {"dog": "lead", "star": "lead", "w0": "word", "w1": "word"})
    assert len(found.roles) < len(whole.roles)
    for name in ("influence", "effect", "edge_influence", "edge_effect"):
        assert getattr(found, name).sum() == pytest.approx(getattr(whole, name).sum())
    at = found.roles.index(patch("lead"))
    both = [i for i, role in enumerate(whole.roles) if role.kind == "patch"]
    assert found.effect[at] == pytest.approx(whole.effect[both].sum())
    into = [i for i, source in enumerate(whole.source) if source in both]
    assert found.edge_effect[found.source == at].sum() == pytest.approx(whole.edge_effect[into].sum())
    assert starts(whole, {0: "dog"})["dog"].patch == whole.effect[whole.roles.index(patch("dog"))]


def test_path_lengths_from_roles_are_those_of_the_graph_when_nothing_but_inputs_begins():
    graph = random_graph(5)
    free = graph.keep(np.ones(len(graph.nodes), bool), np.ones(len(graph.edges.weight), bool))
    whole = tally(free, pruning=ALL)
    paths, at = 0.0, free.target_weight.double().numpy()
    for length in range(1, 9):
        at = free.causes.out_of(free.causes.share * at[free.causes.target])
        begins = np.ones(len(at), bool)
        begins[free.causes.target[free.causes.weight != 0]] = False
        paths += length * at[begins].sum()
    assert path_length(whole) == pytest.approx(paths)
    assert path_lengths(free).mean > 0


def test_statistics_do_not_know_what_stands_where():
    graph = random_graph(2)
    one, other = (tally(graph, patches=names, pruning=ALL) for names in ({0: "dog"}, {0: "star", 1: "moon"}))
    places = [["dog"], ["star", "moon"]]
    first, second = blocks([one, other], places, graph.n_layers)
    assert first.values[0] == pytest.approx(first.values[1])
    assert second.values[0] == pytest.approx(second.values[1])
    assert np.isfinite(statistics(one, graph.n_layers)).all()


def test_objects_stand_in_their_cells():
    scene = scenes("alone", 70, seed=3, split="test")[66]
    asked = {"prompt": "p", "kind": "caption", "image": None, "response": "a", "setting": "alone"}
    known = Response(id="x", image_id="test-3-alone-66", truth=scene.visible, **asked)
    found = patches(known)
    assert len(found) == 9
    assert {thing.cell: thing.name for thing in scene.objects}.items() <= found.items()
    assert patches(Response(id="x", image_id="test-3-alone-66", truth=("crown",) * 5, **asked)) == {}
    assert patches(Response(id="x", image_id="COCO_val2014_1.jpg", truth=(), **asked | {"setting": ""})) == {}
    assert parts("bone", ["dog", "bone", "star", "background 3"]) == {
        "dog": "lead", "bone": "named", "star": "other", "background 3": "background",
    }  # fmt: skip


def test_rankings_need_two_namings_of_a_pair():
    assert rank_pairs([naming("bone", {"dog": 1.0})]) == []
