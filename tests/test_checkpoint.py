"""Runs on disk: saved = loaded bit for bit, and whatever is wrong with one is named."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards

from crosslayer import CrossLayerTranscoder, JointTopK, JumpReLU, ReLU, TopK, UserError, Wiring
from crosslayer.coders import checkpoint
from crosslayer.coders.transcoder import Provenance
from crosslayer.files import read_tensors, write_tensors
from making import random_coder

WEIGHTS = "model.safetensors"


def finished(sparsity=None, wiring=None) -> CrossLayerTranscoder:
    coder = random_coder(wiring or Wiring(4, 2, 1), sparsity)
    coder.provenance = Provenance("some/model", "main", "mlp_in", {"tokens": 3}, {"fvu": 0.25})
    return coder


def assert_same(loaded: CrossLayerTranscoder, saved: CrossLayerTranscoder) -> None:
    assert loaded.wiring == saved.wiring
    assert loaded.sparsity == saved.sparsity
    assert loaded.provenance == saved.provenance
    ours, theirs = loaded.state_dict(), saved.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def run(tmp_path) -> Path:
    finished().save(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def small_shards(monkeypatch):
    split = partial(split_torch_state_dict_into_shards, max_shard_size=700)
    monkeypatch.setattr(checkpoint, "split_torch_state_dict_into_shards", split)


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("sparsity", [JointTopK(4), TopK(2), ReLU(0.3)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("wiring", [Wiring.full(3), Wiring(4, 2, 1), Wiring.per_layer(3)], ids=str)
def test_saved_is_loaded_bit_for_bit(tmp_path, wiring, sparsity):
    coder = finished(sparsity, wiring)
    coder.save(tmp_path)
    assert_same(CrossLayerTranscoder.load(tmp_path), coder)


def test_thresholds_are_saved_and_loaded(tmp_path):
    coder = finished().with_thresholds(torch.tensor([0.5, float("inf"), 1e-8]).repeat(10).view(3, 10))
    coder.save(tmp_path)
    loaded, x = CrossLayerTranscoder.load(tmp_path), torch.randn(5, 4, 6)
    assert_same(loaded, coder)
    assert isinstance(loaded.sparsity, JumpReLU)
    assert torch.equal(loaded(x), coder(x))


def test_a_run_has_the_promised_tensors(run):
    tensors, config = read_tensors(run / WEIGHTS)[0], json.loads((run / "config.json").read_text())
    assert {name: list(tensors[name].shape) for name in ("W_enc.0", "b_enc.1", "W_dec.0", "W_dec.2", "b_dec.3")} == {
        "W_enc.0": [10, 6],
        "b_enc.1": [10],
        "W_dec.0": [10, 2, 6],
        "W_dec.2": [10, 1, 6],
        "b_dec.3": [6],
    }
    assert "W_enc.3" not in tensors
    assert config["format_version"] == 1
    assert config["wiring"] == {"n_layers": 4, "span": 2, "first_target": 1}


def test_shards_load_like_one_file(tmp_path, small_shards):
    coder = finished()
    coder.save(tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / WEIGHTS).exists()
    assert_same(CrossLayerTranscoder.load(tmp_path), coder)


def test_a_lost_shard_is_named(tmp_path, small_shards):
    finished().save(tmp_path)
    lost = sorted(tmp_path.glob("model-*"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name}: cannot be read"):
        CrossLayerTranscoder.load(tmp_path)


def test_a_run_saved_over_a_sharded_one_is_the_one_that_loads(tmp_path, monkeypatch):
    split = partial(split_torch_state_dict_into_shards, max_shard_size=700)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "split_torch_state_dict_into_shards", split)
        finished().save(tmp_path)
    newer = random_coder(Wiring(4, 2, 1), seed=1)
    newer.save(tmp_path)
    assert_same(CrossLayerTranscoder.load(tmp_path), newer)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("W_dec.1"), "tensor W_dec.1 is missing"),
        (lambda t: t.update({"W_dec.7": torch.zeros(1)}), "tensor W_dec.7 is in the run"),
        (lambda t: t.update({"b_enc.0": torch.zeros(11)}), r"tensor b_enc.0 has shape \[11\]; \[10\] is wanted"),
        (lambda t: t.update({"W_enc.0": t["W_enc.0"].T.contiguous()}), r"tensor W_enc.0 has shape \[6, 10\]"),
    ],
)
def test_wrong_tensors_are_named(run, change, named):
    tensors = read_tensors(run / WEIGHTS)[0]
    change(tensors)
    write_tensors(run / WEIGHTS, tensors)
    with pytest.raises(UserError, match=named):
        CrossLayerTranscoder.load(run)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.update(format_version=2), "run format 2, this crosslayer reads 1"),
        (lambda c: c.pop("format_version"), "run format None"),
        (lambda c: c["wiring"].update(span=9), "span is 9"),
        (lambda c: c["sparsity"].update(kind="maxk"), "sparsity is 'maxk'"),
        (lambda c: c.pop("wiring"), "run: its config.json describes no transcoder .*wiring"),
        (lambda c: c["provenance"].update(mood="good"), "config.json describes no transcoder .*mood"),
    ],
)
def test_wrong_configurations_are_named(run, change, named):
    edit(run / "config.json", change)
    with pytest.raises(UserError, match=named):
        CrossLayerTranscoder.load(run)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda run: (run / WEIGHTS).write_bytes((run / WEIGHTS).read_bytes()[:-100]), "model.safetensors: cannot be"),
        (lambda run: (run / WEIGHTS).write_bytes(b""), "model.safetensors: cannot be read"),
        (lambda run: (run / WEIGHTS).unlink(), "model.safetensors: cannot be read"),
        (lambda run: (run / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
        (lambda run: (run / "config.json").write_text("[]"), "run format None"),
        (lambda run: (run / "config.json").unlink(), "holds no config.json"),
    ],
)
def test_damaged_runs_are_named(run, damage, named):
    damage(run)
    with pytest.raises(UserError, match=named):
        CrossLayerTranscoder.load(run)


@pytest.mark.parametrize("source", ["/no/such/run", "./runs/clt", "clt", "~/runs/clt", "nobody/such-a-clt"])
def test_a_run_that_does_not_exist_is_named(source):
    with pytest.raises(UserError, match=f"{source}: no such run"):
        CrossLayerTranscoder.load(source)


def test_a_jumprelu_in_training_is_not_saved(tmp_path):
    with pytest.raises(UserError, match="fix its thresholds"):
        random_coder(Wiring.full(3), JumpReLU()).save(tmp_path / "run")
    assert not (tmp_path / "run").exists()
