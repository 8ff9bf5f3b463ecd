"""Foreign captures, a folder a layer: read as they are, refused by the first file that does not fit."""

from pathlib import Path

import pytest
import torch

from crosslayer import UserError
from crosslayer.formats import read_layered_batches

L, D = 4, 6


def save(folder: Path, x: torch.Tensor, y: torch.Tensor, *, offset: int = 1, n: int = 0, batch: int = 0) -> None:
    """One batch [..., L, D] of a model of L layers: `n` targets a file, or x and y in files of their own."""
    for layer in range(L - offset):
        place = folder / f"L{layer}"
        place.mkdir(parents=True, exist_ok=True)
        read = x[..., layer, :].clone()
        if n:
            targets = [y[..., t, :].clone() for t in range(layer + offset, min(layer + offset + n, L))]
            torch.save({"x": read, "targets": targets}, place / f"batch_{batch}.pt")
        else:
            torch.save(read, place / f"batch_{batch}_x.pt")
            torch.save(y[..., layer + offset, :].clone(), place / f"batch_{batch}_y.pt")


def made(folder: Path, shapes=((2, 5), (3, 4)), **settings) -> list[tuple[torch.Tensor, torch.Tensor]]:
    batches = [(torch.randn(*shape, L, D), torch.randn(*shape, L, D)) for shape in shapes]
    for number, (x, y) in enumerate(batches):
        save(folder, x, y, batch=number, **settings)
    return batches


@pytest.mark.parametrize("n", [0, 1, 2, 9])
@pytest.mark.parametrize("offset", [0, 1])
def test_every_layer_of_a_batch_is_read(tmp_path, n, offset):
    batches = made(tmp_path, offset=offset, n=n)
    found = read_layered_batches(tmp_path, offset)
    assert (found.x_layers, found.y_layers) == (range(L - offset), range(offset, L))
    for number, (x, y) in enumerate(batches):
        batch = found[number]
        assert torch.equal(batch.x, x.flatten(0, 1)[:, : L - offset])
        assert torch.equal(batch.y, y.flatten(0, 1)[:, offset:])
        assert batch.lengths == [x.shape[1]] * x.shape[0]


def test_a_flat_file_counts_as_one_prompt(tmp_path):
    ((x, _), _) = made(tmp_path, shapes=((7,), (3,)))
    batch = read_layered_batches(tmp_path)[0]
    assert batch.lengths == [7]
    assert torch.equal(batch.x, x[:, : L - 1])


def test_batches_come_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 2, 9):
        save(tmp_path, torch.full((number, L, D), float(number)), torch.zeros(number, L, D), batch=number)
    found = read_layered_batches(tmp_path)
    assert found.batches == (2, 9, 10)
    assert found[2].x.unique().tolist() == [10.0]


def spoilt(folder: Path, file: str, value: object = None) -> None:
    if value is None:
        (folder / file).unlink()
    elif isinstance(value, bytes):
        (folder / file).write_bytes(value)
    else:
        torch.save(value, folder / file)


class Foreign:
    """Something that only unpickling could bring back."""


@pytest.mark.parametrize(
    ("file", "value", "named"),
    [
        ("L1/batch_1_y.pt", None, "L1/batch_1_y.pt: is missing"),
        ("L1/batch_0_x.pt", torch.randn(2, 6, D), r"L1/batch_0_x.pt: has shape \[2, 6, 6\]; its batch has \[2, 5, 6\]"),
        ("L2/batch_1_y.pt", torch.randn(3, 4, 7), r"L2/batch_1_y.pt: has shape \[3, 4, 7\]; its batch has \[3, 4, 6\]"),
        ("L0/batch_1_x.pt", torch.randn(3, 4, 7), r"L0/batch_1_x.pt: has shape \[3, 4, 7\].* of width 6"),
        ("L2/batch_0_y.pt", b"PK torn", "L2/batch_0_y.pt: cannot be read as tensors"),
        ("L2/batch_0_y.pt", Foreign(), "L2/batch_0_y.pt: cannot be read as tensors"),
        (
            "L2/batch_0_y.pt",
            torch.ones(2, 5, D, dtype=torch.long),
            "L2/batch_0_y.pt: holds Tensor, a tensor of floating",
        ),
        ("L2/batch_0_y.pt", {"a": 1}, "L2/batch_0_y.pt: holds dict, a tensor of floating"),
    ],
)
def test_the_first_file_that_does_not_fit_is_named(tmp_path, file, value, named):
    made(tmp_path)
    spoilt(tmp_path, file, value)
    with pytest.raises(UserError, match=named):
        read_layered_batches(tmp_path)


def test_layers_and_batches_that_are_missing_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder; give the one that holds L0, L1"):
        read_layered_batches(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no folders L0, L1"):
        read_layered_batches(tmp_path)
    made(tmp_path)
    for array in "xy":
        (tmp_path / "L1" / f"batch_0_{array}.pt").unlink()
    with pytest.raises(UserError, match="batch 0 is not in both L0 and L1"):
        read_layered_batches(tmp_path)
    (tmp_path / "L1").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="L1: is missing between L0 and L2"):
        read_layered_batches(tmp_path)


def test_a_write_that_two_folders_hold_differently_is_named(tmp_path):
    made(tmp_path, n=3)
    other = torch.load(tmp_path / "L0" / "batch_0.pt", weights_only=True)
    other["targets"][1] = other["targets"][1].roll(1, 0)
    torch.save(other, tmp_path / "L0" / "batch_0.pt")
    with pytest.raises(UserError, match="L0/batch_0.pt: target 1 is not what another folder has for MLP 2"):
        read_layered_batches(tmp_path)


@pytest.mark.parametrize("value", [{"x": torch.ones(3, D)}, torch.ones(3, D), {"x": torch.ones(3, D), "targets": []}])
def test_one_file_needs_reads_and_targets(tmp_path, value):
    made(tmp_path, n=2)
    torch.save(value, tmp_path / "L0" / "batch_0.pt")
    with pytest.raises(UserError, match=r"L0/batch_0.pt: (needs a dict|has 0 targets)"):
        read_layered_batches(tmp_path)
