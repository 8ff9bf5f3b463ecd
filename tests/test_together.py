"""Verbs that several processes share leave the files of one process, to the byte, and only the first of them speaks.

So they do when one of them is killed and when all are and others go on.
"""

import io
import json
import os
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from itertools import count
from pathlib import Path

import pytest

from crosslayer import Wiring, cli
from crosslayer.activations import to_store
from crosslayer.activations.capture import ModelSource
from crosslayer.coders.transcoder import Provenance
from crosslayer.distributed.crew import Crew
from crosslayer.distributed.joining import joined
from making import finished_coder
from ranks import two

WORDS = ("cat", "dog", "bus", "star", "banana", "apple", "bird")
SMALL = {"chunk_prompts": 5, "batch_prompts": 2}
BAD = ("--bad-share", "0.1")
RESPOND = ("respond", "{model}", "{asked}", "--out", "{}/said.jsonl", "--batch-prompts", "2", "--max-new-tokens", "5")
CAPTURE = ("capture", "{model}", "{asked}", "--out", "{}/store", "--shard-mib", "1")
AGGREGATE = ("graph", "{run}", "{asked}", "--aggregate", "--out", "{}/graphs", "--logits", "2", "--limit", "4")
CALLS = {
    "respond": RESPOND,
    "capture": CAPTURE,
    "capture-tokens": (*CAPTURE, "--tokens", "301", "--store-dtype", "int8"),
    "evaluate": ("evaluate", "{run}", "{asked}", "--json", "{}/figures.json"),
    "aggregate": AGGREGATE,
}


@pytest.fixture(scope="module")
def call(llama_folder, tmp_path_factory):
    """A command line, by name, that writes to a folder: about answered prompts, one of which is none for this model."""
    home = tmp_path_factory.mktemp("home")
    coder = finished_coder(Wiring.full(3))
    coder.provenance = Provenance(str(llama_folder))
    coder.save(home / "clt")
    rows = [{"prompt": f"is there a {WORDS[i % 7]} ?", "response": "yes a cat ."} for i in range(21)]
    rows[8] = {"prompt": "a " * 2000, "response": "no"}
    (home / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    places = {"model": llama_folder, "run": home / "clt", "asked": home / "asked.jsonl"}
    return lambda name, folder: [part.format(folder, **places) for part in (*CALLS[name], *BAD)]


@pytest.fixture(scope="module")
def alone(call, tmp_path_factory):
    """What one process prints and the folder it leaves, by name of the call."""

    @cache
    def result(name: str) -> tuple[str, Path]:
        folder = tmp_path_factory.mktemp(name)
        code, out, _ = command(*call(name, folder))
        assert code == 0
        return out, folder

    return result


def command(*args: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command line in this process."""
    to_store.ModelSource = partial(ModelSource, **SMALL)
    sys.argv, code, out, err = ["crosslayer", *args], 0, io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    to_store.ModelSource = ModelSource
    return code, out.getvalue(), err.getvalue()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("name", "n"), [*((name, 2) for name in CALLS), ("respond", 4)])
def test_many_leave_what_one_leaves(ranks, call, alone, tmp_path, name, n):
    out, folder = alone(name)
    (code, first, _), *others = ranks.run(n, command, *call(name, tmp_path))
    assert (code, first) == (0, out.replace(str(folder), str(tmp_path)))
    assert others == [(0, "", "")] * (n - 1)
    assert files(tmp_path) == files(folder) != {}
    assert not any(path.name == ".chunks" for path in tmp_path.rglob("*"))


def test_an_error_is_said_once(ranks, call, tmp_path):
    (tmp_path / "said.jsonl").write_text("years of work")
    found = ranks.run(2, command, *call("respond", tmp_path))
    assert [code for code, *_ in found] == [2, 2]
    assert "".join(err for *_, err in found).count("already exists") == 1


@pytest.mark.parametrize("verb", [("inspect", "MODEL"), ("hallucination", "suppress", "RUN")])
def test_verbs_for_one_are_refused_to_many(ranks, verb):
    found = ranks.run(2, command, *verb)
    assert [code for code, *_ in found] == [2, 2]
    assert "is work for one process" in "".join(err for *_, err in found)


def otherwise(*args: str) -> tuple[int, str, str]:
    return command(*args, "--seed", os.environ["RANK"])


def test_ranks_that_were_told_otherwise_say_so(ranks, call, tmp_path):
    found = ranks.run(2, otherwise, *call("respond", tmp_path))
    assert [code for code, *_ in found] == [2, 2]
    assert "rank 1 has another command than rank 0: ['respond'" in "".join(err for *_, err in found)
    assert list(tmp_path.iterdir()) == []


def live(dies: tuple[int | None, int], sign: Path, args: list[str]) -> None:
    """Share a command line as one of two, each of which is killed when it holds the piece of this number of its own.

    Rank 0 makes none before rank 1 is about to die.
    """
    rank, share, own = int(os.environ["RANK"]), Crew.map, count()

    def mapped(self, make, n=sys.maxsize):
        def mortal(i):
            if next(own) == dies[rank]:
                sign.with_name(f"{rank}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            while rank == 0 and not sign.exists():
                time.sleep(0.01)
            return make(i)

        return share(self, mortal, n)

    Crew.map, cli.joined = mapped, partial(joined, patience=0.2, times=0)
    code, _, err = command(*args)
    print(err, file=sys.stderr)
    sys.exit(code)


@pytest.fixture(scope="module")
def left(call, tmp_path_factory):
    """What two ranks leave that are both killed, by name of the call."""

    @cache
    def folder(name: str) -> Path:
        home = tmp_path_factory.mktemp(f"{name}-left")
        (home / "out").mkdir()
        assert two(live, (2, 1), home / "1", call(name, home / "out")) == [-signal.SIGKILL] * 2
        return home / "out"

    return folder


def test_the_work_of_a_dead_rank_is_taken_up(call, alone, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert two(live, (None, 0), tmp_path / "1", call("respond", out)) == [0, -signal.SIGKILL]
    assert files(out) == files(alone("respond")[1])


@pytest.mark.parametrize(("name", "others"), [("respond", 4), ("capture", 1)])
def test_others_go_on_with_what_killed_ranks_leave(ranks, call, alone, left, tmp_path, name, others):
    out, wanted = shutil.copytree(left(name), tmp_path / "out"), files(alone(name)[1])
    kept = files(out)
    assert kept.items() & wanted.items() if name == "capture" else kept["said.jsonl.unfinished"].count(b"\n") > 2
    resume = (*call(name, out), "--resume")
    assert {code for code, *_ in ([command(*resume)] if others == 1 else ranks.run(others, command, *resume))} == {0}
    assert files(out) == wanted
