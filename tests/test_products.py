"""Dense products against float64, and its gradients against torch's own."""

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from crosslayer.coders import products
from crosslayer.coders.products import QuickProducts, affine, product
from making import array


def parts(N: int, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    shapes = ((N, 33), (17, 33), (17,))
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("N", [0, 1, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_a_product_and_a_sum(N, dtype):
    x, W, b = parts(N, dtype)
    tolerance = 2e-6 if dtype != torch.bfloat16 else 2e-2
    np.testing.assert_allclose(array(affine(x, W, b)), array(x) @ array(W).T + array(b), atol=30 * tolerance)
    assert affine(x, W, b).dtype == dtype


def test_its_gradients_are_those_of_a_linear_layer():
    inputs, grad = parts(20), torch.randn(20, 17)
    ours = torch.autograd.grad(affine(*inputs), inputs, grad)
    theirs = torch.autograd.grad(linear(*inputs), inputs, grad)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)


def test_rows_that_do_not_lie_together_are_read_right():
    x, W, b = parts(24)
    apart = x.view(12, 2, 33)[:, 1]
    torch.testing.assert_close(affine(apart, W, b), linear(apart, W, b))


def test_a_transposed_matrix_without_bias_will_do():
    x, W = torch.randn(9, 12, requires_grad=True), torch.randn(12, 20, requires_grad=True)
    found, grad = affine(x, W.T), torch.randn(9, 20)
    torch.testing.assert_close(found, x @ W)
    torch.testing.assert_close(torch.autograd.grad(found, (x, W), grad), torch.autograd.grad(x @ W, (x, W), grad))


def test_autocast_is_left_to_torch():
    x, W, b = parts(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert affine(x, W, b).dtype == torch.bfloat16


@pytest.mark.parametrize("quick", [products.QUICK, None], ids=["oneDNN", "usual"])
def test_a_product_of_passes_back_is_the_same_with_and_without_the_private_way(monkeypatch, quick):
    monkeypatch.setattr(products, "QUICK", quick)
    x, W = torch.randn(50, 33), torch.randn(33, 17)
    np.testing.assert_allclose(array(product(x, W)), array(x) @ array(W), atol=6e-5)
    leaf = torch.randn(50, 33, requires_grad=True)
    with QuickProducts():
        (grad,) = torch.autograd.grad(leaf @ W, leaf, torch.ones(50, 17))
    np.testing.assert_allclose(array(grad), np.ones((50, 17)) @ array(W).T, atol=6e-5)
