"""Tests of the gated attention unit in C++ against its reference and torch form, at sizes that fill neither tiles nor panels."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from baselines.gau import GatedAttentionUnit, gated_attention_unit, gated_attention_unit_reference

SIZES = [(1, 6, 5), (12, 16, 40), (37, 20, 133), (64, 33, 600)]
"""Chunk size, key_dim, value_dim."""


def inputs(time: int, key_dim: int, value_dim: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Rows as projections return them, but farther apart than they are long."""
    generator = torch.Generator().manual_seed(time)
    dims = (value_dim, value_dim, key_dim, key_dim, key_dim, key_dim)
    return [torch.randn(2, time, dim + 3, generator=generator, dtype=dtype)[..., :dim] for dim in dims]


def gradients(out: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad(out, tensors, upstream, materialize_grads=True, allow_unused=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize(("size", "key_dim", "value_dim"), SIZES)
@pytest.mark.parametrize("threads", [1, 5], indirect=True)
@pytest.mark.usefixtures("threads")
def test_values_and_gradients_match_the_reference(
    dtype: torch.dtype, tolerance: float, size: int, key_dim: int, value_dim: int
) -> None:
    for time in {1, max(1, size - 1), size, size + 1, 3 * size + 5}:
        tensors = [x.requires_grad_() for x in inputs(time, key_dim, value_dim, dtype)]
        out = gated_attention_unit(*tensors, chunk_size=size, impl="cpp")
        with torch.no_grad():
            assert torch.equal(gated_attention_unit(*tensors, chunk_size=size, impl="cpp"), out)
        expected = gated_attention_unit_reference(*tensors, chunk_size=size)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
        for gradient, wanted in zip(gradients(out, tensors), gradients(expected, tensors), strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=tolerance * max(1, wanted.abs().max().item()))


@pytest.mark.parametrize("threads", [1, 4], indirect=True)
@pytest.mark.usefixtures("threads")
def test_states_and_their_gradients_match_the_torch_form() -> None:
    """Segments that end within chunks, with gradients by the weights and by the state of a prefix."""
    results = []
    for impl in ("cpp", "torch"):
        torch.manual_seed(0)
        attention = GatedAttentionUnit(24, 1, chunk_size=5, key_dim=7, value_dim=70, impl=impl).double()
        x = torch.randn(2, 40, 24, dtype=torch.float64)
        _, prefix = attention.extend(x[:, :7])
        leaf = prefix["past"].detach().requires_grad_()
        first, state = attention.extend(x[:, 7:22], prefix | {"past": leaf})
        second, state = attention.extend(x[:, 22:], state)
        out = torch.cat([x.flatten() for x in (first, second, state["past"])])
        results.append([out, *gradients(out, [leaf, *attention.parameters()])])
    for by_cpp, by_torch in zip(*results, strict=True):
        torch.testing.assert_close(by_cpp, by_torch, rtol=1e-11, atol=1e-12)


def test_any_strides_are_supported() -> None:
    tensors = inputs(23, 6, 9)
    expected = gated_attention_unit(*tensors, chunk_size=8, impl="cpp")
    scattered = [x.mT.contiguous().mT for x in tensors]
    assert torch.equal(gated_attention_unit(*scattered, chunk_size=8, impl="cpp"), expected)
    shared = tensors[0][:1].expand(2, -1, -1).requires_grad_()  # one item, twice
    out = gated_attention_unit(shared, *tensors[1:], chunk_size=8, impl="cpp")
    torch.testing.assert_close(out, gated_attention_unit_reference(shared, *tensors[1:], chunk_size=8), rtol=1e-12, atol=1e-12)
    # The upstream gradient of a sum is one number, expanded.
    by_sum = torch.autograd.grad(out.sum(), shared, retain_graph=True)[0]
    assert torch.equal(by_sum, torch.autograd.grad(out, shared, torch.ones_like(out))[0])


def test_second_derivatives_are_those_of_torch() -> None:
    tensors = [x[:1].requires_grad_() for x in inputs(5, 2, 3)]
    assert torch.autograd.gradgradcheck(lambda *x: gated_attention_unit(*x, chunk_size=2, impl="cpp"), tensors)


def test_what_the_kernel_does_not_support_runs_in_torch() -> None:
    attention = GatedAttentionUnit(16, 1, chunk_size=4)
    x = torch.randn(2, 9, 16)
    assert attention.implementation(*attention.project(x)) == "cpp"
    _, state = attention.extend(x[:, :8])
    with pytest.raises(ValueError, match=r"the state must be \[batch, key_dim, value_dim\] = \[2, 128, 32\], got \[2, 128, 31\]"):
        attention.extend(x, state | {"past": state["past"][..., 1:]})
    assert attention.bfloat16().implementation(*attention.project(x.bfloat16())) == "torch"
    tensors = inputs(9, 4, 5)
    by_item = torch.vmap(lambda *x: gated_attention_unit(*(y[None] for y in x), chunk_size=4)[0])(*tensors)
    torch.testing.assert_close(by_item, gated_attention_unit(*tensors, chunk_size=4))
    with pytest.raises(NotImplementedError, match="takes float32 or float64"):
        gated_attention_unit(*(x.bfloat16() for x in tensors), impl="cpp")


def test_the_operator_counts_its_products() -> None:
    attention = GatedAttentionUnit(64, 1, chunk_size=96, key_dim=48, value_dim=128)
    tensors = attention.project(torch.randn(2, 2 * 96, 64))
    with FlopCounterMode(display=False) as counter:
        attention.attend(*tensors)
    # Scores are computed in whole tiles, of 12 rows or fewer and of whole panels.
    declared = attention.flops(2 * 96, batch_size=2)
    assert declared <= counter.get_total_flops() <= 1.25 * declared
