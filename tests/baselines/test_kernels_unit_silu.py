"""Queries and keys of DeltaNet in C++: values and gradients against their definition in float64."""

import pytest
import torch
from torch import Tensor

from baselines.kernels.unit_silu import KERNELS, unit_silu

pytestmark = pytest.mark.skipif(KERNELS.unsupported(torch.empty(1)) is not None, reason="no compiler")


def definition(x: Tensor) -> Tensor:
    y = x.double() / (1 + (-x.double()).exp())
    return y / y.square().sum(dim=-1, keepdim=True).sqrt().clamp(min=1e-6)


@pytest.mark.parametrize(("batch", "heads", "time", "dim"), [(1, 1, 1, 1), (2, 2, 65, 17), (1, 3, 130, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_the_definition(dtype: torch.dtype, batch: int, heads: int, time: int, dim: int) -> None:
    random = torch.Generator().manual_seed(time)
    x, d_y = (torch.randn(batch, time, heads, dim, dtype=dtype, generator=random).transpose(1, 2) for _ in range(2))
    x = (5 * x).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, expected = unit_silu(x, "cpp"), definition(wide)
    gradients = torch.autograd.grad(y, x, d_y), torch.autograd.grad(expected, wide, d_y.double())
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-10}
    torch.testing.assert_close(y.double(), expected, **tolerance)
    torch.testing.assert_close(gradients[0][0].double(), gradients[1][0], **tolerance)


def test_rows_of_zeros_and_of_huge_numbers() -> None:
    """A norm below 1e-6 counts as 1e-6; e^x is never computed for a large x. The gradients are those of the torch form."""
    x = torch.tensor([[0.0, 0.0], [-200.0, -300.0], [1e9, -1e9], [1e-8, -1e-8]], dtype=torch.float32).view(1, 1, 4, 2)
    results = []
    for impl in ("cpp", "torch"):
        q = x.clone().requires_grad_()
        y = unit_silu(q, impl)
        results.append((y, *torch.autograd.grad(y.sum(), q)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_second_derivatives_are_those_of_the_torch_form() -> None:
    q = torch.randn(1, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: unit_silu(x, "cpp"), (q,))
