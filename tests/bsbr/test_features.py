"""Tests of the feature maps: their products, the squared inner product that they give, and the C++ implementation."""

import pytest
import torch

from bsbr.backends.cpp import functions
from bsbr.backends.pytorch import pairwise_products, quadratic_features
from bsbr.features import num_factors


def test_pairwise_products_of_three_numbers() -> None:
    root = 2**0.5
    x = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    everything = torch.tensor([4, 9, 25, 6 * root, 15 * root, 10 * root], dtype=torch.float64)
    for size in range(1, 7):
        torch.testing.assert_close(pairwise_products(x, size), everything[:size], rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 11])
def test_all_products_give_the_squared_inner_product(size: int) -> None:
    x, y = torch.randn(2, 3, 5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    all_products = size * (size + 1) // 2
    product = (pairwise_products(x, all_products) * pairwise_products(y, all_products)).sum(dim=-1)
    torch.testing.assert_close(product, (x * y).sum(dim=-1).square(), rtol=0, atol=1e-12)


def test_the_smallest_number_of_factors() -> None:
    assert [num_factors(size) for size in (1, 2, 3, 4, 6, 7, 16, 32, 36, 37, 64, 128)] == [1, 2, 2, 3, 3, 4, 6, 8, 8, 9, 11, 16]


@pytest.mark.parametrize("size", [3, 12, 15])
def test_gradients_of_pairwise_products_match_finite_differences(size: int) -> None:
    x = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: pairwise_products(y, size), (x,))


@pytest.mark.parametrize(("factors", "size"), [(1, 1), (3, 4), (8, 32), (11, 64), (16, 136)])
def test_cpp_features_and_gradients_match_torch(factors: int, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    # Heads as they are split from a projection, more tokens than one task has, and a token of zeros.
    x = torch.randn(2, 131, 3, factors, dtype=torch.float64, generator=generator).transpose(1, 2)
    x[:, :, 7] = 0
    x.requires_grad_()
    for_out = torch.randn(2, 3, 131, size, dtype=torch.float64, generator=generator)
    products = [make(x, size) for make in (quadratic_features, functions.quadratic_features)]
    gradients = [torch.autograd.grad((out * for_out).sum(), x)[0] for out in products]
    for plain, fast in (products, gradients):
        torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)
