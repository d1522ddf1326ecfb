"""Tests linear, delta_net, gated_delta_net and gau against loops in numpy, cases worked by hand, and their declared costs."""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from baselines.delta_net import DeltaNetAttention, delta_rule, delta_rule_reference
from baselines.gated_delta_net import GatedDeltaNetAttention, gated_delta_rule, gated_delta_rule_reference
from baselines.gau import GatedAttentionUnit, gated_attention_unit, gated_attention_unit_reference
from baselines.kernels import fla
from baselines.linear import LinearAttention, linear_attention, linear_attention_reference
from bsbr.interface import Attention

CHUNK = 8
LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 7, 7 * CHUNK + 3]
Array = np.ndarray[Any, Any]


# --- oracles: float64, loops over every index that the equations sum over -------------------------


def linear_oracle(q: Array, k: Array, v: Array) -> Array:
    def phi(x: Array) -> Array:
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))

    out = np.zeros_like(q)
    for b, h, t in np.ndindex(*q.shape[:3]):
        source = h // (q.shape[1] // k.shape[1])
        weights = np.array([phi(q[b, h, t]) @ phi(k[b, source, s]) for s in range(t + 1)])
        out[b, h, t] = weights @ v[b, source, : t + 1] / weights.sum()
    return out


def delta_oracle(q: Array, k: Array, v: Array, beta: Array) -> Array:
    out = np.zeros_like(q)
    for b, h in np.ndindex(*q.shape[:2]):
        source = h // (q.shape[1] // k.shape[1])
        state = np.zeros((q.shape[3], q.shape[3]))
        for t in range(q.shape[2]):
            key, rate = k[b, source, t], beta[b, source, t]
            state = (np.eye(len(key)) - rate * np.outer(key, key)) @ state + rate * np.outer(key, v[b, source, t])
            out[b, h, t] = state.T @ q[b, h, t]
    return out


def gated_delta_oracle(q: Array, k: Array, v: Array, beta: Array, log_alpha: Array) -> Array:
    out = np.zeros_like(q)
    for b, h in np.ndindex(*q.shape[:2]):
        source = h // (q.shape[1] // k.shape[1])
        state = np.zeros((q.shape[3], q.shape[3]))
        for t in range(q.shape[2]):
            key, rate, alpha = k[b, source, t], beta[b, source, t], np.exp(log_alpha[b, source, t])
            state = alpha * (np.eye(len(key)) - rate * np.outer(key, key)) @ state + rate * np.outer(key, v[b, source, t])
            out[b, h, t] = state.T @ q[b, h, t]
    return out


def gau_oracle(u: Array, v: Array, quad_q: Array, quad_k: Array, lin_q: Array, lin_k: Array, chunk: int) -> Array:
    out = np.zeros_like(u)
    for b, t in np.ndindex(*u.shape[:2]):
        far = [s for s in range(t) if s // chunk < t // chunk]
        for s in range(t + 1):
            if s // chunk == t // chunk:
                out[b, t] += max(quad_q[b, t] @ quad_k[b, s] / chunk, 0.0) ** 2 * v[b, s]
            else:
                out[b, t] += lin_q[b, t] @ lin_k[b, s] / len(far) * v[b, s]
    return out * u


# --- the four, as (inputs, fast, reference, oracle) ------------------------------------------------


def linear_inputs(time: int, kv_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(time)
    return [torch.randn(2, heads, time, 6, generator=generator, dtype=torch.float64) for heads in (4, kv_heads, kv_heads)]


def delta_inputs(time: int, kv_heads: int = 2) -> list[Tensor]:
    q, k, v = linear_inputs(time, kv_heads)
    beta = torch.rand(2, kv_heads, time, generator=torch.Generator().manual_seed(time), dtype=torch.float64)
    return [q, k / k.norm(dim=-1, keepdim=True), v, beta]


def gated_delta_inputs(time: int, kv_heads: int = 2) -> list[Tensor]:
    """Decays from almost none to e^-20 per token: a product of plain α over a chunk underflows."""
    generator = torch.Generator().manual_seed(time)
    spread = 10 ** (4 * torch.rand(2, kv_heads, time, generator=generator, dtype=torch.float64) - 3)
    return [*delta_inputs(time, kv_heads), -2 * spread]


def gau_inputs(time: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(time)
    return [torch.randn(2, time, dim, generator=generator, dtype=torch.float64) for dim in (10, 10, 6, 6, 6, 6)]


def gau_reference(*tensors: Tensor) -> Tensor:
    u, v, *heads = tensors
    return gated_attention_unit_reference(u, v, *heads, chunk_size=CHUNK)


def gau_oracle_at_chunk(*arrays: Array) -> Array:
    u, v, quad_q, quad_k, lin_q, lin_k = arrays
    return gau_oracle(u, v, quad_q, quad_k, lin_q, lin_k, CHUNK)


FUNCTIONS = pytest.mark.parametrize(
    ("inputs", "fast", "reference", "oracle"),
    [
        pytest.param(linear_inputs, linear_attention, linear_attention_reference, linear_oracle, id="linear"),
        pytest.param(delta_inputs, partial(delta_rule, impl="torch"), delta_rule_reference, delta_oracle, id="delta_net"),
        pytest.param(
            gated_delta_inputs,
            partial(gated_delta_rule, impl="torch"),
            gated_delta_rule_reference,
            gated_delta_oracle,
            id="gated_delta_net",
        ),
        pytest.param(gau_inputs, gated_attention_unit, gau_reference, gau_oracle_at_chunk, id="gau"),
    ],
)
MODULES = pytest.mark.parametrize("cls", [LinearAttention, DeltaNetAttention, GatedDeltaNetAttention, GatedAttentionUnit])
Make = Callable[..., Attention]


@FUNCTIONS
@pytest.mark.parametrize("time", LENGTHS)
def test_fast_and_reference_equal_the_oracle(
    inputs: Callable[..., list[Tensor]], fast: Callable[..., Tensor], reference: Callable[..., Tensor], oracle: Any, time: int
) -> None:
    tensors = inputs(time)
    expected = torch.from_numpy(oracle(*(x.numpy() for x in tensors)))
    torch.testing.assert_close(fast(*tensors, chunk_size=CHUNK), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(reference(*tensors), expected, rtol=0, atol=1e-11)


@FUNCTIONS
@pytest.mark.parametrize("time", [1, CHUNK, 3 * CHUNK + 7])
def test_gradients_equal_those_of_the_reference(
    inputs: Callable[..., list[Tensor]], fast: Callable[..., Tensor], reference: Callable[..., Tensor], oracle: Any, time: int
) -> None:
    tensors = [x.requires_grad_() for x in inputs(time)]
    out = fast(*tensors, chunk_size=CHUNK)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = torch.autograd.grad(out, tensors, upstream, allow_unused=True)
    expected_gradients = torch.autograd.grad(reference(*tensors), tensors, upstream, allow_unused=True)
    for gradient, expected, x in zip(gradients, expected_gradients, tensors, strict=True):
        zero = torch.zeros_like(x)
        torch.testing.assert_close(
            zero if gradient is None else gradient, zero if expected is None else expected, rtol=1e-9, atol=1e-11
        )


@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_inputs_and_outputs_only(
    inputs: Callable[..., list[Tensor]],
    fast: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    oracle: Any,
    dtype: torch.dtype,
) -> None:
    rounded = [x.to(dtype) for x in inputs(5 * CHUNK + 3)]
    out = fast(*rounded, chunk_size=CHUNK)
    assert out.dtype == dtype
    expected = reference(*rounded)
    # Rounding the result gives half an ulp, eps / 2; float32 sums add almost nothing.
    assert torch.linalg.vector_norm(out.double() - expected) <= torch.finfo(dtype).eps * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads(kv_heads: int) -> None:
    q, k, v, beta = delta_inputs(2 * CHUNK + 3, kv_heads)
    repeated = [x.repeat_interleave(4 // kv_heads, dim=1) for x in (k, v, beta)]
    torch.testing.assert_close(delta_rule(q, k, v, beta, chunk_size=CHUNK), delta_rule(q, *repeated, chunk_size=CHUNK))
    torch.testing.assert_close(linear_attention(q, k, v, chunk_size=CHUNK), linear_attention(q, *repeated[:2], chunk_size=CHUNK))


# --- cases worked by hand ---------------------------------------------------------------------------


def column(*numbers: float) -> Tensor:
    """One head of width 1: [1, 1, time, 1]."""
    return torch.tensor(numbers, dtype=torch.float64).view(1, 1, -1, 1)


@pytest.mark.parametrize("chunk_size", [1, 2, 64])
def test_linear_by_hand(chunk_size: int) -> None:
    # One feature: phi(q) cancels, and o_t is the mean of v weighted by phi(k) = 1, 2, 1/2.
    out = linear_attention(column(5, -3, 0), column(0, 1, np.log(0.5)), column(3, 0, 8), chunk_size=chunk_size)
    torch.testing.assert_close(out, column(3, 1, 2))


@pytest.mark.parametrize("chunk_size", [1, 2, 64])
def test_delta_rule_by_hand(chunk_size: int) -> None:
    # S goes half the way to v: 2, 1, 4.5; then beta = 1 forgets it all, and beta = 0 writes nothing.
    v, beta = column(4, 0, 8, 7, 9), torch.tensor([[[0.5, 0.5, 0.5, 1.0, 0.0]]], dtype=torch.float64)
    out = delta_rule(column(1, 2, 1, 1, 3), column(1, 1, 1, 1, 1), v, beta, chunk_size=chunk_size)
    torch.testing.assert_close(out, column(2, 2, 4.5, 7, 21))


@pytest.mark.parametrize("chunk_size", [1, 2, 64])
def test_gated_delta_rule_by_hand(chunk_size: int) -> None:
    # S goes half the way from half of itself to v: 2, then (1 + 0) / 2, then (1/4 + 8) / 2; β = 0 only forgets.
    v, beta = column(4, 0, 8, 7), torch.tensor([[[0.5, 0.5, 0.5, 0.0]]], dtype=torch.float64)
    halves = torch.full_like(beta, np.log(0.5))
    out = gated_delta_rule(column(1, 2, 1, 8), column(1, 1, 1, 1), v, beta, halves, chunk_size=chunk_size)
    torch.testing.assert_close(out, column(2, 1, 4.125, 16.5))


@pytest.mark.parametrize("time", LENGTHS)
def test_without_decay_gated_delta_net_is_delta_net(time: int) -> None:
    q, k, v, beta = delta_inputs(time)
    out = gated_delta_rule(q, k, v, beta, torch.zeros_like(beta), chunk_size=CHUNK)
    torch.testing.assert_close(out, delta_rule(q, k, v, beta, chunk_size=CHUNK), rtol=0, atol=1e-12)


def test_gated_attention_unit_by_hand() -> None:
    # Near: relu(2·1 / 2)² = 1, so sums of v within pairs: 1, 3 | 4, 12 | 16. Far: 3 times the mean of v before the pair.
    u, v, quad_q, quad_k, lin_q, lin_k = (column(*[x] * 5)[0] for x in (2, 0, 2, 1, 3, 1))
    v = column(1, 2, 4, 8, 16)[0]
    out = gated_attention_unit(u, v, quad_q, quad_k, lin_q, lin_k, chunk_size=2)
    torch.testing.assert_close(out, 2 * column(1, 3, 4 + 4.5, 12 + 4.5, 16 + 3 * 15 / 4)[0])


# --- hard inputs --------------------------------------------------------------------------------------


def test_equal_keys_do_not_cancel_in_float32() -> None:
    """(I + tril(ones))⁻¹ has entries ±1, while the powers it could be summed from reach 10¹⁸."""
    q = torch.ones(1, 1, 200, 4) / 2
    v = torch.randn(1, 1, 200, 4, generator=torch.Generator().manual_seed(0))
    beta = torch.full((1, 1, 200), 0.99)
    expected = delta_rule_reference(q, q, v, beta)
    torch.testing.assert_close(delta_rule(q, q, v, beta).double(), expected, rtol=1e-4, atol=1e-5)


@MODULES
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("constant", [False, True])
def test_hard_inputs_give_finite_outputs_and_gradients(cls: Make, scale: float, constant: bool) -> None:
    torch.manual_seed(0)
    attention = cls(hidden_dim=8, num_heads=4, chunk_size=CHUNK)
    x = (torch.ones(2, 3 * CHUNK + 7, 8) if constant else torch.randn(2, 3 * CHUNK + 7, 8)) * scale
    out = attention(x.requires_grad_())
    out.sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in attention.parameters())]
    assert out.isfinite().all()
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_linear_attention_with_underflowed_features_is_zero() -> None:
    q = torch.full((1, 1, 5, 2), -1e4, requires_grad=True)
    out = linear_attention(q, q, torch.ones(1, 1, 5, 2), chunk_size=2)
    out.sum().backward()
    assert (out == 0).all()
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_the_linear_term_of_gau_does_not_grow_with_time() -> None:
    out = gated_attention_unit(*(torch.ones(1, 400, 3) for _ in range(6)), chunk_size=4)
    torch.testing.assert_close(out[:, -4:], out[:, 4:8])


# --- streaming ------------------------------------------------------------------------------------------


def build(cls: Make, **options: Any) -> Attention:
    torch.manual_seed(1)
    return cls(hidden_dim=16, num_heads=4, chunk_size=CHUNK, **options).double()


def stream(attention: Attention, x: Tensor, cuts: list[int]) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
    state = None
    for start, stop in pairwise([0, *cuts, x.shape[1]]):
        out, state = attention.extend(x[:, start:stop], state)
        yield stop, out, state


@MODULES
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(
    "cuts",
    [[], list(range(1, 31)), [3], [CHUNK], [1, CHUNK], [CHUNK - 1, CHUNK], [3, 4, CHUNK + 1, 3 * CHUNK], [5, 2 * CHUNK + 5]],
    ids=str,
)
def test_extend_equals_forward_for_any_split(cls: Make, rotary: bool, cuts: list[int]) -> None:
    attention = build(cls, rotary=rotary)
    x = torch.randn(2, 31, 16, dtype=torch.float64)
    with torch.no_grad():
        parts = list(stream(attention, x, cuts))
        torch.testing.assert_close(torch.cat([out for _, out, _ in parts], dim=1), attention(x), rtol=0, atol=1e-12)
    for tokens, _, state in parts:
        state_bytes = sum(tensor.nbytes for tensor in state.values())
        declared = attention.state_bytes(tokens, batch_size=2)
        assert declared <= state_bytes <= declared + 64
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state.values())


@MODULES
def test_extend_does_not_change_the_state_it_is_given(cls: Make) -> None:
    attention = build(cls)
    x = torch.randn(1, 2 * CHUNK + 3, 16, dtype=torch.float64)
    with torch.no_grad():
        _, state = attention.extend(x)
        before = {name: tensor.clone() for name, tensor in state.items()}
        first = attention.extend(x, state)[0]
        second = attention.extend(x, state)[0]
    assert torch.equal(first, second)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


@MODULES
def test_the_state_of_a_half_precision_module_sums_in_float32(cls: Make) -> None:
    attention = build(cls).to(torch.bfloat16)
    with torch.no_grad():
        out, state = attention.extend(torch.randn(1, CHUNK + 3, 16, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert next(state[name] for name in ("total", "past") if name in state).dtype == torch.float32
    assert 0 <= sum(tensor.nbytes for tensor in state.values()) - attention.state_bytes(CHUNK + 3) <= 64


def test_delta_net_projects_to_unit_norm() -> None:
    attention = build(DeltaNetAttention, rotary=True)
    q, k, _, beta = attention.project(torch.randn(2, 5, 16, dtype=torch.float64), start=3)
    for x in (q, k):
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(2, 4, 5, dtype=torch.float64))
    assert ((beta > 0) & (beta < 1)).all()


# --- cost -----------------------------------------------------------------------------------------------


@MODULES
@pytest.mark.parametrize("time", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 7, 64 * CHUNK])
def test_declared_flops_stay_close_below_the_counted(cls: Make, time: int) -> None:
    attention = build(cls, impl="torch")
    with torch.no_grad():
        tensors = attention.project(torch.randn(2, time, 16, dtype=torch.float64))
        with FlopCounterMode(display=False) as counter:
            attention.attend(*tensors)
    declared = attention.flops(time, batch_size=2)
    # The delta rule's chunks after each other cost less than torch's scan over them.
    scans = cls in (DeltaNetAttention, GatedDeltaNetAttention)
    assert (0.15 if scans else 0.2) <= declared / counter.get_total_flops() <= 1.05
    # Only the last chunk is padded, so that over many chunks little may be left undeclared.
    if time > 32 * CHUNK:
        assert declared / counter.get_total_flops() >= (0.4 if scans else 0.65)


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@MODULES
def test_no_tensor_grows_faster_than_time(cls: Make) -> None:
    attention = build(cls).float()
    elements = []
    for time in (512, 2048):
        with Largest() as largest:
            attention(torch.randn(1, time, 16)).sum().backward()
        elements.append(largest.elements)
    assert elements[1] <= 4.1 * elements[0]


@MODULES
def test_a_decoding_step_costs_the_same_at_any_length(cls: Make) -> None:
    attention = build(cls)
    counts = []
    with torch.no_grad():
        for context in (3 * CHUNK, 50 * CHUNK):
            _, state = attention.extend(torch.randn(1, context, 16, dtype=torch.float64))
            with FlopCounterMode(display=False) as counter:
                attention.extend(torch.randn(1, 1, 16, dtype=torch.float64), state)
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


# --- errors ---------------------------------------------------------------------------------------------


@FUNCTIONS
@pytest.mark.parametrize("chunk_size", [0, -1, 2.5, True])
def test_chunk_size_must_be_positive(
    inputs: Callable[..., list[Tensor]], fast: Callable[..., Tensor], reference: Any, oracle: Any, chunk_size: Any
) -> None:
    with pytest.raises(ValueError, match="chunk_size must be a positive integer"):
        fast(*inputs(5), chunk_size=chunk_size)


@MODULES
def test_a_module_checks_its_options(cls: Make) -> None:
    with pytest.raises(ValueError, match="chunk_size must be a positive integer"):
        cls(hidden_dim=8, num_heads=2, chunk_size=0)
    with pytest.raises(ValueError, match="rotary=True needs an even"):
        cls(hidden_dim=12, num_heads=4, rotary=True, **({"key_dim": 3} if cls is GatedAttentionUnit else {}))


def test_errors_name_shapes_that_do_not_fit() -> None:
    q, k, v, beta = delta_inputs(5)
    with pytest.raises(ValueError, match="q must have as many positions"):
        linear_attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="q must have as many positions"):
        delta_rule(q[:, :, :3], k, v, beta)
    with pytest.raises(ValueError, match=r"beta must be \[batch, kv_heads, time\]"):
        delta_rule(q, k, v, beta[:, :, :3])
    with pytest.raises(ValueError, match="agree in batch and head_dim"):
        linear_attention(q, k[..., :3], v)
    u, v, quad_q, quad_k, lin_q, lin_k = gau_inputs(5)
    with pytest.raises(ValueError, match="u and v must both be"):
        gated_attention_unit(u[:, :3], v, quad_q, quad_k, lin_q, lin_k)
    with pytest.raises(ValueError, match="must all be"):
        gated_attention_unit(u, v, quad_q, quad_k, lin_q, lin_k[..., :3])


# --- another library's functions ------------------------------------------------------------------------


def as_float32(tensors: list[Tensor]) -> list[Tensor]:
    """float32, with the shared keys repeated for every head, as fla takes them."""
    heads = tensors[0].shape[1]
    return [x.float().repeat_interleave(heads // x.shape[1], dim=1) for x in tensors]


def time_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def test_linear_attention_equals_that_of_fla() -> None:
    naive = pytest.importorskip("fla.ops.linear_attn.naive")
    q, k, v = as_float32(linear_inputs(3 * CHUNK + 7))
    from_fla, _ = naive.naive_recurrent_linear_attn(*time_first(F.elu(q) + 1, F.elu(k) + 1, v), scale=1.0, normalize=True)
    torch.testing.assert_close(linear_attention(q, k, v, chunk_size=CHUNK), from_fla.transpose(1, 2), rtol=2e-6, atol=2e-6)


def test_the_delta_rule_equals_that_of_fla() -> None:
    naive = pytest.importorskip("fla.ops.delta_rule.naive")
    q, k, v, beta = as_float32(delta_inputs(3 * CHUNK + 7))
    from_fla, _ = naive.delta_rule_recurrence(q, k, v, beta)  # which scales by 1/√d
    torch.testing.assert_close(delta_rule(q, k, v, beta, chunk_size=CHUNK) / 6**0.5, from_fla, rtol=2e-6, atol=2e-6)


def test_the_gated_delta_rule_equals_that_of_fla() -> None:
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive")
    q, k, v, beta, log_alpha = as_float32(gated_delta_inputs(3 * CHUNK + 7))
    from_fla, _ = naive.naive_recurrent_gated_delta_rule(*time_first(q, k, v, beta, log_alpha), scale=1.0)
    ours = gated_delta_rule(q, k, v, beta, log_alpha, chunk_size=CHUNK)
    torch.testing.assert_close(ours, from_fla.transpose(1, 2), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_gated_delta_rule_equals_that_of_transformers(kv_heads: int) -> None:
    tensors = gated_delta_inputs(70, kv_heads)
    state = torch.randn(2, kv_heads, tensors[1].shape[3], tensors[2].shape[3], generator=torch.Generator().manual_seed(0))
    module = GatedDeltaNetAttention(4 * tensors[0].shape[3], 4, chunk_size=16, num_kv_heads=kv_heads)
    theirs = GatedDeltaNetAttention(4 * tensors[0].shape[3], 4, chunk_size=16, num_kv_heads=kv_heads, impl="transformers")
    for initial in (None, state.double()):
        out, final = module.attend_after(initial, *tensors)
        their_out, their_final = theirs.attend_after(initial, *tensors)
        torch.testing.assert_close(their_out, out, rtol=1e-4, atol=1e-5)
        if initial is not None:
            assert their_final is not None
            torch.testing.assert_close(their_final.to(final), final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [LinearAttention, DeltaNetAttention, GatedDeltaNetAttention])
def test_fla_kernels_raise_without_cuda(cls: Any) -> None:
    attention = cls(16, 4, impl="fla")
    for call in (attention, attention.extend):
        with pytest.raises(NotImplementedError, match="impl=fla runs Triton kernels, which need CUDA, got tensors on cpu"):
            call(torch.zeros(1, 3, 16))
    with pytest.raises(ValueError, match=r"impl must be one of auto, torch, .*fla.*, got 'cuda'"):
        cls(16, 4, impl="cuda")


def naive_kernel(name: str) -> Any:
    """fla's naive function behind the arguments of its kernel."""
    package = name.removeprefix("chunk_")
    naive = importlib.import_module(f"fla.ops.{package}.naive")

    def linear(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return naive.naive_recurrent_linear_attn(q, k, v, **options)

    def delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, scale: float, **options: Any) -> Any:
        assert scale == 1.0
        out, final = naive.delta_rule_recurrence(*time_first(q * q.shape[-1] ** 0.5, k, v, beta), **options)
        return out.transpose(1, 2), final

    def gated(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> Any:
        out, final = naive.naive_recurrent_gated_delta_rule(q, k, v, beta, g, **options)
        return out.to(q.dtype), final

    return {"chunk_linear_attn": linear, "chunk_delta_rule": delta, "chunk_gated_delta_rule": gated}[name]


@pytest.mark.parametrize("cls", [LinearAttention, DeltaNetAttention, GatedDeltaNetAttention])
def test_fla_adapters_equal_the_torch_path_with_naive_kernels(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks layouts, scale, shared heads and states: all of an adapter but the kernel, which needs CUDA."""
    pytest.importorskip("fla.ops.linear_attn.naive")
    monkeypatch.setattr(fla, "_kernel", lambda package, name, q: naive_kernel(name))
    torch.manual_seed(0)
    ours = cls(16, 4, num_kv_heads=2, chunk_size=CHUNK).bfloat16()
    from_fla = cls(16, 4, num_kv_heads=2, impl="fla").bfloat16()
    from_fla.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3 * CHUNK + 7, 16).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(from_fla(x), ours(x), rtol=3e-2, atol=1e-2)
        for cut in (1, CHUNK + 1):
            (_, our_state), (_, their_state) = ours.extend(x[:, :cut]), from_fla.extend(x[:, :cut])
            torch.testing.assert_close(their_state["total"], our_state["total"], rtol=3e-2, atol=1e-2)
            torch.testing.assert_close(
                from_fla.extend(x[:, cut:], their_state)[0], ours.extend(x[:, cut:], our_state)[0], rtol=3e-2, atol=1e-2
            )
