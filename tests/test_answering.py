"""The model's own answers: what they are, that they are data again, and that no end of the process changes them."""

import json
import os
import random
import signal
import sys
import threading
from itertools import count
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from PIL import Image
from tqdm import tqdm

from crosslayer import Answering, UserError, answering, load_data, load_model, respond
from crosslayer.data.examples import Example, Examples
from crosslayer.replacement.model import generate

KILLS, PATIENCE = 6, 120.0
PRELOADED = ["crosslayer", "pytest", "hypothesis.strategies", "transformers.models.llava.modeling_llava"]
FEW = Answering(max_new_tokens=6, batch_prompts=4)


@pytest.fixture
def asked(tmp_path):
    """21 prompts on pictures, one of which is damaged."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(21):
        Image.new("RGB", (40, 30), (12 * i, 90, 200 - 9 * i)).save(folder / f"{i}.png")
    (folder / "6.png").write_bytes((folder / "6.png").read_bytes()[:40])
    words = ("dog", "cat", "banana")
    rows = [{"image": f"{i}.png", "prompt": f"is there a {words[i % 3]} ?", "response": "x"} for i in range(21)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "asked.jsonl"


def load(asked) -> Examples:
    return load_data(asked, images=asked.parent / "photos", bad_share=0.1)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_the_models_own_greedy_ones(llava, asked, tmp_path):
    assert respond(llava, load(asked), tmp_path / "said.jsonl", FEW) == 20
    said = lines(tmp_path / "said.jsonl")
    assert [line["id"] for line in said] == [f"asked.jsonl:{i}" for i in range(1, 22) if i != 7]
    for line in said[::7]:
        example = Example("a", line["prompt"], image=Path(line["image"]))
        assert line["response"] == generate(llava, [example], max_new_tokens=6)[0]
    assert [line["row"] for line in lines(tmp_path / "said.skipped.jsonl")] == ["asked.jsonl:7"]
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "asked.jsonl", "said.jsonl", "said.skipped.jsonl"}


def test_answers_are_data_again(llava, asked, tmp_path):
    respond(llava, load(asked), tmp_path / "said.jsonl", FEW)
    for line, example in zip(lines(tmp_path / "said.jsonl"), load_data(tmp_path / "said.jsonl"), strict=True):
        found = {"prompt": example.prompt, "response": example.response, "image": str(example.image)}
        assert line == {"id": line["id"], **found, "token_ids": line["token_ids"]}
        assert llava.processor.tokenizer.decode(line["token_ids"], skip_special_tokens=True) == line["response"]
        assert example.picture().size == (40, 30)


def test_pictures_without_a_file_are_kept_beside_the_answers(llava, tmp_path):
    scenes = load_data("emoji-scenes", n=3)
    respond(llava, scenes, tmp_path / "said.jsonl", FEW)
    again = load_data(tmp_path / "said.jsonl")
    assert [e.prompt for e in again] == [e.prompt for e in scenes]
    assert [e.picture().tobytes() for e in again] == [e.picture().tobytes() for e in scenes]


def test_conversations_and_texts_come_back_as_what_they_were(llama, tmp_path):
    examples = [
        Example("0", "and a dog ?", history=(("is there a cat ?", "yes"),)),
        Example("1", "there is a", form="text"),
        Example("2", "", form="text", tokens=(1, 12, 13, 14)),
    ]
    respond(llama, Examples("few", 3, examples.__getitem__), tmp_path / "said.jsonl", FEW)
    again = load_data(tmp_path / "said.jsonl")
    assert [(e.prompt, e.history, e.form) for e in again][:2] == [(e.prompt, e.history, e.form) for e in examples[:2]]
    assert again[2].prompt == llama.processor.decode([12])


def test_sampled_answers_are_alike_for_a_seed(llava, asked, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        settings = Answering(max_new_tokens=6, temperature=1.5, seed=seed)
        respond(llava, load(asked), tmp_path / f"{name}.jsonl", settings)
    a, b, c = ((tmp_path / f"{name}.jsonl").read_text() for name in "abc")
    assert a == b != c


def test_too_many_bad_prompts_are_refused_before_the_batch_is_answered(llava, asked, tmp_path, monkeypatch):
    answered = []
    monkeypatch.setattr(answering, "continuation", lambda *args, **sampling: answered.append(args))
    with pytest.raises(UserError, match="1 of 4 rows are bad"):
        respond(llava, load(asked)[6:10], tmp_path / "said.jsonl", FEW)
    assert not answered


def test_an_interruption_keeps_whole_batches(llava, asked, tmp_path, monkeypatch):
    left = iter((answering.continuation, answering.continuation))

    def interrupted(*args, **sampling):
        generate = next(left, None)
        if generate is None:
            raise KeyboardInterrupt
        return generate(*args, **sampling)

    respond(llava, load(asked), tmp_path / "whole.jsonl", FEW)
    out = tmp_path / "broken.jsonl"
    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt, match="stopped after 8 of 21 prompts; the same"),
    ):
        patch.setattr(answering, "continuation", interrupted)
        respond(llava, load(asked), out, FEW)
    assert not out.exists()
    with (tmp_path / "broken.jsonl.unfinished").open("a") as file:
        file.write('[{"id": "asked.js')
    with pytest.raises(UserError, match="holds unfinished answers; go on with --resume or start anew with --overwrite"):
        respond(llava, load(asked), out, FEW)
    with pytest.raises(UserError, match="was started with max_new_tokens = 6, now 7 is asked for"):
        respond(llava, load(asked), out, Answering(max_new_tokens=7, batch_prompts=4), resume=True)
    respond(llava, load(asked), out, FEW, resume=True)
    for end in ("jsonl", "skipped.jsonl"):
        assert (tmp_path / f"broken.{end}").read_bytes() == (tmp_path / f"whole.{end}").read_bytes()


def test_answers_that_exist_are_kept(llava, asked, tmp_path):
    out = tmp_path / "said.jsonl"
    out.write_text("years of work")
    with pytest.raises(UserError, match=r"said.jsonl: already exists; choose another file or add --overwrite"):
        respond(llava, load(asked), out, FEW)
    assert out.read_text() == "years of work"
    with pytest.raises(UserError, match=r"said.jsonl.unfinished: no such file to resume from"):
        respond(llava, load(asked), out, FEW, resume=True)
    with pytest.raises(UserError, match=r"photos: is a folder; choose a file"):
        respond(llava, load(asked), tmp_path / "photos", FEW)
    assert respond(llava, load(asked), out, FEW, overwrite=True) == 20


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"batch_prompts": 0}, {"temperature": -0.5}])
def test_settings_that_cannot_work(settings):
    with pytest.raises(UserError, match=f"{next(iter(settings))} is "):
        Answering(**settings)


def live(model: str, asked: str, out: str, dies_at: int) -> None:
    """One life: go on where there is something to go on from; die at a file operation by its number, or never."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    data, loaded, operations, folder = load(Path(asked)), load_model(model), count(1), str(Path(out).parent)

    def reaper(event: str, arguments: tuple) -> None:
        ours = event in ("open", "os.rename", "os.remove") and str(arguments[0]).startswith(folder)
        if ours and next(operations) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(reaper)
    resume = Path(out + ".unfinished").exists()
    respond(loaded, data, out, FEW, resume=resume, overwrite=not resume)


def test_killed_answers_end_as_unbroken_ones(llava, llava_folder, asked, tmp_path):
    (tmp_path / "whole").mkdir()
    respond(llava, load(asked), tmp_path / "whole" / "said.jsonl", FEW)
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    moments, lives = random.Random(0), 0
    (tmp_path / "killed").mkdir()
    out = tmp_path / "killed" / "said.jsonl"
    for lives in count():
        dies_at = moments.randint(1, 12) if lives < KILLS else 0
        life = context.Process(target=live, args=(str(llava_folder), str(asked), str(out), dies_at))
        life.start()
        life.join(PATIENCE)
        assert life.exitcode in (0, -signal.SIGKILL)
        if life.exitcode == 0:
            break
        assert not out.exists() or not Path(f"{out}.unfinished").exists() or lines(out)
    assert lives >= 3
    for name in ("said.jsonl", "said.skipped.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not Path(f"{out}.unfinished").exists()
