"""The list of bad rows: what is in it, when they are too many, and how it survives a run's end."""

import json

import pytest
import torch
from PIL import Image

from crosslayer import JointTopK, TrainConfig, UserError, Wiring, evaluate, load_data, train, workflow
from crosslayer.activations.capture import ModelSource
from crosslayer.data.skipped import SKIPPED, Skipped
from crosslayer.models.prompts import prepare_good
from making import finished_coder


@pytest.fixture
def mixed(tmp_path):
    """60 rows of pictures and prompts; three are damaged in ways that show only in use."""
    Image.effect_noise((64, 64), 50).save(tmp_path / "fine.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "fine.png").read_bytes()[:-900])
    rows = [{"prompt": "is there a dog ?", "image": "fine.png", "response": "no"} for _ in range(60)]
    rows[4]["image"] = rows[30]["image"] = "cut.png"
    rows[9]["prompt"] = "a cat " * 90
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "rows.jsonl"


BAD = ["rows.jsonl:5", "rows.jsonl:10", "rows.jsonl:31"]


def listed(file) -> list[str]:
    return [json.loads(line)["row"] for line in file.read_text().splitlines()]


def test_a_batch_is_made_of_the_good_examples(llava, mixed):
    data = load_data(mixed)
    for _ in range(2):  # known or not, bad ones are left out alike
        batch, good = prepare_good(llava.model, llava.processor, data, [3, 4, 9, 10, 3])
        assert good == [3, 10, 3]
        assert len(batch.tokens) == 3
        assert prepare_good(llava.model, llava.processor, data, [4, 9]) == (None, [])
    assert data.skipped.reasons.keys() == set(BAD[:2])
    assert "cut.png: the image is damaged" in data.skipped.reasons["rows.jsonl:5"]
    assert "the model's context holds 128; shorten prompt or response" in data.skipped.reasons["rows.jsonl:10"]


def test_examples_that_nobody_takes_notes_of_are_refused(llava, mixed):
    data = load_data(mixed)
    with pytest.raises(UserError, match="the image is damaged"):
        prepare_good(llava.model, llava.processor, list(data), range(10))


def test_too_many_stop_the_run(llava, mixed):
    data = load_data(mixed, bad_share=0.04)
    with pytest.raises(
        UserError,
        match="3 of 60 rows are bad, more than --bad-share 0.04 allows; a larger share would list them; the first",
    ):
        prepare_good(llava.model, llava.processor, data, range(60))


def test_few_rows_say_nothing_yet():
    skipped = Skipped(0.05)
    for i in range(5):
        skipped.note(str(i), "bad")
        skipped.look(1, 1000, "data")
    skipped.note("5", "worse")
    with pytest.raises(UserError, match="data: 6 of 100 rows are bad, more than --bad-share 0.05 allows; .*: bad"):
        skipped.look(1, 1000, "data")


def test_the_list_goes_on_after_a_torn_line(tmp_path):
    file, first = tmp_path / SKIPPED, Skipped()
    first.note("a", "no image")
    first.list_in(file)
    first.note("b", "too long")
    first.note("b", "too long")
    with file.open("a") as torn:
        torn.write('{"row": "c", "rea')
    again = Skipped(0.0)
    again.list_in(file, resume=True)
    assert again.reasons == {"a": "no image", "b": "too long"}
    again.look(50, 50, "data")  # what an earlier life has put up with is not counted again
    again.note("d", "empty")
    assert listed(file) == ["a", "b", "d"]
    assert str(again) == f"3 bad rows skipped, listed in {file}"
    Skipped().list_in(file)
    assert not file.exists()


def config() -> TrainConfig:
    small = {"tokens": 800, "batch_tokens": 80, "calibration_tokens": 100, "density_tokens": 50}
    return TrainConfig(wiring=Wiring.full(3), sparsity=JointTopK(6), d_transcoder=16, **small)


def test_a_training_lists_them_in_its_run_and_resumes_alike(llava, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(workflow, "ModelSource", lambda *a, **k: ModelSource(*a, **k, chunk_prompts=12))
    train(llava, load_data(mixed), config(), tmp_path / "whole")
    assert sorted(listed(tmp_path / "whole" / SKIPPED)) == sorted(BAD)
    interrupted, steps = load_data(mixed), []

    def stop(i: int, make=interrupted.make):
        steps.append(i)
        if len(steps) == 45:
            raise KeyboardInterrupt
        return make(i)

    object.__setattr__(interrupted, "make", stop)
    with pytest.raises(KeyboardInterrupt):
        train(llava, interrupted, config(), tmp_path / "broken", checkpoint_seconds=0.0)
    train(llava, load_data(mixed), config(), tmp_path / "broken", resume=True)
    for name in (SKIPPED, "model.safetensors"):
        whole, broken = ((tmp_path / run / name).read_bytes() for run in ("whole", "broken"))
        assert sorted(whole.splitlines()) == sorted(broken.splitlines()), name


def test_the_same_chunk_holds_the_same_tokens_whatever_is_known(llava, mixed):
    one, other = (ModelSource(llava, load_data(mixed), chunk_prompts=20) for _ in range(2))
    one.chunk(0)
    for name in ("x", "y", "sample", "position"):
        assert torch.equal(getattr(one.chunk(1), name), getattr(other.chunk(1), name))
    assert set(range(60)) - set(torch.cat([one.chunk(i).sample for i in range(3)]).tolist()) == {4, 9, 30}


def test_a_chunk_of_bad_examples_is_empty(llava, mixed):
    data = load_data(mixed, bad_share=1.0)
    source = ModelSource(llava, data, batch_prompts=1, chunk_prompts=60)
    lengths = [len(part) for part in source.captured(source.batches(0))]
    assert lengths.count(0) == 3
    assert len(lengths) == 60


def test_an_evaluation_leaves_them_out(llava, mixed):
    data = load_data(mixed, bad_share=0.5)[:12]
    result = evaluate(llava, finished_coder(Wiring.full(3)), data, max_new_tokens=2)
    assert result.n_prompts == 10
    assert data.skipped.reasons.keys() == set(BAD[:2])
