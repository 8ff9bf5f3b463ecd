"""Tracing many examples: alone or shared, in one go or in two, it is the same to the byte."""

from functools import partial
from pathlib import Path

import pytest
import torch

from crosslayer import (
    Case,
    CrossLayerTranscoder,
    Example,
    LoadedModel,
    Tracing,
    UserError,
    Wiring,
    Workers,
    aggregate,
    attribute,
)
from crosslayer.attribution.many import GRAPHS
from crosslayer.coders.transcoder import Provenance
from crosslayer.data.skipped import Skipped
from crosslayer.model_options import AS_SAVED
from crosslayer.verbs.arguments import load_run
from making import TEXTS, finished_coder

CASES = [Case(example=Example(f"text-{i}", text, "a cat ."), token=i % 3) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def run(llama_folder, tmp_path_factory) -> Path:
    """A run of the tiny Llama."""
    folder = tmp_path_factory.mktemp("runs") / "clt"
    coder = finished_coder(Wiring.full(3))
    coder.provenance = Provenance(str(llama_folder))
    coder.save(folder)
    return folder


@pytest.fixture(scope="module")
def pair(run, llama_folder) -> tuple[LoadedModel, CrossLayerTranscoder]:
    coder, model = load_run(str(run), None, AS_SAVED)
    return model, coder


class AfterTwo(Skipped):
    """Ctrl-C once two examples are done."""

    def look(self, n: int, of: int, name: str) -> None:
        self.looked_at += n
        if self.looked_at == 2:
            raise KeyboardInterrupt


@pytest.fixture
def one_thread():
    """As workers have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_shared_work_and_resumed_work_give_the_same_bytes(pair, run, tmp_path):
    whole = aggregate(*pair, CASES, tmp_path / "whole", run=str(run))
    shared = Workers(n=2, load=partial(load_run, str(run), None, AS_SAVED))

    with pytest.raises(KeyboardInterrupt, match="2 of 5 graphs; the same command goes on"):
        aggregate(*pair, CASES, tmp_path / "parts", run=str(run), skipped=AfterTwo())
    files = [tmp_path / "parts" / GRAPHS / f"{i:06d}.json" for i in range(5)]
    assert [file.exists() for file in files] == [True, True, False, False, False]
    before = files[0].stat().st_mtime_ns
    resumed = aggregate(*pair, CASES, tmp_path / "parts", run=str(run), workers=shared)
    assert files[0].stat().st_mtime_ns == before
    assert len(whole) == 5
    assert resumed.to_json() == whole.to_json()
    for file in files:
        assert file.read_bytes() == (tmp_path / "whole" / GRAPHS / file.name).read_bytes()


def test_each_graph_explains_what_its_case_asks_for(pair, tmp_path):
    cases = [Case(example=Example("a", "is there a", "cat ."), targets=("dog", '"cat" - "dog"'), label="one")]
    cases += [Case(example=Example("b", "is there a"), targets=("cat",), label="two")]
    found = aggregate(*pair, cases, tmp_path)
    assert [t.targets for t in found.tallies] == [("dog", '"cat" - "dog"'), ("cat",)]
    assert [t.id for t in found.only("two").tallies] == ["b"]
    with torch.no_grad():
        logits = pair[0].model(torch.tensor([pair[0].processor("is there a")["input_ids"]])).logits[0, -1]
    cat = pair[0].processor("cat", add_special_tokens=False)["input_ids"][0]
    assert found.tallies[1].value == pytest.approx((logits[cat] - logits.mean()).item(), rel=1e-4)


def test_earlier_turns_are_part_of_the_prompt(pair):
    short = attribute(*pair, "is there a dog ?")
    long = attribute(*pair, "is there a dog ?", history=(("is there a cat ?", "no"),))
    assert long.tokens[-len(short.tokens) + 1 :] == short.tokens[1:]
    assert {"cat", "no"} <= set(long.tokens) - set(short.tokens)


def test_graphs_of_another_run_setting_or_example_are_refused(pair, run, tmp_path):
    aggregate(*pair, CASES[:1], tmp_path, run="runs/clt")
    with pytest.raises(UserError, match=r"run = clt \w{12}, now plt \w{12}"):
        aggregate(*pair, CASES[:1], tmp_path, run="runs/plt")
    other = CrossLayerTranscoder.load(str(run))
    other.W_enc[0].data[0, 0] += 1
    with pytest.raises(UserError, match=r"run = clt \w{12}, now clt \w{12}"):
        aggregate(pair[0], other, CASES[:1], tmp_path, run="runs/clt")
    with pytest.raises(UserError, match="probability = 0.95, now 0.5"):
        aggregate(*pair, CASES[:1], tmp_path, run="runs/clt", tracing=Tracing(probability=0.5))
    with pytest.raises(UserError, match="example = text-0, now text-1"):
        aggregate(*pair, CASES[1:2], tmp_path, run="runs/clt")
    with pytest.raises(UserError, match="workers is 0"):
        Workers(n=0, load=partial(load_run, "", None, AS_SAVED))


def test_bad_examples_are_skipped_where_somebody_takes_note(pair, tmp_path):
    bad = Case(example=Example("bad", "a cat", "a dog ."), token=9)
    cases = [CASES[0], bad, Case(example=Example("ids", "", tokens=(1, 2))), CASES[1]]
    with pytest.raises(UserError, match="bad: token is 9, but the answer has 4"):
        aggregate(*pair, cases, tmp_path / "strict")
    skipped = Skipped(share=0.5)
    found = aggregate(*pair, cases, tmp_path / "lenient", skipped=skipped)
    assert [t.id for t in found.tallies] == ["text-0", "text-1"]
    assert list(skipped.reasons) == ["bad", "ids"]
    with pytest.raises(UserError, match="4 rows are bad"):
        aggregate(*pair, [bad] * 2 + cases[2:], tmp_path / "worse", skipped=Skipped(share=0.2))
