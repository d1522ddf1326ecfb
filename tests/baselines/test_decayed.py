"""Tests mamba2, gla and kda against sums over products of decays, cases worked by hand, and another library's functions."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from baselines.gated_delta_net import gated_delta_rule
from baselines.gla import GatedLinearAttention, gated_linear_attention, gated_linear_attention_reference
from baselines.kda import KimiDeltaAttention, kimi_delta_attention, kimi_delta_attention_reference
from baselines.kernels.decayed import decayed_products, decayed_rule
from baselines.mamba2 import Mamba2Attention, state_space_duality, state_space_duality_reference
from bsbr.interface import Attention

CHUNK = 8
LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7, 63, 64, 65]
Array = np.ndarray[Any, Any]


# --- oracles: float64, every pair of tokens on its own ----------------------------------------------


def oracle(q: Array, k: Array, v: Array, log_alpha: Array, beta: Array | None = None) -> Array:
    """o_t = Σ_s v_s β_s k_sᵀ M_{s+1}ᵀ … M_tᵀ q_t with M_r = (I − β_r k_r k_rᵀ) Diag(α_r), each product formed by itself."""
    out = np.zeros((*q.shape[:3], v.shape[3]))
    identity = np.eye(q.shape[3])
    for b, h, t in np.ndindex(*q.shape[:3]):
        source, later = h // (q.shape[1] // k.shape[1]), q[b, h, t]
        for s in range(t, -1, -1):
            key, rate = k[b, source, s], 1.0 if beta is None else beta[b, source, s]
            out[b, h, t] += rate * (key @ later) * v[b, source, s]
            step = np.exp(log_alpha[b, source, s]) * identity
            if beta is not None:
                step = (identity - rate * np.outer(key, key)) @ step
            later = step.T @ later
    return out


# --- inputs -----------------------------------------------------------------------------------------


def inputs(time: int, channels: int, *, erases: bool, kv_heads: int = 2) -> list[Tensor]:
    """q, k, v, log α from almost no decay to e^-20, with −∞ in one token, and β."""
    generator = torch.Generator().manual_seed(time)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    q, k, v = normal(2, 4, time, 6), normal(2, kv_heads, time, 6), normal(2, kv_heads, time, 5)
    log_alpha = -2 * 10 ** (4 * torch.rand(2, kv_heads, time, channels, generator=generator, dtype=torch.float64) - 3)
    log_alpha[0, 0, time // 2, 0] = -torch.inf
    if not erases:
        return [q, k, v, log_alpha]
    beta = torch.rand(2, kv_heads, time, generator=generator, dtype=torch.float64)
    return [q, k / k.norm(dim=-1, keepdim=True), v, log_alpha, beta]


def mamba2_inputs(time: int, kv_heads: int = 2) -> list[Tensor]:
    q, k, v, log_alpha = inputs(time, 1, erases=False, kv_heads=kv_heads)
    return [q, k, v, log_alpha.squeeze(3)]


def gla_inputs(time: int, kv_heads: int = 2) -> list[Tensor]:
    return inputs(time, 6, erases=False, kv_heads=kv_heads)


def kda_inputs(time: int, kv_heads: int = 2) -> list[Tensor]:
    return inputs(time, 6, erases=True, kv_heads=kv_heads)


FUNCTIONS = pytest.mark.parametrize(
    ("make", "fast", "reference"),
    [
        pytest.param(mamba2_inputs, state_space_duality, state_space_duality_reference, id="mamba2"),
        pytest.param(gla_inputs, gated_linear_attention, gated_linear_attention_reference, id="gla"),
        pytest.param(kda_inputs, kimi_delta_attention, kimi_delta_attention_reference, id="kda"),
    ],
)
MODULES: dict[str, tuple[type[Attention], dict[str, Any]]] = {
    "mamba2": (Mamba2Attention, {}),
    "retention": (Mamba2Attention, {"decay": "constant"}),
    "gla": (GatedLinearAttention, {}),
    "kda": (KimiDeltaAttention, {}),
}
Make = Callable[..., list[Tensor]]
Function = Callable[..., Tensor]


def build(name: str, hidden_dim: int = 16, **more: Any) -> Any:
    cls, options = MODULES[name]
    torch.manual_seed(0)
    return cls(hidden_dim, 4, chunk_size=CHUNK, **options, **more)


# --- values -----------------------------------------------------------------------------------------


@FUNCTIONS
@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("chunk_size", [1, 6, CHUNK, 64])
def test_fast_and_reference_equal_the_oracle(make: Make, fast: Function, reference: Function, time: int, chunk_size: int) -> None:
    tensors = make(time)
    q, k, v, log_alpha, *beta = (x.numpy() for x in tensors)
    expected = torch.from_numpy(oracle(q, k, v, log_alpha.reshape(*k.shape[:3], -1), *beta))
    torch.testing.assert_close(fast(*tensors, chunk_size=chunk_size), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(reference(*tensors), expected, rtol=0, atol=1e-12)


@FUNCTIONS
def test_gradients_equal_those_of_the_recurrence(make: Make, fast: Function, reference: Function) -> None:
    tensors, weights = make(3 * CHUNK + 7), torch.randn(2, 4, 3 * CHUNK + 7, 5, dtype=torch.float64)
    gradients = []
    for function in (fast, reference):
        leaves = [x.clone().requires_grad_() for x in tensors]
        gradients.append(torch.autograd.grad((function(*leaves) * weights).sum(), leaves))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@FUNCTIONS
def test_float32_keeps_its_digits_however_strong_the_decay(make: Make, fast: Function, reference: Function) -> None:
    """Chunks of 64 tokens whose decays multiply to e^-1000: γ underflows, 1 / γ overflows."""
    tensors = [x.float() for x in make(200)]
    torch.testing.assert_close(fast(*tensors).double(), reference(*tensors), rtol=1e-4, atol=2e-6)


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).view(1, 1, -1, 1)


def test_by_hand() -> None:
    halves = column(0, *[np.log(0.5)] * 3)
    q, ones, v = column(1, 2, 1, 8), column(1, 1, 1, 1), column(4, 0, 8, 2)
    # S halves, then v is added: 4, 2, 9, 6.5.
    expected = column(4, 4, 9, 52)
    torch.testing.assert_close(gated_linear_attention(q, ones, v, halves, chunk_size=2), expected)
    torch.testing.assert_close(state_space_duality(q, ones, v, halves.squeeze(3), chunk_size=2), expected)
    # S halves, then goes half the way to v: 2, (1 + 0) / 2, (1/4 + 8) / 2, (33/16 + 2) / 2.
    rates = torch.full((1, 1, 4), 0.5, dtype=torch.float64)
    out = kimi_delta_attention(q, ones, v, halves, rates, chunk_size=2)
    torch.testing.assert_close(out, column(2, 1, 4.125, 16.25))


@pytest.mark.parametrize("time", [5, 3 * CHUNK + 7])
def test_equal_decays_of_all_channels_are_the_gated_delta_rule(time: int) -> None:
    q, k, v, log_alpha, beta = inputs(time, 1, erases=True)
    out = kimi_delta_attention(q, k, v, log_alpha.expand_as(k), beta, chunk_size=CHUNK)
    torch.testing.assert_close(out, gated_delta_rule(q, k, v, beta, log_alpha.squeeze(3), chunk_size=CHUNK), rtol=0, atol=1e-12)


def test_products_leave_no_trace_of_later_tokens() -> None:
    x = torch.randn(3, CHUNK, 4, dtype=torch.float64)
    logs = -torch.rand(3, CHUNK, 4, dtype=torch.float64)
    for strict in (False, True):
        products = decayed_products(x, x, logs, strict=strict)
        assert torch.equal(products, products.tril(-1 if strict else 0))
        assert (products != 0).sum() == 3 * CHUNK * (CHUNK - strict * 2 + 1) // 2


def test_retention_halves_at_the_published_rates() -> None:
    attention = build("retention").double()
    log_alpha = attention.project(torch.zeros(1, 3, 16, dtype=torch.float64))[3]
    torch.testing.assert_close(log_alpha[0, :, 1, 0].exp(), torch.tensor([31 / 32, 63 / 64, 127 / 128, 255 / 256]).double())


# --- modules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("time", [1, CHUNK - 1, CHUNK + 1, 3 * CHUNK + 7, 64 * CHUNK])
def test_declared_flops_stay_close_below_the_counted(name: str, time: int) -> None:
    attention = build(name).double()
    with torch.no_grad():
        tensors = attention.project(torch.randn(2, time, 16, dtype=torch.float64))
        with FlopCounterMode(display=False) as counter:
            attention.attend(*tensors)
    share = attention.flops(time, batch_size=2) / counter.get_total_flops()
    assert 0.1 <= share <= 1.05
    if time > 32 * CHUNK:
        assert share >= 0.35


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_hard_inputs_give_finite_outputs_and_gradients(name: str, scale: float) -> None:
    attention = build(name)
    x = (torch.randn(2, 3 * CHUNK + 7, 16) * scale).requires_grad_()
    out = attention(x)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())
    assert x.grad is not None
    assert x.grad.isfinite().all()


# --- errors -----------------------------------------------------------------------------------------


def test_errors_name_what_does_not_fit() -> None:
    q, k, v, log_alpha = gla_inputs(5)
    with pytest.raises(ValueError, match=r"log_alpha must be .*1 or 6.*, got \[2, 2, 5, 4\]"):
        gated_linear_attention(q, k, v, log_alpha[..., :4])
    with pytest.raises(ValueError, match="chunk_size must be a positive integer, got 0"):
        gated_linear_attention(q, k, v, log_alpha, chunk_size=0)
    with pytest.raises(ValueError, match=r"the state must be .* = \[2, 2, 6, 5\], got \[2, 2, 6, 6\]"):
        decayed_rule(q, k, v, log_alpha, initial=torch.zeros(2, 2, 6, 6))
    with pytest.raises(ValueError, match="decay must be input or constant, got 'none'"):
        Mamba2Attention(16, 4, decay="none")  # type: ignore[arg-type]


# --- another library's functions ----------------------------------------------------------------------


@pytest.mark.parametrize("time", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("kind", ["random", "no decay", "forgets at once", "equal keys", "zero keys"])
@pytest.mark.parametrize("name", ["simple_gla", "gla", "kda"])
def test_equals_that_of_fla(name: str, time: int, kind: str) -> None:
    naive = importlib.import_module(f"fla.ops.{name}.naive") if pytest.importorskip("fla.ops") else None
    make = {"simple_gla": mamba2_inputs, "gla": gla_inputs, "kda": kda_inputs}[name]
    q, k, v, log_alpha, *beta = (x.float() for x in make(time, kv_heads=4))
    log_alpha = {"no decay": torch.zeros_like(log_alpha), "forgets at once": torch.full_like(log_alpha, -60)}.get(
        kind, log_alpha.clamp(min=-60)
    )
    k = {"equal keys": k[:, :, :1].expand_as(k), "zero keys": torch.zeros_like(k)}.get(kind, k)
    fast = {"simple_gla": state_space_duality, "gla": gated_linear_attention, "kda": kimi_delta_attention}[name]
    given = [x.transpose(1, 2) for x in (q * 6**0.5, k, v, log_alpha, *beta)]  # fla divides q by √d
    from_fla, _ = getattr(naive, f"naive_recurrent_{name}")(*given)
    atol = 1e-4 if kind == "no decay" else 1e-5  # sums of up to 200 terms in float32
    torch.testing.assert_close(fast(q, k, v, log_alpha, *beta), from_fla.transpose(1, 2), rtol=1e-4, atol=atol)
