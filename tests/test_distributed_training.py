"""Ranks train from end to end: the run of one process, resumed on any number of ranks, and what is refused."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.tensor import DTensor

from crosslayer import (
    KL,
    Adam8bit,
    AdamW,
    AuxK,
    BatchTopK,
    CrossLayerTranscoder,
    GroupMax,
    JointTopK,
    JumpReLU,
    Muon,
    Store,
    TrainConfig,
    UserError,
    Wiring,
    capture,
    load_model,
    train,
    train_from_store,
)
from crosslayer.activations.capture import ModelSource, capture_all
from crosslayer.distributed.checkpoint import read_header
from crosslayer.distributed.group import team_of
from crosslayer.distributed.handover import hand_over
from crosslayer.distributed.mesh import join
from crosslayer.distributed.model import spread
from crosslayer.distributed.sharding import check_shares
from crosslayer.distributed.state import CHECKPOINT
from crosslayer.models.prompts import prepare
from crosslayer.team import check_alike, tell
from crosslayer.training.fit import Interrupted
from crosslayer.training.state import METRICS, STATE, read_state_header
from crosslayer.training.trainer import Trainer
from making import text_examples


def config(**settings: Any) -> TrainConfig:
    usual = {"wiring": Wiring.full(3), "sparsity": JointTopK(6), "d_transcoder": 16, "tokens": 600, "batch_tokens": 60}
    return TrainConfig(**usual | {"calibration_tokens": 200, "auxk": AuxK(k=4), "seed": 1} | settings)


def trained(
    model: str, run: str, n_feature: int, settings: dict[str, Any], stop_after: int = 0, shard_model: bool = False
) -> str:
    """Train on the ranks that there are, or, with 0 feature ranks, alone; the last gets a signal in its n-th step."""
    mesh = join(n_feature) if n_feature else None
    step = Trainer.step

    def struck(self: Trainer, batch: Any) -> Any:
        if self.step_number + 1 == stop_after and (mesh is None or mesh.rank == mesh.size - 1):
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch)

    resume = any((Path(run) / name).exists() for name in ("checkpoint", STATE))
    try:
        with patch.object(Trainer, "step", struck):
            data, how = text_examples(40), {"resume": resume, "mesh": mesh, "shard_model": shard_model}
            train(load_model(model), data, config(**settings), run, **how)
    except Interrupted as stop:
        return str(stop)
    return ""


def assert_same_run(found: Path, wanted: Path) -> None:
    one, other = (CrossLayerTranscoder.load(run) for run in (found, wanted))
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-3, atol=1e-4)
    logs = [[json.loads(line)["fvu"] for line in (run / METRICS).read_text().splitlines()] for run in (found, wanted)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-3)
    assert one.provenance == other.provenance
    assert {file.name for file in found.iterdir()} == {file.name for file in wanted.iterdir()}


KINDS = {
    "joint": {},
    "batch": {"sparsity": BatchTopK(6)},
    "through the model": {"sparsity": BatchTopK(6), "loss": KL(fvu_weight=1.0)},
}


@pytest.mark.parametrize(("kind", "n", "n_feature"), [("joint", 2, 2), ("batch", 4, 2), ("through the model", 2, 1)])
def test_ranks_write_the_run_that_one_process_writes(ranks, llama_folder, tmp_path, kind, n, n_feature):
    train(load_model(llama_folder), text_examples(40), config(**KINDS[kind]), tmp_path / "one")
    ranks.run(n, trained, str(llama_folder), str(tmp_path / "many"), n_feature, KINDS[kind])
    assert_same_run(tmp_path / "many", tmp_path / "one")


def test_a_signal_to_one_rank_stops_all_and_other_ranks_go_on(ranks, llama_folder, tmp_path):
    train(load_model(llama_folder), text_examples(40), config(), tmp_path / "one")
    run = str(tmp_path / "many")
    stopped = ranks.run(2, trained, str(llama_folder), run, 2, {}, 4)
    assert stopped[0].startswith("stopped after")
    assert stopped == stopped[:1] * 2
    assert ranks.run(4, trained, str(llama_folder), run, 4, {}) == [""] * 4
    assert_same_run(tmp_path / "many", tmp_path / "one")


@pytest.mark.parametrize(("n_feature", "settings"), [(1, {"optimizer": Muon()}), (2, {"optimizer": AdamW()})])
def test_a_training_goes_on_from_one_process_to_several_and_back(ranks, llama_folder, tmp_path, n_feature, settings):
    train(load_model(llama_folder), text_examples(40), config(**settings), tmp_path / "one")
    model, run = str(llama_folder), str(tmp_path / "many")
    stops = [trained(model, run, 0, settings, 3), *ranks.run(2, trained, model, run, n_feature, settings, 6)]
    assert all(stop.startswith("stopped after") for stop in stops)
    assert trained(model, run, 0, settings) == ""
    assert_same_run(tmp_path / "many", tmp_path / "one")


def step_handed_over(run: Path) -> int:
    hand_over(run, join(2))
    assert not (run / STATE).exists()
    return read_header(run / CHECKPOINT)["counters"]["step_number"]


@pytest.mark.parametrize("newer", ["one", "many"])
def test_of_two_states_that_of_more_steps_counts(ranks, llama_folder, tmp_path, newer):
    """Both lie there when an end comes between the writing of one and the removal of the other."""
    model, run = str(llama_folder), tmp_path / "run"
    trained(model, str(run), 0, {}, 6 if newer == "one" else 3)
    ranks.run(2, trained, model, str(tmp_path / "many"), 2, {}, 3 if newer == "one" else 6)
    shutil.copytree(tmp_path / "many" / CHECKPOINT, run / CHECKPOINT)
    again = shutil.copytree(run, tmp_path / "again")
    assert ranks.run(2, step_handed_over, run) == [6, 6]
    hand_over(again, None)
    assert read_state_header(again / STATE)["counters"]["step_number"] == 6
    assert not (again / CHECKPOINT).exists()


def from_store(store: Path, run: Path, n_feature: int, start: Path | None, settings: dict[str, Any]) -> None:
    """Train from a store, or finetune on it, on the ranks that there are or, with 0 feature ranks, alone."""
    mesh = join(n_feature) if n_feature else None
    train_from_store(Store(store), config(**settings), run, start=start, mesh=mesh)


@pytest.mark.parametrize(("n_feature", "tuned"), [(1, None), (2, None), (2, BatchTopK(4))])
def test_ranks_train_from_a_store_and_finetune_as_one_process_does(ranks, llama_folder, tmp_path, n_feature, tuned):
    store, first = tmp_path / "store", tmp_path / "one"
    capture(load_model(llama_folder), text_examples(120), store, dtype="fp32", seed=1)
    for run, *how in ((first, None, {}), (tmp_path / "tuned", first, {"sparsity": tuned})):
        from_store(store, run, 0, *how)
        many = run.with_name(f"{run.name}-many")
        ranks.run(2, from_store, store, many, n_feature, *how)
        assert_same_run(many, run)


def spread_model(folder: str) -> tuple[int, int, bool, list[int]]:
    """Numbers that a rank holds of a model and of all of it; whether it gives the same; tokens of two chunks."""
    mesh, model, data = join(), load_model(folder), text_examples(40)
    batch = prepare(model.model, model.processor, data[:3])
    whole, n = capture_all(model, batch), sum(p.numel() for p in model.body.parameters())
    spread(model, mesh)
    own = sum(p.to_local().numel() for p in model.body.parameters() if isinstance(p, DTensor))
    same = all(torch.equal(a, b) for a, b in zip(whole, capture_all(model, batch), strict=True))
    source = ModelSource(model, data, chunk_prompts=5, batch_prompts=1, team=team_of(mesh), in_step=True)
    return own, n, same, [len(source.chunk(index)) for index in range(2)]


def test_a_model_spread_over_ranks_is_the_same_model_in_parts(ranks, llama_folder):
    model, data = load_model(llama_folder), text_examples(40)
    found = ranks.run(3, spread_model, str(llama_folder))
    n = found[0][1]
    assert sum(own for own, *_ in found) == n
    assert max(own for own, *_ in found) < 0.5 * n
    assert all(same for *_, same, _ in found)
    source = ModelSource(model, data, chunk_prompts=5, batch_prompts=1)
    assert [sum(tokens) for tokens in zip(*(chunks for *_, chunks in found), strict=True)] == [
        len(source.chunk(index)) for index in range(2)
    ]


def test_ranks_train_on_a_model_that_they_hold_together(ranks, llama_folder, tmp_path):
    train(load_model(llama_folder), text_examples(40), config(), tmp_path / "one")
    assert ranks.run(2, trained, str(llama_folder), str(tmp_path / "many"), 1, {}, 0, True) == [""] * 2
    assert_same_run(tmp_path / "many", tmp_path / "one")


def different() -> list[str]:
    group = team_of(join()).everyone
    messages = []
    for facts in (
        {"version of torch": "2.9" if group.rank else "2.8"},
        {"the data": {"n": 3, "seed": group.rank // 2}},
    ):
        try:
            check_alike(tell(group, facts))
        except UserError as error:
            messages.append(str(error))
    return messages


def test_ranks_that_were_given_different_things_all_say_so(ranks):
    assert (
        ranks.run(3, different)
        == [
            [
                "rank 1 has another version of torch than rank 0: 2.9, not 2.8; give all ranks the same",
                "rank 2 has another data than rank 0: seed is 1, not 0; give all ranks the same",
            ]
        ]
        * 3
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"d_transcoder": 30}, "d_transcoder is 30.*nearest that they can is 32"),
        ({"sparsity": GroupMax(2)}, "groupmax has k 2"),
        ({"optimizer": Muon()}, "muon"),
        ({"optimizer": Adam8bit()}, "adam-8bit"),
        ({"sparsity": BatchTopK(2), "loss": KL()}, "end-to-end"),
    ],
)
def test_what_cannot_be_split_over_features_is_refused(settings, named):
    with pytest.raises(UserError, match=named):
        check_shares(config(**settings), 32, 4)


def test_columns_must_be_shared_evenly_where_there_are_some():
    with pytest.raises(UserError, match="d_model is 30, which 4 feature ranks"):
        check_shares(config(), 30, 4)
    check_shares(config(sparsity=JumpReLU()), 30, 4)
