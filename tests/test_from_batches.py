"""A store from a foreign capture of the bundled model: proved, completed, and trained on."""

from pathlib import Path

import pytest
import torch

from crosslayer import CrossLayerTranscoder, ReplacementModel, TrainConfig, UserError, Wiring, load_data, load_model
from crosslayer import train_from_store as train
from crosslayer.activations.capture import capture_all
from crosslayer.activations.from_batches import store_batches
from crosslayer.formats import LayeredBatches, read_layered_batches
from crosslayer.models.prompts import prepare
from crosslayer.report import store_table

N_BATCHES, PROMPTS = 6, 8


@pytest.fixture(scope="module")
def bundled():
    return load_model("emoji-llava")


@pytest.fixture(scope="module")
def folder(bundled, tmp_path_factory) -> Path:
    """As a LLaVA's PLTs were captured: L0 to L8, the read of a layer with the write of the next."""
    folder, scenes = tmp_path_factory.mktemp("batches"), load_data("emoji-scenes", n=400)
    for number in range(N_BATCHES):
        alike = [scenes[i] for i in range(400) if len(scenes[i].prompt.split()) == 4][number * PROMPTS :][:PROMPTS]
        batch = prepare(bundled.model, bundled.processor, alike)
        keep = batch.attention.all(0)
        x, y = (array[:, keep] for array in capture_all(bundled, batch))
        for layer in range(bundled.n_layers - 1):
            place = folder / f"L{layer}"
            place.mkdir(exist_ok=True)
            torch.save(x[:, :, layer].clone(), place / f"batch_{number}_x.pt")
            torch.save(y[:, :, layer + 1].clone(), place / f"batch_{number}_y.pt")
    return folder


@pytest.fixture(scope="module")
def source(folder) -> LayeredBatches:
    return read_layered_batches(folder)


def test_the_store_holds_what_the_files_hold(source, tmp_path):
    store = store_batches(source, tmp_path, dtype="fp32", shard_bytes=400_000)
    whole = store.read(0, len(store))
    assert torch.equal(whole.x, torch.cat([source[i].x for i in range(len(source))]))
    assert torch.equal(whole.y, torch.cat([source[i].y for i in range(len(source))]))
    assert len(store.manifest.shards) > 2
    assert whole.sample.unique().tolist() == list(range(N_BATCHES * PROMPTS))
    assert (whole.position == 0).sum() == N_BATCHES * PROMPTS
    assert (whole.token == -1).all()
    store.verify()


def test_without_the_model_the_first_writes_are_missing(source, tmp_path):
    store = store_batches(source, tmp_path)
    assert (store.manifest.model, store.manifest.y_layers) == ("", list(range(1, 10)))
    with pytest.raises(UserError, match="lacks what layer 0's MLP writes"):
        train(store, TrainConfig(wiring=Wiring.full(10, 1)), tmp_path / "run")
    assert "none: " in store_table(store)


def test_the_model_computes_the_first_writes(source, bundled, tmp_path):
    store = store_batches(source, tmp_path, model=bundled, dtype="fp32")
    site, rows = bundled.sites.layers[0], store.read(0, 500)
    torch.testing.assert_close(rows.y[:, 0], site.mlp(site.norm(rows.x[:, 0])))
    assert store.manifest.y_layers == list(range(10))
    assert "first_target 1" in store_table(store)


def test_a_clt_is_trained_from_it_and_put_in_place(source, bundled, tmp_path):
    store = store_batches(source, tmp_path / "store", model=bundled)
    settings = {"d_transcoder": 64, "tokens": 12_000, "batch_tokens": 250, "calibration_tokens": 500}
    train(store, TrainConfig(wiring=Wiring.full(10, 1), **settings), tmp_path / "run")
    coder = CrossLayerTranscoder.load(tmp_path / "run")
    x, y = source[0].x, source[0].y
    inner = slice(1, None)
    written = coder(
        torch.cat([x, torch.zeros_like(x[:, :1])], 1).view(PROMPTS, -1, 10, x.shape[2])[:, inner].flatten(0, 1)
    )
    wanted = y.view(PROMPTS, -1, 9, x.shape[2])[:, inner].flatten(0, 1)
    fvu = (written[:, 1:] - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert fvu < 0.5
    assert ReplacementModel(bundled, coder).generate("describe the picture .", max_new_tokens=3) is not None
    with pytest.raises(
        UserError, match="lacks what layer 9's MLP reads, which a wiring of span 10, first_target 0 needs"
    ):
        train(store, TrainConfig(wiring=Wiring.full(10), **settings), tmp_path / "other")


def test_files_of_another_offset_are_found_out(folder, bundled, tmp_path):
    with pytest.raises(
        UserError, match=r"y for MLP 0 is not what emoji-llava's makes of its x, .*; with --target-offset 1 it is"
    ):
        store_batches(read_layered_batches(folder, 0), tmp_path / "a", model=bundled)
    assert not (tmp_path / "a").exists()


def test_reads_of_another_place_are_found_out(folder, bundled, tmp_path):
    for layer in range(9):
        place = tmp_path / "batches" / f"L{layer}"
        place.mkdir(parents=True)
        read, written = (torch.load(folder / f"L{layer}" / f"batch_0_{a}.pt", weights_only=True) for a in "xy")
        torch.save(read.roll(1, 1), place / "batch_0_x.pt")
        torch.save(written, place / "batch_0_y.pt")
    with pytest.raises(UserError, match="y for MLP 1 is not .* relative gap .*; x is not what the MLP reads"):
        store_batches(read_layered_batches(tmp_path / "batches"), tmp_path / "a", model=bundled)


def test_another_model_is_refused(source, llama, tmp_path):
    with pytest.raises(UserError, match="is of width 128 up to layer 9; .* has width 32 and layers up to 2"):
        store_batches(source, tmp_path / "a", model=llama)
