"""What a store keeps of an array: the numbers themselves, their bf16 rounding, or bytes with a scale a row."""

import numpy as np
import pytest
import torch

from crosslayer import UserError
from crosslayer.activations.encoding import ENCODINGS, encoding


def back(name: str, array: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
    form = ENCODINGS[name]
    out = torch.empty(array[rows].shape, dtype=form.working_dtype)
    form.decode("x", form.encode("x", array), rows, out)
    return out


def test_floating_point_forms_are_exact():
    array = torch.randn(9, 3, 8)
    assert torch.equal(back("fp32", array), array)
    assert torch.equal(back("bf16", array), array.bfloat16())
    assert torch.equal(back("fp32", array, slice(2, 5)), array[2:5])


def test_bytes_are_off_by_half_a_step_of_their_own_row_at_most():
    array = torch.randn(50, 4, 32) * torch.logspace(-6, 4, 50)[:, None, None]
    array[7, 2] = 0
    step = np.abs(array.double().numpy()).max(2) / 127
    gap = np.abs(back("int8", array).double().numpy() - array.double().numpy())
    assert (gap <= 0.5001 * step[:, :, None]).all()
    assert torch.equal(back("int8", array, slice(7, 9)), back("int8", array)[7:9])


def test_the_added_error_is_the_share_of_the_squares():
    array, form = torch.randn(64, 3, 16), ENCODINGS["int8"]
    gap = (back("int8", array) - array).double()
    wanted = (gap.square().sum((0, 2)) / array.double().square().sum((0, 2))).tolist()
    assert form.added_error("x", form.encode("x", array), array) == pytest.approx(wanted, rel=1e-4)
    assert 0 < max(wanted) < 1e-3
    assert ENCODINGS["bf16"].added_error("x", {}, array) == []


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_number_that_is_not_finite_is_not_lost(bad):
    array = torch.ones(4, 2, 8)
    array[1, 1, 3] = bad
    found = back("int8", array)
    assert not found[1, 1].isfinite().all()
    assert found[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize(("name", "n_bytes"), [("fp32", 128), ("bf16", 64), ("int8", 36)])
def test_the_room_is_that_of_the_tensors(name, n_bytes):
    tensors = ENCODINGS[name].encode("x", torch.randn(5, 1, 32))
    assert ENCODINGS[name].bytes_a_vector(32) == n_bytes == sum(t.nbytes for t in tensors.values()) // 5


def test_another_dtype_is_refused():
    with pytest.raises(UserError, match="dtype is 'fp8'; choose one of fp32, bf16, int8"):
        encoding("fp8")
