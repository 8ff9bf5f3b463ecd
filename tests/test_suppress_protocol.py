"""The protocol from end to end on a tiny model: stages end in files, and the test is run once."""

import json
import shutil
import sys
from dataclasses import replace

import pytest

import crosslayer as xl
from crosslayer import Ablate, Intervention, Part, UserError, cli
from crosslayer.hallucination.responses import read_responses, write_responses
from crosslayer.hallucination.suppress.calibration import Calibration
from crosslayer.hallucination.suppress.everything import Contest, Plan, read_features
from crosslayer.hallucination.suppress.objective import Weighing
from crosslayer.hallucination.suppress.protocol import Protocol, Trial
from crosslayer.hallucination.synonyms import EMOJI, load_table
from crosslayer.verbs.suppress_tables import suppress_tables
from making import finished_coder
from test_suppress import response

PLAN = Plan(steps=2, at_most=4, ranked=2, sets=1)
SETTINGS = Protocol(
    weighing=Weighing(cases=8, clean=2, at_least=2, slack=20.0, collateral=0.1),
    calibration=Calibration(strengths=(-1.0, 0.0, 1.0), points=100.0),
    clean=2,
    control_images=4,
    at_least=1,
)


@pytest.fixture(scope="module")
def model(llama):
    return llama


@pytest.fixture(scope="module")
def coder():
    return finished_coder(xl.Wiring.full(3), F=16)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Made-up responses about 60 images, on a third of which there is hallucination."""
    out = tmp_path_factory.mktemp("results") / "out"
    made = []
    for i in range(60):
        truth = "cat dog" if i % 3 else "cat"
        asked = response(model, f"{i}:dog", "question", "yes .", truth, object="dog")
        made += [response(model, i, "caption", "a cat and a dog .", truth), replace(asked, image_id=str(i))]
        made[-2:] = [replace(r, prompt=f"{r.prompt} a bus") for r in made[-2:]] if i % 3 else made[-2:]
    write_responses(out / "responses.jsonl", made)
    return out


def trial(model, folder, settings=SETTINGS, **more):
    return Trial(model, read_responses(folder / "responses.jsonl"), folder, load_table(EMOJI), settings, **more)


def contest(trial, coder):
    return Contest(trial=trial, coder=coder, plan=PLAN, beside=coder, circuit=((0, 1), (2, 2)))


@pytest.fixture(scope="module")
def first(model, coder, folder):
    return contest(trial(model, folder), coder).result()


def test_every_method_ends_in_a_file_and_the_edit_loads_on_the_original(model, coder, folder, first):
    record = json.loads((folder / "suppress.json").read_text())
    methods = ["descent", "ranked", "circuit", "beside", "mean-difference", "probe"]
    assert list(record["outcomes"]) == methods
    before = read_responses(folder / "suppress" / "before.jsonl")
    for outcome in first.outcomes:
        after = read_responses(folder / "suppress" / f"{outcome.method}.jsonl")
        assert [r.id for r in after] == [r.id for r in before]
        assert [d.strength for d in outcome.doses] == ([-1.0, 0.0, 1.0] if outcome.edits else [0.0])
        assert (outcome.tests, outcome.test is None) == (1, False)
    kept = first.outcome(first.kept)
    file = xl.EditFile.load(folder / "edit.json")
    assert [e.to_json() for e in file.interventions] == [e.to_json() for e in kept.edits]
    assert file.strength == kept.strength
    images = {r.image_id for r in before}
    assert not images & {d.response.image_id for d in trial(model, folder).objective.hallucinated}
    shown = suppress_tables(first)
    assert f"{first.kept} *" in shown
    assert [word for word in (*methods, *first.chance, "at equal KL") if word not in shown] == []


def test_what_is_finished_is_read_and_not_run_again(model, coder, folder, first, monkeypatch):
    again = trial(model, folder)
    monkeypatch.setattr(type(again), "_tested", None)  # whoever calls it fails
    monkeypatch.setattr(type(again), "_calibrated", None)
    monkeypatch.setattr(type(again), "_chosen", None)
    second = contest(again, coder).result()
    assert [o.test for o in second.outcomes] == [o.test for o in first.outcomes]
    assert second.chance == first.chance


def test_what_is_done_piece_by_piece_is_the_whole(model, coder, folder, first, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(folder / "responses.jsonl", out)
    for names in contest(trial(model, out), coder).rounds:
        for name in names:
            contest(trial(model, out), coder).do(name)
    last = trial(model, out)
    monkeypatch.setattr(type(last), "_chosen", None)  # whoever calls it fails
    found = contest(last, coder).result()
    assert [o.test for o in found.outcomes] == [o.test for o in first.outcomes]
    assert (found.kept, found.chance) == (first.kept, first.chance)


def test_all_methods_act_at_the_positions_asked_for(model, coder, folder, tmp_path):
    shutil.copy(folder / "responses.jsonl", tmp_path)
    plan = replace(PLAN, where="answer", sets=0)
    tried = Contest(trial=trial(model, tmp_path), coder=coder, plan=plan, beside=coder, circuit=((0, 1), (2, 2)))
    edits = {outcome.method: outcome.edits for outcome in tried.result().outcomes}
    assert [method for method, some in edits.items() if not some] == []
    assert {edit.where for some in edits.values() for edit in some} == {Part("answer")}
    with pytest.raises(UserError, match="a part is 'end'; choose one of image, text, answer"):
        Plan(where="end")


def test_what_an_outcome_depends_on_is_told_alike_in_every_process(model, coder, folder):
    methods = contest(trial(model, folder), coder).ours | contest(trial(model, folder), coder).baselines
    assert not [name for name, method in methods.items() if " at 0x" in repr(method.strategy)]


def test_a_second_test_with_other_settings_is_refused_or_counted(model, coder, folder, first, tmp_path):
    shutil.copytree(folder, tmp_path / "out")
    other = Plan(steps=1, at_most=3, ranked=2, sets=0)
    with pytest.raises(UserError, match=r"descent.json: was tested .* --again"):
        Contest(trial=trial(model, tmp_path / "out"), coder=coder, plan=other).result()
    second = Contest(trial=trial(model, tmp_path / "out", again=True), coder=coder, plan=other).result()
    assert second.outcome("descent").tests == 2


def test_an_edit_is_generated_beside_the_original(llama_folder, tmp_path, monkeypatch, capsys):
    model, coder = xl.load_model(llama_folder), finished_coder(xl.Wiring.full(3))
    coder.provenance = type(coder.provenance)(str(llama_folder))
    coder.save(tmp_path / "run")
    edits = [Intervention(layer=s, feature=f, action=Ablate(), where=Part("text")) for s in range(3) for f in range(24)]
    xl.EditFile.of(model, coder, edits).save(tmp_path / "edit.json")
    ask = ["crosslayer", "generate", str(tmp_path / "run"), "--prompt", "a cat", "--max-new-tokens", "4", "--edit"]
    monkeypatch.setattr(sys, "argv", [*ask, str(tmp_path / "edit.json")])
    cli.main()
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.strip().splitlines())
    assert list(lines) == ["original", "replacement", "edited"]
    assert lines["original"] != lines["edited"]
    finished_coder(xl.Wiring.full(3), seed=1).save(tmp_path / "other")
    ask[2] = str(tmp_path / "other")
    monkeypatch.setattr(sys, "argv", [*ask, str(tmp_path / "edit.json"), "--model", str(llama_folder)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "these edits are for run" in capsys.readouterr().err


def test_features_are_read_from_records(tmp_path):
    path = tmp_path / "circuit.json"
    for text in ('[{"layer": 1, "feature": 2}]', '{"features": [{"layer": 1, "feature": 2, "q": 0.1}]}'):
        path.write_text(text)
        assert read_features(path) == ((1, 2),)
    for text, why in (("[]", "no features"), ('[{"layer": 1}]', "no layer and number"), ("{}", "no features")):
        path.write_text(text)
        with pytest.raises(UserError, match=why):
            read_features(path)
