"""Capturing to disk: the stream's own rows, exactly as many as asked for, whatever interrupts it."""

import json
import signal
from dataclasses import replace
from functools import partial
from threading import Event

import pytest
import torch

from crosslayer import Store, UserError, capture
from crosslayer.activations import to_store, writer
from crosslayer.activations.capture import ModelSource
from crosslayer.activations.record import Padded
from crosslayer.activations.rows import IMAGE, Rows
from crosslayer.data.load import load_data
from crosslayer.models.prompts import prepare
from crosslayer.models.sites import find_sites
from making import Watched, no_file_larger_than, random_activations, text_examples

CHUNK = {"chunk_prompts": 20, "batch_prompts": 6}
SHARD = 40_000
"""Bytes; a chunk makes two shards, about."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(to_store, "ModelSource", partial(ModelSource, **CHUNK))


def captured(model, out, data=None, **settings) -> Store:
    defaults = {"dtype": "fp32", "shard_bytes": SHARD}
    return capture(model, data or text_examples(50), out, **{**defaults, **settings})


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_store_holds_the_chunks_of_the_stream(llama, tmp_path):
    store = captured(llama, tmp_path, prompts=45, seed=3)
    stream = ModelSource(llama, text_examples(50), seed=3, **CHUNK)
    assert [len(store.chunk(i)) for i in range(3)] == [4, 4, 1]
    for index in range(2):
        found, wanted = store.gather(store.chunk(index)), Rows.of(stream.chunk(index))
        assert all(torch.equal(getattr(found, name), value) for name, value in vars(wanted).items())
    assert int((store.column("position") == 0).sum()) == 45


def test_tokens_are_those_of_the_prompts(llama, tmp_path):
    store, examples = captured(llama, tmp_path), text_examples(50)
    sample, token = store.column("sample"), store.column("token")
    for number in (0, 17, 49):
        batch = prepare(llama.model, llama.processor, [examples[number]])
        assert token[sample == number].tolist() == batch.tokens[0].tolist()


def test_image_tokens_are_marked(llava, tmp_path):
    store = captured(llava, tmp_path, load_data("emoji-scenes", n=7))
    image = store.column("modality") == IMAGE
    assert int(image.sum()) == 7 * 9
    assert store.column("token")[image].unique().tolist() == [llava.model.config.image_token_id]


def test_a_chunk_is_begun_while_the_last_batch_of_the_one_before_is_run(llama, tmp_path):
    first, begun, passes = ModelSource(llama, text_examples(50), **CHUNK).batches(1)[0][0], Event(), []

    class Watching(list):
        def __getitem__(self, index):
            if index == first:
                begun.set()
            return super().__getitem__(index)

    def look(*_):
        passes.append(begun.wait(5) if len(passes) == 3 else begun.clear())

    handle = llama.body.register_forward_hook(look)
    captured(llama, tmp_path, Watching(text_examples(50)), prompts=30)
    handle.remove()
    assert passes[3]


@pytest.mark.parametrize("tokens", [1, 100, 433])
def test_exactly_as_many_tokens_as_asked_for(llama, tmp_path, tokens):
    store = captured(llama, tmp_path, tokens=tokens)
    stream = ModelSource(llama, text_examples(50), **CHUNK)
    assert len(store) == tokens
    assert torch.equal(store.read(0, 1).x[0], stream.chunk(0).x[0])


def test_bf16_is_the_rounding_of_fp32(llama, tmp_path):
    exact, rounded = captured(llama, tmp_path / "a"), captured(llama, tmp_path / "b", dtype="bf16")
    assert torch.equal(rounded.read(0, 200).y, exact.read(0, 200).y.bfloat16())
    sizes = [sum(p.stat().st_size for p in (tmp_path / n).glob("shard*")) for n in "ab"]
    assert sizes[1] < 0.55 * sizes[0]


def test_only_the_layers_asked_for_are_kept(llama, tmp_path):
    whole, some = captured(llama, tmp_path / "a"), captured(llama, tmp_path / "b", layers=range(1, 3))
    assert torch.equal(some.read(0, 100).x, whole.read(0, 100).x[:, 1:])
    assert (some.manifest.x_layers, some.manifest.n_layers) == ([1, 2], 3)
    with pytest.raises(UserError, match="layers are range.*; choose consecutive ones of 0 to 2"):
        captured(llama, tmp_path / "c", layers=range(1, 4))


LOOKED_AT = 8 + 64
"""Examples whose length is measured before the capture begins; the run-time type checks look at a few more."""


@pytest.mark.parametrize("at", [8, 25, 49])
def test_an_interrupted_capture_goes_on_to_the_same_bytes(llama, tmp_path, at):
    captured(llama, tmp_path / "whole")
    data = Watched(text_examples(50), LOOKED_AT + at, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="same command with --resume goes on after the last shard"):
        captured(llama, tmp_path / "run", data)
    kept = Store(tmp_path / "run")
    kept.verify()
    assert not kept.manifest.finished
    captured(llama, tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_a_full_disk_leaves_a_store_to_go_on_from(llama, tmp_path):
    captured(llama, tmp_path / "whole")
    largest = max(len(content) for content in files(tmp_path / "whole").values())
    with no_file_larger_than(largest - 1), pytest.raises(UserError, match=r"shard-.*cannot write .*; free some room"):
        captured(llama, tmp_path / "run")
    Store(tmp_path / "run").verify()
    captured(llama, tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "disk_room", lambda path: 300_000)
    with pytest.raises(UserError, match=r"store: about .* for .* tokens, .* each; only 293 KiB are free: choose fewer"):
        captured(llama, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_the_room_that_is_said_is_about_the_room_that_is_taken(llama, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(writer, "size_text", lambda n: seen.append(n) or "")
    captured(llama, tmp_path)
    taken = sum(len(content) for name, content in files(tmp_path).items() if name.startswith("shard"))
    assert taken == pytest.approx(seen[0], rel=0.1)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"dtype": "bf16"}, "holds dtype fp32, bf16 is asked for"),
        ({"layers": range(2)}, r"holds x_layers \[0, 1, 2\], \[0, 1\] is asked for"),
        ({"seed": 1}, "holds seed 0, 1 is asked for"),
        ({"tokens": 9}, "holds tokens None, 9 is asked for"),
        ({"data": text_examples(49)}, "holds n_examples 50, 49 is asked for"),
        ({"shard_bytes": 9}, "holds shard_bytes 40000, 9 is asked for"),
        ({}, "is finished already; capture into another folder"),
    ],
)
def test_another_capture_is_not_resumed_and_named(llama, tmp_path, settings, named):
    captured(llama, tmp_path)
    before = files(tmp_path)
    with pytest.raises(UserError, match=named):
        captured(llama, tmp_path, resume=True, **settings)
    assert files(tmp_path) == before


def test_another_model_or_read_is_not_resumed(llama, llava, tmp_path):
    captured(llama, tmp_path)
    with pytest.raises(UserError, match=f"holds model {llama.id}, {llava.id} is asked for"):
        captured(llava, tmp_path, resume=True)
    with pytest.raises(UserError, match="holds read resid, mlp_in is asked for"):
        captured(replace(llama, sites=find_sites(llama.model, "mlp_in")), tmp_path, resume=True)


def test_what_cannot_work_is_refused(llama, tmp_path):
    with pytest.raises(UserError, match="tokens is 3 and prompts is 4; give one of them"):
        captured(llama, tmp_path, tokens=3, prompts=4)
    with pytest.raises(UserError, match="tokens 0, .*: choose at least 1"):
        captured(llama, tmp_path, tokens=0)
    with pytest.raises(UserError, match="dtype is 'fp8'"):
        captured(llama, tmp_path, dtype="fp8")
    with pytest.raises(UserError, match="holds no manifest.json to resume from; start without --resume"):
        captured(llama, tmp_path, resume=True)
    assert files(tmp_path) == {}


def test_only_an_old_store_is_overwritten(llama, tmp_path):
    captured(llama, tmp_path)
    with pytest.raises(UserError, match="already exists and is not empty"):
        captured(llama, tmp_path)
    (tmp_path / "precious").write_text("mine")
    assert len(captured(llama, tmp_path, tokens=50, overwrite=True)) == 50
    assert json.loads((tmp_path / "manifest.json").read_text())["source"]["tokens"] == 50
    assert sorted(files(tmp_path)) == ["manifest.json", "precious", "shard-000000.safetensors"]


def test_padding_waits_in_main_memory_where_there_is_little():
    for kept, waits in ((torch.arange(12), True), (torch.tensor([1, 2, 5, 7, 8, 11]), True), (torch.arange(5), False)):
        whole = random_activations(12, 3, 4)
        part = Padded(whole, kept)
        assert (len(part), part.can_wait) == (len(kept), waits)
        for name, value in vars(part.first(4).tokens()).items():
            assert torch.equal(value, getattr(whole, name)[kept[:4]])
