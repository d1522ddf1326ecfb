"""Tests the delta rule in C++, and both its backends under hard decays, against the recurrence in float64."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from baselines.delta_net import DeltaNetAttention, delta_rule
from baselines.gated_delta_net import GatedDeltaNetAttention, gated_delta_rule
from baselines.kernels.chunkwise_delta_rule import chunkwise_delta_rule
from baselines.kernels.delta_rule import CHUNK, KERNELS, SEGMENT, DeltaRule
from bsbr.backends.cpp import build

RULE = DeltaRule(lambda *_: pytest.fail("C++ computes this"))
NAMES = ("q", "k", "v", "beta", "log_alpha", "initial")


def recurrence(*, q: Any, k: Any, v: Any, beta: Any, log_alpha: Tensor | None, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """S_t = α_t S_{t-1} + β_t k_t (v_t − α_t S_{t-1}ᵀ k_t)ᵀ and o_t = S_tᵀ q_t in float64, head by head, token by token."""
    group, (batch, kv_heads, time, dim) = q.shape[1] // k.shape[1], k.shape
    q, k, v, beta = (x.double() for x in (q, k, v, beta))
    alpha = torch.ones_like(beta) if log_alpha is None else log_alpha.double().exp()
    state = q.new_zeros(batch, kv_heads, dim, v.shape[3]) if initial is None else initial.double()
    outputs = []
    for t in range(time):
        state = alpha[:, :, t, None, None] * state
        error = v[:, :, t] - (state * k[:, :, t, :, None]).sum(2)
        state = state + k[:, :, t, :, None] * (beta[:, :, t, None] * error)[:, :, None]
        shared = state.repeat_interleave(group, dim=1)
        outputs.append((shared * q[:, :, t, :, None]).sum(2))
    return torch.stack(outputs, dim=2), state


def inputs(
    time: int,
    *,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (6, 6),
    batch: int = 2,
    log_alpha: str | float | Tensor = "random",
    state: bool = True,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor | None]:
    """Inputs whose heads are views of joined heads, as projections return them. Random decays span 10^-3 … 20 per token."""
    generator = torch.Generator().manual_seed(time)

    def random(number: int, *shape: int) -> Tensor:
        return torch.randn(batch, time, number, *shape, generator=generator, dtype=torch.float64).transpose(1, 2)

    (query_heads, kv_heads), (dim, value_dim) = heads, dims
    tensors: dict[str, Tensor | None] = {
        "q": random(query_heads, dim),
        "k": F.normalize(random(kv_heads, dim), dim=-1),
        "v": random(kv_heads, value_dim),
        "beta": random(kv_heads).sigmoid(),
        "log_alpha": None,
        "initial": torch.randn(batch, kv_heads, dim, value_dim, generator=generator, dtype=torch.float64) if state else None,
    }
    spread = -2 * 10 ** (4 * random(kv_heads).sigmoid() - 3)
    if isinstance(log_alpha, Tensor | float):
        tensors["log_alpha"] = torch.as_tensor(log_alpha, dtype=torch.float64).expand_as(spread).clone()
    elif log_alpha == "random":
        tensors["log_alpha"] = spread
    return {name: None if x is None else x.to(dtype) for name, x in tensors.items()}


def run(rule: DeltaRule, backend: str, tensors: dict[str, Tensor | None], chunk_size: int) -> tuple[Tensor, ...]:
    """The output, and the final state if there is an initial one."""
    given = [x for name, x in tensors.items() if x is not None and name != "initial"]
    out, final = rule(backend, chunk_size, tensors["initial"], *given)
    return (out,) if tensors["initial"] is None or final is None else (out, final)


def check(tensors: dict[str, Tensor | None], tolerance: float, compute: Callable[..., tuple[Tensor, ...]]) -> None:
    """Compares outputs, with and without autograd, and all gradients with the recurrence, relative to the largest number."""
    leaves = {name: None if x is None else x.detach().requires_grad_() for name, x in tensors.items()}
    given = [x for x in leaves.values() if x is not None]
    outputs = compute(leaves)
    expected = recurrence(**leaves)[: len(outputs)]
    with torch.no_grad():
        plain = compute(tensors)
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in expected]
    gradients = torch.autograd.grad(outputs, given, [x.to(outputs[0].dtype) for x in upstream])
    expected_gradients = torch.autograd.grad(expected, given, upstream)
    names = ["out", "final"][: len(outputs)]
    names = [*names, *(f"{name} without autograd" for name in names), *(name for name, x in leaves.items() if x is not None)]
    for name, a, b in zip(names, (*outputs, *plain, *gradients), (*expected, *expected, *expected_gradients), strict=True):
        size = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.to(b), b, rtol=0, atol=tolerance * size, msg=f"{name}: {(a - b).abs().max()}")


def tolerance(dtype: torch.dtype) -> float:
    return 1e-11 if dtype == torch.float64 else 1e-5


# --- values and gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("log_alpha", ["none", "random"])
@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("time", [1, 6, 7, 8, 7 * SEGMENT, 7 * SEGMENT + 9])
def test_values_and_gradients_match_the_recurrence(time: int, chunk: int, log_alpha: str, state: bool) -> None:
    tensors = inputs(time, log_alpha=log_alpha, state=state)
    check(tensors, tolerance(torch.float64), lambda x: run(RULE, "cpp", x, chunk))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("log_alpha", ["none", "random"])
@pytest.mark.parametrize(
    ("time", "heads", "dims"),
    [(CHUNK + 1, (1, 1), (64, 64)), (2 * CHUNK + 13, (3, 1), (20, 33)), (SEGMENT * CHUNK + 5, (2, 2), (17, 5))],
)
def test_full_and_partial_tiles(
    time: int, heads: tuple[int, int], dims: tuple[int, int], log_alpha: str, dtype: torch.dtype
) -> None:
    tensors = inputs(time, heads=heads, dims=dims, batch=1, log_alpha=log_alpha, dtype=dtype)
    check(tensors, tolerance(dtype), lambda x: run(RULE, "cpp", x, 1000))


@pytest.mark.parametrize("threads", [3], indirect=True)
@pytest.mark.usefixtures("threads")
def test_cores_share_the_value_columns_of_few_heads() -> None:
    for dims in ((6, 70), (6, 6)):  # several panels of columns; fewer panels than cores
        tensors = inputs(CHUNK + 5, heads=(1, 1), dims=dims, batch=1)
        check(tensors, tolerance(torch.float64), lambda x: run(RULE, "cpp", x, CHUNK))


def test_any_strides_are_supported() -> None:
    tensors = inputs(2 * CHUNK + 1, state=True)
    plain = run(RULE, "cpp", tensors, CHUNK)
    scattered = {name: x if x is None or x.dim() < 4 else x.mT.contiguous().mT for name, x in tensors.items()}
    for a, b in zip(run(RULE, "cpp", scattered, CHUNK), plain, strict=True):
        assert torch.equal(a, b)
    expanded = tensors | {"beta": torch.full((1, 1, 1), 0.5, dtype=torch.float64).expand(2, 2, 2 * CHUNK + 1)}
    check(expanded, tolerance(torch.float64), lambda x: run(RULE, "cpp", x, CHUNK))
    leaf = inputs(2 * CHUNK + 1)["q"]
    assert leaf is not None
    leaf.requires_grad_()
    out, _ = run(RULE, "cpp", expanded | {"q": leaf}, CHUNK)
    by_sum = torch.autograd.grad(out.sum(), leaf, retain_graph=True)[0]  # the upstream gradient is one expanded number
    assert torch.equal(by_sum, torch.autograd.grad(out, leaf, torch.ones_like(out))[0])


def test_an_empty_batch() -> None:
    tensors = inputs(5, batch=0)
    leaves = {name: None if x is None else x.requires_grad_() for name, x in tensors.items()}
    out, final = run(RULE, "cpp", leaves, CHUNK)
    assert out.shape == (0, 4, 5, 6)
    assert final.shape == (0, 2, 6, 6)
    out.sum().backward()


# --- decays ---------------------------------------------------------------------------------------------

DECAYS: dict[str, float | list[float]] = {str(decay): decay for decay in (0.0, -1e-9, -0.5, -1.5, -50.0, -1e30, -torch.inf)} | {
    "mixed": [0.0, -1e-9, -torch.inf, -0.5, -1.5, -1e30, 0.0, -50.0, -torch.inf, -torch.inf, -1e-9, -88.0, -103.0]
}


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("decays", DECAYS.values(), ids=DECAYS.keys())
def test_any_decay_is_that_of_the_recurrence(decays: float | list[float], dtype: torch.dtype, backend: str) -> None:
    rule = RULE if backend == "cpp" else DeltaRule(chunkwise_delta_rule)
    for time in (1, 27):
        repeated = torch.tensor(decays, dtype=torch.float64).repeat(time)[:time]
        tensors = inputs(time, log_alpha=repeated, dtype=dtype)
        check(tensors, tolerance(dtype), lambda x: run(rule, backend, x, 8))


def test_without_decay_the_gated_rule_forgets_nothing_over_many_chunks() -> None:
    """An error of e^0 would grow with the number of chunks."""
    tensors = inputs(3000, heads=(1, 1), dims=(4, 4), batch=1, log_alpha=0.0, dtype=torch.float32)
    tensors["beta"] = torch.zeros(1, 1, 3000)
    _, final = run(RULE, "cpp", tensors, 4)
    torch.testing.assert_close(final, tensors["initial"], rtol=0, atol=0)


def test_states_that_decay_become_zero_and_the_setting_is_restored() -> None:
    """Numbers below the smallest normal one would make each product tens of times slower."""
    tensors = inputs(64, heads=(1, 1), batch=1, log_alpha=-1.4, dtype=torch.float32)
    tensors["beta"] = torch.zeros(1, 1, 64)  # nothing is written: e^-89.6 of the state is left
    _, final = run(RULE, "cpp", tensors, CHUNK)
    assert not final.any()
    assert torch.tensor(1e-40) * 0.5 != 0


# --- derivatives, backends, errors ----------------------------------------------------------------------


@pytest.mark.parametrize("rule", [delta_rule, gated_delta_rule])
def test_second_derivatives_are_those_of_torch(rule: Callable[..., Tensor]) -> None:
    tensors = inputs(19, heads=(2, 1), dims=(3, 3), batch=1)
    names = NAMES[: 5 if rule is gated_delta_rule else 4]
    leaves = [x.detach().requires_grad_() for name in names if (x := tensors[name]) is not None]
    seconds = []
    for impl in ("cpp", "torch"):
        gradients = torch.autograd.grad(rule(*leaves, chunk_size=8, impl=impl).square().sum(), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(torch.stack([x.square().sum() for x in gradients]).sum(), leaves))
    for a, b in zip(*seconds, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_transforms_and_other_dtypes_take_torch() -> None:
    attention = GatedDeltaNetAttention(16, 4, chunk_size=8).double()
    x = torch.randn(3, 1, 11, 16, dtype=torch.float64)
    whole = torch.stack([attention(item) for item in x])
    torch.testing.assert_close(torch.vmap(attention)(x), whole)
    gradient = torch.func.grad(lambda x: attention(x).square().sum())(x[0])
    leaf = x[0].clone().requires_grad_()
    attention(leaf).square().sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)
    assert attention.implementation(*attention.project(x[0])) == "cpp"
    half = GatedDeltaNetAttention(16, 4).bfloat16()
    assert half.implementation(*half.project(x[0].bfloat16())) == "torch"
    half.impl = "cpp"
    with pytest.raises(NotImplementedError, match=r"impl='cpp' was asked for: the C\+\+ backend takes float32 or float64, got"):
        half(x[0].bfloat16())
    with pytest.raises(ValueError, match="impl must be one of auto, torch, cpp, got 'fla'"):
        delta_rule(*(x for x in list(inputs(3).values())[:4] if x is not None), impl="fla")


def test_a_state_of_another_shape_is_an_error() -> None:
    tensors = inputs(5)
    tensors["initial"] = torch.zeros(2, 2, 6, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"the state must be \[batch, kv_heads, head_dim, value_dim\] = \[2, 2, 6, 6\], got"):
        run(RULE, "cpp", tensors, 8)


def test_without_a_compiler_torch_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    attention = DeltaNetAttention(16, 4)
    with pytest.warns(RuntimeWarning, match="runs on the torch backend, several times slower") as caught:
        assert attention.implementation(*attention.project(torch.zeros(1, 3, 16))) == "torch"
    assert {str(warning.message).split()[0] for warning in caught} == {"delta_rule", "unit_silu"}
    build.library.cache_clear()


@pytest.mark.parametrize("make", [DeltaNetAttention, partial(GatedDeltaNetAttention, num_kv_heads=1)])
@pytest.mark.parametrize("time", [1, CHUNK, CHUNK + 1, 9 * CHUNK, 9 * CHUNK + 7])
def test_declared_flops_stay_close_below_those_that_ran(make: Any, time: int) -> None:
    attention = make(128, 2, chunk_size=CHUNK)
    with torch.no_grad():
        tensors = attention.project(torch.randn(1, time, 128))
        assert KERNELS.unsupported(*tensors) is None  # which also makes the counter know the operators
        with FlopCounterMode(display=False) as counter:
            attention.attend(*tensors)
    fraction = attention.flops(time) / counter.get_total_flops()
    assert (0.8 if time > 8 * CHUNK else 0.02) <= fraction <= 1.0
