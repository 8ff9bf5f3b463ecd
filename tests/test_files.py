"""Files: a reader never sees half of one, and an old one outlives whatever goes wrong."""

import errno
import os

import pytest
import torch

from crosslayer import UserError
from crosslayer.files import (
    UNFINISHED,
    append_line,
    atomic_path,
    check_folder,
    claim_folder,
    read_json,
    read_tensors,
    vacated,
    write_json,
    write_tensors,
    write_text,
)
from making import no_file_larger_than


def test_json_and_tensors_come_back(tmp_path):
    value = {"layers": [1, 2], "name": "é", "nothing": None}
    write_json(tmp_path / "deep" / "value.json", value)
    assert read_json(tmp_path / "deep" / "value.json") == value
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor(7)}
    write_tensors(tmp_path / "t.safetensors", tensors, {"k": "v"})
    found, metadata = read_tensors(tmp_path / "t.safetensors")
    assert metadata == {"k": "v"}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_the_old_file_outlives_an_exception(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_new_file_appears_only_when_complete(tmp_path):
    path = tmp_path / "file"
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half"
    with path.open() as reader:
        write_text(path, "new")
        assert reader.read() == "half"  # who has opened the old file goes on reading it
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    "write",
    [lambda path: write_text(path, "new" * 10_000), lambda path: write_tensors(path, {"a": torch.zeros(10_000)})],
    ids=["text", "tensors"],
)
def test_the_old_file_outlives_a_full_disk(tmp_path, write):
    path = tmp_path / "file"
    write_text(path, "old")
    with no_file_larger_than(10_000), pytest.raises(UserError, match=f"{path}: cannot write .*; free some room"):
        write(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_lines_are_added_until_the_disk_is_full(tmp_path):
    path = tmp_path / "log"
    append_line(path, "one")
    append_line(path, "two")
    with no_file_larger_than(8), pytest.raises(UserError, match=f"{path}: cannot write .*; free some room"):
        append_line(path, "three")
    assert path.read_text().startswith("one\ntwo\n")


def test_a_disk_that_is_full_at_the_last_moment_is_named(tmp_path, monkeypatch):
    def refuse(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=r"value.json: cannot write \(No space left on device\); free some room"):
        write_json(tmp_path / "value.json", {})
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_text(tmp_path / "file" / "inside", "text")
    with pytest.raises(UserError, match="is a file; choose a folder"):
        claim_folder(tmp_path / "file", overwrite=True, ours=[])
    with pytest.raises(UserError, match="cannot use this folder"):
        claim_folder(tmp_path / "file" / "inside", overwrite=False, ours=[])


def test_missing_and_damaged_files_are_named(tmp_path):
    (tmp_path / "bad").write_bytes(b"\xff{")
    for read in (read_json, read_tensors):
        with pytest.raises(UserError, match="bad: cannot be read"):
            read(tmp_path / "bad")
        with pytest.raises(UserError, match=r"missing: (no such file|cannot be read)"):
            read(tmp_path / "missing")


def test_a_truncated_tensor_file_is_named(tmp_path):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"t.safetensors: cannot be read .*; copy or make it again"):
        read_tensors(path)


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path):
    for name in ("model.safetensors", "model-2.safetensors", "precious"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="not empty; choose another folder or add --overwrite"):
        claim_folder(tmp_path, overwrite=False, ours=["*.safetensors"])
    assert len(list(tmp_path.iterdir())) == 3


def test_overwriting_removes_what_is_ours_and_nothing_else(tmp_path):
    for name in ("model.safetensors", "model-2.safetensors", "precious"):
        (tmp_path / name).write_text("")
    claim_folder(tmp_path, overwrite=True, ours=["*.safetensors"])
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_an_empty_or_new_folder_is_claimed(tmp_path):
    for _ in range(2):
        claim_folder(tmp_path / "a" / "b", overwrite=False, ours=[])
    assert (tmp_path / "a" / "b").is_dir()


def test_what_a_killed_writer_left_is_no_obstacle_and_is_swept_away(tmp_path):
    with atomic_path(tmp_path / "table.json") as temporary:
        left = tmp_path / f"{temporary.name.removesuffix(UNFINISHED)}x{UNFINISHED}"
        left.touch()
    (tmp_path / "table.json").unlink()
    check_folder(tmp_path, overwrite=False)
    claim_folder(tmp_path, overwrite=False, ours=())
    assert list(tmp_path.iterdir()) == []


def test_folders_that_an_exception_leaves_empty_are_removed_and_no_others(tmp_path):
    (tmp_path / "there").mkdir()

    def fail_in(folder, *files):
        with pytest.raises(KeyboardInterrupt), vacated(folder):
            folder.mkdir(parents=True)
            for name in files:
                (folder / name).write_text("a")
            raise KeyboardInterrupt

    fail_in(tmp_path / "there" / "a" / "b", f".one{UNFINISHED}")
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    fail_in(tmp_path / "there" / "a" / "b", "one.json", f".two{UNFINISHED}")
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "a", "b", "one.json"]
    with vacated(tmp_path / "fine"):
        (tmp_path / "fine").mkdir()
    assert (tmp_path / "fine").is_dir()
