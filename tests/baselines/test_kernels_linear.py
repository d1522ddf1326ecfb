"""Tests of linear attention in C++ against its reference and torch form, at sizes that fill neither tiles nor panels."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from baselines.kernels import linear
from baselines.linear import LinearAttention, linear_attention, linear_attention_reference

SIZES = [(1, 6, 6), (12, 16, 16), (37, 20, 45), (64, 64, 33)]
"""Chunk size, head_dim of q and k, head_dim of v."""


def inputs(
    time: int, dim: int, value_dim: int, *, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Heads as projections return them: views of joined heads."""
    generator = torch.Generator().manual_seed(time)
    shapes = [(heads, dim), (kv_heads, dim), (kv_heads, value_dim)]
    return [torch.randn(2, time, h, d, generator=generator, dtype=dtype).transpose(1, 2) for h, d in shapes]


def gradients(out: Tensor, tensors: list[Tensor], **options: bool) -> tuple[Tensor, ...]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad(out, tensors, upstream, **options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize(("size", "dim", "value_dim"), SIZES)
@pytest.mark.parametrize("threads", [1, 5], indirect=True)
@pytest.mark.usefixtures("threads")
def test_values_and_gradients_match_the_reference(
    dtype: torch.dtype, tolerance: float, size: int, dim: int, value_dim: int
) -> None:
    for time in {1, max(1, size - 1), size, size + 1, 3 * size + 5}:
        tensors = [x.requires_grad_() for x in inputs(time, dim, value_dim, dtype=dtype)]
        out = linear_attention(*tensors, chunk_size=size, impl="cpp")
        expected = linear_attention_reference(*tensors)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        for gradient, wanted in zip(gradients(out, tensors), gradients(expected, tensors), strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=tolerance * max(1, wanted.abs().max().item()))


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("threads", [1, 4], indirect=True)
@pytest.mark.usefixtures("threads")
def test_states_and_their_gradients_match_the_torch_form(kv_heads: int) -> None:
    """Segments of a sequence, with gradients by the weights and by the state of a prefix."""
    results = []
    for impl in ("cpp", "torch"):
        torch.manual_seed(0)
        attention = LinearAttention(36, 6, num_kv_heads=kv_heads, chunk_size=5, impl=impl).double()
        x = torch.randn(2, 40, 36, dtype=torch.float64)
        _, prefix = attention.extend(x[:, :7])
        leaf = prefix["total"].detach().requires_grad_()
        first, state = attention.extend(x[:, 7:20], prefix | {"total": leaf})
        second, state = attention.extend(x[:, 20:], state)
        out = torch.cat([x.flatten() for x in (first, second, state["total"])])
        results.append([out, *gradients(out, [leaf, *attention.parameters()])])
    for by_cpp, by_torch in zip(*results, strict=True):
        torch.testing.assert_close(by_cpp, by_torch, rtol=1e-11, atol=1e-12)


def test_any_strides_are_supported() -> None:
    tensors = inputs(23, 6, 9)
    expected = linear_attention(*tensors, chunk_size=8, impl="cpp")
    scattered = [x.mT.contiguous().mT for x in tensors]
    assert torch.equal(linear_attention(*scattered, chunk_size=8, impl="cpp"), expected)
    shared = tensors[0][:, :1].expand(-1, 4, -1, -1).requires_grad_()  # one head, four times
    out = linear_attention(shared, *tensors[1:], chunk_size=8, impl="cpp")
    torch.testing.assert_close(out, linear_attention_reference(shared, *tensors[1:]), rtol=0, atol=1e-13)
    # The upstream gradient of a sum is one number, expanded.
    by_sum = torch.autograd.grad(out.sum(), shared, retain_graph=True)[0]
    assert torch.equal(by_sum, torch.autograd.grad(out, shared, torch.ones_like(out))[0])


def test_second_derivatives_are_those_of_torch() -> None:
    tensors = [x[:1].requires_grad_() for x in inputs(7, 3, 3, heads=2, kv_heads=1)]
    assert torch.autograd.gradgradcheck(lambda *x: linear_attention(*x, chunk_size=3, impl="cpp"), tensors)


def test_what_the_kernel_does_not_support_runs_in_torch() -> None:
    attention = LinearAttention(16, 2)
    x = torch.randn(2, 9, 16)
    assert attention.implementation(*attention.project(x)) == "cpp"
    assert attention.bfloat16().implementation(*attention.project(x.bfloat16())) == "torch"
    q, k, v = inputs(9, 4, 4)
    by_item = torch.vmap(lambda *x: linear_attention(*(y[None] for y in x))[0])(q, k, v)
    torch.testing.assert_close(by_item, linear_attention(q, k, v))
    gradient = torch.func.grad(lambda q: linear_attention(q, k, v).sum())(q)
    torch.testing.assert_close(gradient, torch.autograd.grad(linear_attention(q.requires_grad_(), k, v).sum(), q)[0])
    with pytest.raises(NotImplementedError, match="takes float32 or float64"):
        linear_attention(*(x.bfloat16() for x in (q, k, v)), impl="cpp")
    with pytest.raises(ValueError, match=r"the state must be \[2, 2, 8, 9\] for these keys and values, got \[2, 2, 8, 8\]"):
        attention.float().attend_after(torch.zeros(2, 2, 8, 8), *attention.project(x))


def test_the_operators_count_their_products() -> None:
    attention = LinearAttention(128, 2, chunk_size=96)
    tensors = attention.project(torch.randn(2, 2 * 96, 128))
    with FlopCounterMode(display=False) as counter:
        attention.attend(*tensors)
    # Scores are computed in whole tiles, of 12 rows or fewer and of whole panels.
    declared = attention.flops(2 * 96, batch_size=2)
    assert 0.98 * declared <= counter.get_total_flops() <= 1.25 * declared
    assert linear.KERNELS.unsupported(*tensors) is None
