"""Training from a store: the very weights of the stream, resumed bit for bit, and no model needed."""

import json
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from crosslayer import (
    KL,
    BatchTopK,
    CrossLayerTranscoder,
    Store,
    TopK,
    TrainConfig,
    UserError,
    Wiring,
    capture,
    train,
    train_from_store,
    workflow,
)
from crosslayer.activations import to_store
from crosslayer.activations.capture import ModelSource
from crosslayer.activations.manifest import write_manifest
from crosslayer.training.fit import Interrupted
from crosslayer.training.state import METRICS
from crosslayer.training.trainer import Trainer
from making import text_examples

CHUNK = {"chunk_prompts": 60, "batch_prompts": 16}
EXAMPLES = text_examples(240)


def config(**settings) -> TrainConfig:
    defaults = {"sparsity": BatchTopK(9), "d_transcoder": 24, "tokens": 1800, "batch_tokens": 100, "seed": 4}
    return TrainConfig(calibration_tokens=300, **{"wiring": Wiring.full(3), **defaults, **settings})


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for module in (workflow, to_store):
        monkeypatch.setattr(module, "ModelSource", partial(ModelSource, **CHUNK))


@pytest.fixture(scope="module")
def stores(llama, tmp_path_factory) -> dict[str, Store]:
    """Four chunks of the stream of seed 4, in each form."""
    folder = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_store, "ModelSource", partial(ModelSource, **CHUNK))
        settings = {"seed": 4, "shard_bytes": 200_000}
        return {d: capture(llama, EXAMPLES, folder / d, dtype=d, **settings) for d in ("fp32", "bf16", "int8")}


def files(run: Path) -> tuple[bytes, str]:
    return (run / "model.safetensors").read_bytes(), (run / METRICS).read_text()


def test_the_same_tokens_give_the_same_training_as_the_stream(llama, stores, tmp_path):
    assert len(stores["fp32"].manifest.shards) > stores["fp32"].n_chunks == 4
    streamed = train(llama, EXAMPLES, config(), tmp_path / "stream")
    stored = train_from_store(stores["fp32"], config(), tmp_path / "store")
    assert files(tmp_path / "store") == files(tmp_path / "stream")
    assert stored.provenance == streamed.provenance


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_coarser_forms_train_nearly_alike(stores, tmp_path, dtype):
    train_from_store(stores["fp32"], config(), tmp_path / "fp32")
    train_from_store(stores[dtype], config(), tmp_path / dtype)
    last = [json.loads((tmp_path / d / METRICS).read_text().splitlines()[-1])["fvu"] for d in ("fp32", dtype)]
    assert last[1] == pytest.approx(last[0], rel=0.05)


@pytest.mark.parametrize(("tokens", "at"), [(1800, 3), (1800, 14), (6000, 45)])
def test_an_interrupted_training_from_a_store_ends_alike(stores, tmp_path, tokens, at, monkeypatch):
    """The longest goes round the store twice."""
    settings = config(tokens=tokens)
    train_from_store(stores["bf16"], settings, tmp_path / "whole")
    step = Trainer.step

    def struck(self, batch):
        if self.step_number == at:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", struck)
    with pytest.raises(Interrupted):
        train_from_store(stores["bf16"], settings, tmp_path / "run")
    monkeypatch.setattr(Trainer, "step", step)
    train_from_store(stores["bf16"], settings, tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_another_store_is_not_gone_on_with(stores, tmp_path, monkeypatch):
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, batch: (signal.raise_signal(signal.SIGINT), step(self, batch))[1])
    with pytest.raises(Interrupted):
        train_from_store(stores["bf16"], config(), tmp_path)
    with pytest.raises(UserError, match="was started with store = .*, now .* is asked for"):
        train_from_store(stores["int8"], config(), tmp_path, resume=True)


def test_another_seed_trains_on_another_order(stores, tmp_path):
    logs = []
    for seed in (4, 5):
        train_from_store(stores["fp32"], config(seed=seed), tmp_path / str(seed))
        logs.append((tmp_path / str(seed) / METRICS).read_text())
    assert logs[0] != logs[1]
    assert CrossLayerTranscoder.load(tmp_path / "5").d_model == 32


def test_a_run_is_finetuned_on_a_store(stores, tmp_path):
    train_from_store(stores["fp32"], config(sparsity=TopK(3)), tmp_path / "run")
    tuned = train_from_store(stores["bf16"], config(sparsity=None), tmp_path / "tuned", start=tmp_path / "run")
    assert torch.equal(tuned.W_enc[0], CrossLayerTranscoder.load(tmp_path / "tuned").W_enc[0])


def test_what_a_store_cannot_give_is_refused(stores, tmp_path):
    with pytest.raises(UserError, match="the loss is KL, which runs the model on prompts; train on data instead"):
        train_from_store(stores["fp32"], config(loss=KL()), tmp_path / "a")
    with pytest.raises(UserError, match="is of 3 layers, the wiring is for 4"):
        train_from_store(stores["fp32"], config(wiring=Wiring.full(4)), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_store_that_knows_no_model_takes_the_name_given(stores, tmp_path):
    shutil.copytree(stores["bf16"].path, tmp_path / "store")
    write_manifest(tmp_path / "store", replace(stores["bf16"].manifest, model=""))
    coder = train_from_store(Store(tmp_path / "store"), config(), tmp_path / "run", model_id="mine")
    assert coder.provenance.model_id == "mine"
