"""Circuits from end to end on the bundled model, with a small random transcoder, and what is refused."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from crosslayer import UserError, Wiring
from crosslayer.attribution.contrast import Contrast, Difference, NodeChange
from crosslayer.attribution.roles import Role
from crosslayer.coders.transcoder import Provenance
from crosslayer.hallucination.asking import ask
from crosslayer.hallucination.circuits.cases import HALLUCINATED, TRUE, choose_sets, unsaid
from crosslayer.hallucination.circuits.find import CircuitSettings, find_circuits
from crosslayer.hallucination.circuits.looking import look
from crosslayer.hallucination.circuits.record import CIRCUITS, Circuit, features_of
from crosslayer.hallucination.circuits.writing import writes
from crosslayer.hallucination.decisions import as_batch, decisions
from crosslayer.hallucination.responses import RESPONSES, write_responses
from crosslayer.hallucination.scenes import scene_task
from crosslayer.hallucination.suppress.everything import read_features
from crosslayer.metrics import Figure
from crosslayer.models.load import load_model
from making import finished_coder
from test_cli import check_refused, run

__all__ = ["run"]


@pytest.fixture(scope="module")
def model():
    return load_model("emoji-llava")


@pytest.fixture(scope="module")
def coder():
    coder = finished_coder(Wiring.full(10), D=128, F=4)
    coder.with_thresholds(torch.full((10, 4), 4.0))
    coder.provenance = Provenance("emoji-llava", read="resid")
    return coder


@pytest.fixture(scope="module")
def answers(model, tmp_path_factory):
    """Captions of the bundled model, and their folder."""
    folder = tmp_path_factory.mktemp("answers")
    task = scene_task(70, questions=0)
    chosen = [query for query in task.queries if query.setting in ("alone", "together")]
    task.save_pictures(folder)
    responses = ask(model, chosen, folder, task.table, batch_prompts=70)
    write_responses(folder / RESPONSES, responses)
    return responses, folder


def test_each_hallucination_has_a_true_mention_of_its_object(model, answers):
    made = decisions(model, answers[0], unsaid)
    sets = choose_sets(made, 30, 0)
    assert len(sets[HALLUCINATED]) == len(sets[TRUE]) == 30
    assert all(d.hallucinated for d in sets[HALLUCINATED])
    assert not any(d.hallucinated for d in sets[TRUE])
    same = [h.mention.object == t.mention.object for h, t in zip(sets[HALLUCINATED], sets[TRUE], strict=True)]
    assert sum(same) > 25
    chosen = [d.response.image_id for some in sets.values() for d in some]
    assert len(set(chosen)) == len(chosen)


def test_what_would_be_said_without_a_mention_does_not_look_at_the_truth(answers):
    response = next(r for r in answers[0] if len(r.mentions) > 1)
    other = replace(response, truth=())
    mention = response.mentions[-1]
    assert unsaid(response, mention) == unsaid(other, replace(mention, hallucinated=True))


def test_a_look_sees_what_the_model_is_about_to_say(model, coder, answers):
    made = decisions(model, answers[0][:6], unsaid)[:8]
    found = look(model, coder, made, answers[1])
    decided = as_batch(model, made, answers[1])
    with torch.no_grad():
        logits = model.model(**decided.batch.inputs).logits[torch.arange(len(made)), decided.position].double()
    top = logits.topk(2).indices
    assert found.top.tolist() == top[:, 0].tolist() == [d.chosen for d in made]
    assert found.rival.tolist() == top[:, 1].tolist()
    rest = logits.scatter(1, top[:, :1], -torch.inf).logsumexp(1)
    assert found.log_odds == pytest.approx((logits.amax(1) - rest).numpy(), abs=1e-3)
    assert found.acts.shape == (len(made), 10 * 4)


def test_a_feature_writes_the_words_it_raises(model, coder):
    words = ("dog", "bone", "star", "moon")
    ids = model.processor.tokenizer.convert_tokens_to_ids(list(words))
    head, norm = model.model.get_output_embeddings().weight.double(), model.model.get_decoder().norm.weight.double()
    write = sum(coder.W_dec[3][2, t].double() for t in range(7))
    expected = ((head @ (norm * write))[ids]).topk(2).indices.tolist()
    assert list(writes(model, coder, words, 2)(3, 2)) == [words[i] for i in expected]


def test_the_verb_finds_circuits_and_goes_on_where_it_ended(run, model, coder, answers, tmp_path):
    coder.save(tmp_path / "run")
    out = tmp_path / "out"
    command = ["hallucination", "circuits", tmp_path / "run", answers[1], "--out", out, "--cases", 11]
    code, printed, err = run(*command)
    assert code == 0, err
    assert "lead, hallucinated" in printed
    assert "published for graph statistics: 0.68" in printed
    first = (out / CIRCUITS).read_bytes()
    record = json.loads(first)
    assert [circuit["moment"] for circuit in record["circuits"]] == ["decision", "naming"]
    assert record["counts"]["decision_hallucinated"] == record["counts"]["decision_true"] == 11
    assert "<svg" in (out / "circuits.html").read_text()
    check_refused(run(*command), "circuits.json: already exists", "--overwrite")
    (out / CIRCUITS).unlink()
    (out / "circuits" / "graphs" / "000003.json").unlink()
    assert run(*command)[0] == 0
    assert (out / CIRCUITS).read_bytes() == first
    other = finished_coder(Wiring.full(10), D=128, F=4, seed=1)
    with pytest.raises(UserError, match="was made with run"):
        find_circuits(model, other, answers[0], answers[1], out / "circuits", CircuitSettings(cases=11))


def test_pictures_of_which_nothing_is_known_may_be_pooled(model, coder, answers, tmp_path):
    unknown = [replace(response, setting="") for response in answers[0]]
    found, pooled = (
        find_circuits(model, coder, unknown, answers[1], tmp_path / str(n), CircuitSettings(cases=11, pool_patches=n))
        for n in (None, 1)
    )
    for one, other in zip(found.circuits, pooled.circuits, strict=True):
        assert other.margin.value == pytest.approx(one.margin.value, abs=1e-4)
        image, cell = (
            next(node for node in c.contrast.nodes if (node.role.kind, node.role.place) == ("patch", "image"))
            for c in (one, other)
        )
        assert cell.influence.here < image.influence.here
    with pytest.raises(UserError, match="is known, and graphs are compared by it; leave --pool-patches out"):
        find_circuits(model, coder, *answers, tmp_path / "known", CircuitSettings(cases=11, pool_patches=1))


def test_what_is_refused_leaves_no_folder(run, coder, answers, tmp_path):
    coder.save(tmp_path / "run")
    out = tmp_path / "out"
    command = ["hallucination", "circuits", tmp_path / "run", answers[1], "--out", out, "--cases", 11]
    check_refused(run(*command, "--pool-patches", 1), "leave --pool-patches out")
    assert not out.exists()


def change(kind, layer, feature, here, there, q):
    effect = Difference(here, there, Figure(here - there, here - there, here - there), q, q)
    role = Role(kind, layer, feature, "last", "")
    return NodeChange(influence=effect, effect=effect, active_here=1.0, active_there=1.0, change="", role=role)


def test_a_circuit_has_the_features_that_surely_raise_what_is_hallucinated_and_suppression_reads_them(tmp_path):
    nodes = (
        change("feature", 3, 17, 0.2, 0.1, 0.01),
        change("feature", 1, 5, 0.5, -0.1, 0.01),
        change("feature", 2, 7, 0.5, 0.1, 0.2),  # not surely
        change("feature", 2, 8, 0.1, 0.3, 0.01),  # more in true answers
        change("feature", 2, 9, -0.1, -0.3, 0.01),  # lowers the target
        change("patch", None, None, 2.0, 0.0, 0.01),
    )
    some = Figure(0.5, 0.4, 0.6)
    scores = dict.fromkeys(("replacement_score", "completeness_score", "margin", "margin_true"), some)
    circuit = Circuit(moment="naming", contrast=Contrast(9, 9, nodes, ()), drawn=(), **scores)
    found = features_of([circuit])
    (tmp_path / "circuits.json").write_text(json.dumps({"features": [asdict(f) for f in found]}))
    assert read_features(tmp_path / "circuits.json") == ((1, 5), (3, 17))


def test_what_cannot_be_used_is_refused(model, coder, answers, tmp_path):
    responses, folder = answers

    def find(some, **settings):
        return find_circuits(model, coder, some, folder, tmp_path, CircuitSettings(**settings))

    bare = [replace(r, mentions=tuple(replace(m, tokens=None) for m in r.mentions)) for r in responses]
    with pytest.raises(UserError, match="no response names an object at known tokens"):
        find(bare)
    with pytest.raises(UserError, match="no responses of kind question"):
        find(responses, about="question")
    with pytest.raises(UserError, match="5 images with hallucinated answers are too few .* at least 10 are needed"):
        find(responses, cases=5)
