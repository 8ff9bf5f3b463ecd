"""From a model and data to a run on disk: what is written, and what is refused before anything is lost."""

import json
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch

import crosslayer
from crosslayer import (
    CrossLayerTranscoder,
    Example,
    JointTopK,
    JumpReLU,
    ReLU,
    ReplacementModel,
    TopK,
    TrainConfig,
    UserError,
    Wiring,
    evaluate,
    train,
    workflow,
)
from crosslayer.activations.capture import ModelSource
from crosslayer.data.examples import Examples
from crosslayer.data.skipped import Skipped
from crosslayer.training.fit import Interrupted
from crosslayer.training.state import STATE
from crosslayer.workflow import with_metrics
from making import Watched, text_examples


def config(**settings) -> TrainConfig:
    defaults = {"wiring": Wiring.full(3), "sparsity": JointTopK(12), "tokens": 3000, "batch_tokens": 250}
    return TrainConfig(calibration_tokens=500, **{**defaults, **settings})


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(workflow, "ModelSource", partial(ModelSource, chunk_prompts=80))


def test_the_public_names_are_there():
    assert all(hasattr(crosslayer, name) for name in crosslayer.__all__)
    assert len(set(crosslayer.__all__)) == len(crosslayer.__all__)


@pytest.mark.parametrize("sparsity", [JointTopK(12), TopK(4), ReLU(), JumpReLU()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("wiring", [Wiring.full(3), Wiring.full(3, first_target=1)], ids=str)
def test_a_run_is_trained_saved_and_put_in_place(llama, tmp_path, wiring, sparsity):
    trained = train(llama, text_examples(40), config(wiring=wiring, sparsity=sparsity), tmp_path / "run")
    loaded, x = CrossLayerTranscoder.load(tmp_path / "run"), torch.randn(7, 3, 32)
    assert torch.equal(loaded(x), trained(x))
    assert torch.equal(loaded.first_write, trained.first_write)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "metrics.jsonl", "model.safetensors"]
    assert ReplacementModel(llama, loaded).generate("a cat", max_new_tokens=3) is not None


def test_trainings_at_once_are_those_alone_on_one_stream(llama, tmp_path, monkeypatch):
    wirings = {"clt": Wiring.full(3), "plt": Wiring.per_layer(3)}
    configs = {name: config(wiring=wiring) for name, wiring in wirings.items()}
    for name, settings in configs.items():
        train(llama, text_examples(40), settings, tmp_path / "alone" / name)
    chunks: list[int] = []
    own_batches = ModelSource._own_batches
    monkeypatch.setattr(ModelSource, "_own_batches", lambda self, i: chunks.append(i) or own_batches(self, i))
    together = {tmp_path / "together" / name: settings for name, settings in configs.items()}
    data = Watched(text_examples(40), 200, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(
        Interrupted, match=r"stopped after [\d,]+ and [\d,]+ tokens; the same once more goes on from there"
    ):
        workflow.train_at_once(llama, data, together)
    assert all((run / STATE).exists() for run in together)
    assert chunks == sorted(set(chunks))
    workflow.train_at_once(llama, text_examples(40), together)
    for run in together:
        assert_same_files(run, tmp_path / "alone" / run.name, ("model.safetensors", "metrics.jsonl"))
    with pytest.raises(UserError, match=r"seeds are \[0, 1\]"):
        workflow.train_at_once(llama, data, {tmp_path / str(seed): config(seed=seed) for seed in (0, 1)})


def with_a_bad_one(folder):
    """The tiny Llama, and texts one of which is none for it."""
    texts = [*text_examples(39), Example("long", "a " * 2000, "no")]
    return crosslayer.load_model(folder), Examples("texts", len(texts), texts.__getitem__)


def test_another_process_may_run_the_model(llama_folder, tmp_path):
    model, data = with_a_bad_one(llama_folder)
    for name, load in (("here", None), ("elsewhere", partial(with_a_bad_one, llama_folder))):
        workflow.train_at_once(model, replace(data, skipped=Skipped()), {tmp_path / name: config()}, load=load)
    names = ("model.safetensors", "metrics.jsonl", "skipped.jsonl")
    assert_same_files(tmp_path / "elsewhere", tmp_path / "here", names)


def assert_same_files(found, wanted, names):
    for name in names:
        assert (found / name).read_bytes() == (wanted / name).read_bytes()


def test_training_explains_the_mlps_of_fresh_prompts(llava, tmp_path):
    data = crosslayer.load_data("emoji-scenes", n=40)
    coder = train(llava, data, config(tokens=9000, learning_rate=5e-3), tmp_path / "run")
    untrained = train(llava, data, config(tokens=1, learning_rate=1e-9), tmp_path / "none")
    fresh = crosslayer.load_data("emoji-scenes", n=8, split="test")
    scores = [evaluate(llava, c, fresh, max_new_tokens=2) for c in (coder, untrained)]
    assert scores[0].fvu.value < 0.75 * scores[1].fvu.value
    assert scores[0].kl.value < scores[1].kl.value


def test_a_run_says_where_it_comes_from(llama, tmp_path):
    train(llama, text_examples(40), config(seed=4), tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["wiring"] == {"n_layers": 3, "span": 3, "first_target": 0}
    assert record["sparsity"]["kind"] == "jumprelu"
    came_from = record["provenance"]
    assert (came_from["model_id"], came_from["read"]) == (llama.id, "resid")
    settings, counted = came_from["training"]["config"], came_from["training"]["counted"]
    assert settings["sparsity"] == {"kind": "joint-topk", "k": 12, "anneal_from": 6.0, "anneal_share": 0.2}
    assert settings["seed"] == 4
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (counted["step_number"], counted["tokens"]) == (last["step"], last["tokens"])
    assert counted["first_left_out"] >= 80


def test_the_same_seed_gives_the_same_run_and_another_another(llama, tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(llama, text_examples(40), config(seed=seed), tmp_path / name)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_an_output_folder_that_exists_is_refused_and_kept(llama, tmp_path):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(UserError, match=f"{tmp_path}: already exists and is not empty; .*--overwrite"):
        train(llama, text_examples(4), config(), tmp_path)
    assert (tmp_path / "precious").read_text() == "mine"


def test_an_overwritten_run_leaves_nothing_behind(llama, tmp_path):
    names = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "training_state.safetensors")
    for name in (*names, "config.json", "metrics.jsonl", "precious"):
        (tmp_path / name).write_text("old")
    train(llama, text_examples(40), config(), tmp_path, overwrite=True)
    assert CrossLayerTranscoder.load(tmp_path).d_model == 32
    assert not [name for name in names if (tmp_path / name).exists()]
    assert "old" not in (tmp_path / "metrics.jsonl").read_text()
    assert (tmp_path / "precious").exists()


@pytest.mark.parametrize(
    ("data", "settings", "named"),
    [
        ([], {}, "data set is empty"),
        ([Example("a", "")], {}, "no token is left to train on; the prompts need more than one token each"),
        (text_examples(4), {"sparsity": JointTopK(1000)}, "k is 1000, but 3 layers of 64 features are only 192"),
        (text_examples(4), {"sparsity": TopK(9), "d_transcoder": 8}, "k is 9, but a layer of 8 features"),
        (text_examples(4), {"wiring": Wiring.full(4)}, "wiring is for 4 layers, the activations have 3"),
        ([Example("long", "a cat " * 70)], {}, "prompt 'long' has 141 tokens; the model's context holds 128"),
    ],
)
def test_what_cannot_work_is_refused_before_the_folder_is_touched(llama, tmp_path, data, settings, named):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(UserError, match=named):
        train(llama, data, config(**settings), tmp_path, overwrite=True)
    assert (tmp_path / "precious").exists()


def test_there_must_be_a_state_to_resume_from(llama, tmp_path):
    with pytest.raises(UserError, match=r"nowhere: holds no training_state.safetensors to resume from"):
        train(llama, text_examples(4), config(), tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_measured_figures_go_into_the_run(llama, tmp_path):
    coder = train(llama, text_examples(40), config(), tmp_path / "run")
    with_metrics(coder, {"fvu": 0.25}).save(tmp_path / "measured")
    loaded = CrossLayerTranscoder.load(tmp_path / "measured")
    assert loaded.provenance.metrics == {"fvu": 0.25}
    assert loaded.provenance.training == coder.provenance.training
