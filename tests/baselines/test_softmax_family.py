"""Tests standard, sliding_window, sparse and hopfield against oracles and cases worked by hand, streaming and declared costs."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from baselines.hopfield import HopfieldAttention, hopfield_attention, hopfield_attention_reference
from baselines.kernels.merged_softmax import attention_with_lse, attention_with_lse_backward
from baselines.sliding_window import SlidingWindowAttention, sliding_window_attention, sliding_window_attention_reference
from baselines.sparse import SparseAttention, sparse_attention, sparse_attention_reference
from baselines.standard import StandardAttention, softmax_attention, softmax_attention_over_pages, softmax_attention_reference
from bsbr.interface import MultiHeadAttention
from evals.measure.memory import peak_allocated_bytes
from tests import oracles

Attend = Callable[..., Tensor]
LENGTHS = (1, 2, 7, 8, 9, 16, 31, 65)

IMPLS = ("torch", "cpp")
CASES = [
    pytest.param(softmax_attention, softmax_attention_reference, oracles.standard, {}, id="standard"),
    *(
        pytest.param(
            partial(sliding_window_attention, impl=impl),
            sliding_window_attention_reference,
            oracles.sliding_window,
            {"window_size": w},
            id=f"window-{w}-{impl}",
        )
        for w in (1, 2, 7, 8, 100)
        for impl in IMPLS
    ),
    *(
        pytest.param(
            partial(sparse_attention, impl=impl),
            sparse_attention_reference,
            oracles.sparse,
            {"block_size": block, "summary_size": c},
            id=f"sparse-{block}-{c}-{impl}",
        )
        for block, c in ((1, 1), (4, 1), (8, 3), (8, 8), (100, 5))
        for impl in IMPLS
    ),
    *(
        pytest.param(
            hopfield_attention,
            hopfield_attention_reference,
            oracles.hopfield,
            {"beta": beta, "num_steps": t},
            id=f"hopfield-{beta}-{t}",
        )
        for beta, t in ((0.7, 1), (0.7, 2), (2.0, 3))
    ),
]
FUNCTIONS = pytest.mark.parametrize(("fast", "reference", "oracle", "options"), CASES)

MODULES = pytest.mark.parametrize(
    ("cls", "options"),
    [
        pytest.param(StandardAttention, {}, id="standard"),
        pytest.param(SlidingWindowAttention, {"window_size": 8}, id="window"),
        pytest.param(SlidingWindowAttention, {"window_size": 1}, id="window-1"),
        pytest.param(SparseAttention, {"block_size": 8, "summary_size": 3}, id="sparse"),
        pytest.param(HopfieldAttention, {"num_steps": 3, "beta": 1.5}, id="hopfield"),
    ],
)


def inputs(time: int, queries: int | None = None, heads: int = 4, kv_heads: int = 2, dim: int = 6) -> list[Tensor]:
    """q of the last `queries` positions, k and v, in float64; in memory [batch, time, heads, dim], as projections leave them."""
    generator = torch.Generator().manual_seed(time)
    sizes = ((queries or time, heads), (time, kv_heads), (time, kv_heads))
    return [torch.randn(2, n, h, dim, generator=generator, dtype=torch.float64).transpose(1, 2) for n, h in sizes]


# --- the functions ------------------------------------------------------------------------------


@FUNCTIONS
@pytest.mark.parametrize("time", LENGTHS)
def test_fast_and_reference_equal_the_oracle(fast: Attend, reference: Attend, oracle: Attend, options: Any, time: int) -> None:
    for queries in sorted({1, time // 2 + 1, time}):
        q, k, v = inputs(time, queries)
        expected = oracle(q, k, v, **options)
        torch.testing.assert_close(fast(q, k, v, **options), expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(reference(q, k, v, **options), expected, rtol=0, atol=1e-9)


@FUNCTIONS
@pytest.mark.parametrize("time", [1, 8, 31])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_gradients_equal_those_of_the_oracle(
    fast: Attend, reference: Attend, oracle: Attend, options: Any, time: int, kv_heads: int
) -> None:
    tensors = [x.requires_grad_() for x in inputs(time, kv_heads=kv_heads)]
    upstream = inputs(time + 1)[0][:, :, :time]
    expected = torch.autograd.grad(oracle(*tensors, **options), tensors, upstream)
    for function in (fast, reference):
        for gradient, expected_gradient in zip(
            torch.autograd.grad(function(*tensors, **options), tensors, upstream), expected, strict=True
        ):
            torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)


@FUNCTIONS
def test_tensors_without_contiguous_rows(fast: Attend, reference: Attend, oracle: Attend, options: Any) -> None:
    """Values and gradients; torch's private kernels read contiguous rows whatever the strides are."""
    tensors = [x.mT.contiguous().mT.requires_grad_() for x in inputs(31)]
    out, expected = fast(*tensors, **options), reference(*tensors, **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    gradient = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mT.contiguous().mT
    found, wanted = (torch.autograd.grad(x, tensors, gradient) for x in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@FUNCTIONS
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
def test_lower_precision_stays_close(
    fast: Attend, reference: Attend, oracle: Attend, options: Any, dtype: torch.dtype, allowed: float
) -> None:
    rounded = [x.to(dtype) for x in inputs(65)]
    if isinstance(fast, partial) and fast.keywords["impl"] == "cpp" and dtype.itemsize < 4:
        with pytest.raises(NotImplementedError, match=f"takes float32 or float64, got {dtype}; impl='torch' takes every input"):
            fast(*rounded, **options)
        return
    output, expected = fast(*rounded, **options), oracle(*rounded, **options)
    assert output.dtype == dtype
    assert (output.double() - expected).norm() <= allowed * expected.norm()


@FUNCTIONS
def test_large_and_zero_inputs_stay_finite(fast: Attend, reference: Attend, oracle: Attend, options: Any) -> None:
    for scale in (0.0, 1e4):
        tensors = [(scale * x).float().requires_grad_() for x in inputs(31)]
        output = fast(*tensors, **options)
        assert output.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), tensors))


def column(*numbers: float) -> Tensor:
    """One head of width 1: [1, 1, time, 1]."""
    return torch.tensor(numbers, dtype=torch.float64).view(1, 1, -1, 1)


def test_by_hand() -> None:
    # All scores are 0, so every output is the plain mean of the values that a token sees.
    q, v = column(0, 0, 0, 0, 0), column(1, 3, 8, 0, 16)
    torch.testing.assert_close(softmax_attention(q, q, v), column(1, 2, 4, 3, 5.6))
    torch.testing.assert_close(sliding_window_attention(q, q, v, window_size=2), column(1, 2, 5.5, 4, 8))
    # Blocks {1, 3}, {8, 0}, {16}, of which later blocks see 3 and 0.
    torch.testing.assert_close(sparse_attention(q, q, v, block_size=2, summary_size=1), column(1, 2, 5.5, 11 / 3, 19 / 3))
    # Key ln 3 outweighs key 0 by 3 to 1 at β = 1: the first step takes ξ = 1 to ¾ ln 3, the second weighs 3^(¾ ln 3) to 1.
    k, v = column(0, math.log(3)), column(4, 8)
    torch.testing.assert_close(hopfield_attention(column(1, 1), k, v, beta=1.0, num_steps=1), column(4, 7))
    weight = 3 ** (0.75 * math.log(3))
    torch.testing.assert_close(
        hopfield_attention(column(1, 1), k, v, beta=1.0, num_steps=2), column(4, (4 + 8 * weight) / (1 + weight))
    )


@pytest.mark.parametrize("time", LENGTHS)
def test_all_equal_softmax_attention_if_every_key_is_visible(time: int) -> None:
    q, k, v = inputs(time)
    expected = softmax_attention(q, k, v)
    for output in (
        sliding_window_attention(q, k, v, window_size=time),
        sparse_attention(q, k, v, block_size=time, summary_size=1),
        sparse_attention(q, k, v, block_size=1, summary_size=1),
        hopfield_attention(q, k, v),
    ):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["flash", "math", "auto", "torch"])
@pytest.mark.parametrize(("time", "queries"), [(1, 1), (31, 31), (31, 5), (31, 1)])
def test_the_kernel_does_not_change_the_result(impl: str, time: int, queries: int) -> None:
    q, k, v = inputs(time, queries)
    torch.testing.assert_close(softmax_attention(q, k, v, impl=impl), oracles.standard(q, k, v), rtol=0, atol=1e-12)


def test_a_kernel_that_does_not_support_the_tensors_raises() -> None:
    for impl, dropout in (("cudnn", 0.0), ("efficient", 0.0), ("flash", 0.5)):
        sentence = f"impl={impl} has no kernel for torch.float32 tensors of head_dim 8 on cpu: use impl=torch, or a device"
        with pytest.raises(NotImplementedError, match=sentence):
            StandardAttention(16, 2, impl=impl, dropout=dropout)(torch.zeros(1, 3, 16))
    with pytest.raises(ValueError, match="impl must be one of auto, torch, flash, cudnn, efficient, math, got 'fast'"):
        StandardAttention(16, 2, impl="fast")


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SlidingWindowAttention, {"window_size": 5}),
        (SlidingWindowAttention, {"window_size": 1}),
        (SparseAttention, {"block_size": 8, "summary_size": 3}),
        (SparseAttention, {"block_size": 1, "summary_size": 1}),
    ],
)
@torch.no_grad()
def test_flex_attention_equals_the_reference(cls: Any, options: Any) -> None:
    flex = build(cls, options, impl="flex")
    for time in LENGTHS:
        for queries in {1, time // 2 + 1, time}:
            tensors = inputs(time, queries)
            torch.testing.assert_close(flex.attend(*tensors), flex.reference(*tensors), rtol=0, atol=1e-12)
    x = torch.randn(2, 31, 24, dtype=torch.float64)
    first, state = flex.extend(x[:, :13])
    torch.testing.assert_close(torch.cat([first, flex.extend(x[:, 13:], state)[0]], dim=1), flex(x), rtol=0, atol=1e-12)


def test_flex_attention_raises_for_what_it_lacks() -> None:
    x = torch.randn(1, 9, 24, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        build(SparseAttention, {"impl": "flex"})(x).sum().backward()
    with pytest.raises(NotImplementedError, match=r"FlexAttention has no dropout, got dropout=0\.5; impl='torch' takes"):
        SlidingWindowAttention(24, 4, impl="flex", dropout=0.5)(x.float())
    with pytest.raises(ValueError, match="impl must be one of auto, torch, cpp, flex, got 'fla'"):
        SparseAttention(24, 4, impl="fla")


# --- the modules --------------------------------------------------------------------------------


def build(cls: type[MultiHeadAttention], options: Any, **more: Any) -> MultiHeadAttention:
    torch.manual_seed(1)
    return cls(hidden_dim=24, num_heads=4, num_kv_heads=2, **options, **more).double().eval()


@MODULES
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("cuts", [[], list(range(1, 31)), [3], [8], [1, 8, 9], [7, 8, 24], [5, 21]], ids=str)
@torch.no_grad()
def test_extend_equals_forward_for_any_split(cls: type[MultiHeadAttention], options: Any, rotary: bool, cuts: list[int]) -> None:
    attention = build(cls, options, rotary=rotary)
    x = torch.randn(2, 31, 24, dtype=torch.float64)
    pieces, state = [], None
    for start, stop in pairwise([0, *cuts, 31]):
        output, state = attention.extend(x[:, start:stop], state)
        pieces.append(output)
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()}
        assert 0 <= sum(storages.values()) - attention.state_bytes(stop, batch_size=2) <= 64
        assert all(tensor.is_contiguous() for tensor in state.values())
    torch.testing.assert_close(torch.cat(pieces, dim=1), attention(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", [StandardAttention, HopfieldAttention])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_token_after_many_pages_equals_forward(cls: Any, dtype: torch.dtype, allowed: float) -> None:
    attention = build(cls, {}).to(dtype)
    x = (4 * torch.randn(2, 1800, 24, generator=torch.Generator().manual_seed(0))).to(dtype)
    with torch.no_grad():
        _, state = attention.extend(x[:, :1790])
        assert sum(name.startswith("keys.") for name in state) == 3
        whole = attention(x)[:, 1790:]
        outputs = []
        for token in x[:, 1790:].split(1, dim=1):
            output, state = attention.extend(token, state)
            outputs.append(output)
    assert (torch.cat(outputs, dim=1) - whole).norm() <= allowed * whole.norm()


def test_a_gradient_flows_through_pages() -> None:
    attention = build(StandardAttention, {})
    x = torch.randn(1, 300, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    _, state = attention.extend(x[:, :-1])
    output, _ = attention.extend(x[:, -1:], state)
    (actual,) = torch.autograd.grad(output.square().sum(), x)
    (expected,) = torch.autograd.grad(attention(x)[:, -1:].square().sum(), x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_attention_over_pages_equals_attention_over_their_concatenation() -> None:
    q, k, v = inputs(65, 1)
    lengths = [32, 1, 16, 16]
    out = softmax_attention_over_pages(q, k.split(lengths, dim=2), v.split(lengths, dim=2), scale=3.0)
    expected = oracles.hopfield(q, k, v, beta=3.0, num_steps=1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    narrow = [x[..., :3] for x in v.split(lengths, dim=2)]  # values of another head_dim
    torch.testing.assert_close(
        softmax_attention_over_pages(q, k.split(lengths, dim=2), narrow, scale=3.0), expected[..., :3], rtol=0, atol=1e-12
    )
    q, k, v = (x.mT.contiguous().mT for x in (q, k, v))
    out = softmax_attention_over_pages(q, k.split(lengths, dim=2), v.split(lengths, dim=2), scale=3.0)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@MODULES
@pytest.mark.parametrize("time", [1, 7, 8, 9, 31, 64, 203])
def test_declared_flops_count_the_visible_pairs(cls: type[MultiHeadAttention], options: Any, time: int) -> None:
    window, block = options.get("window_size"), options.get("block_size")

    def sees(i: int, t: int) -> bool:
        if t > i:
            return False
        if window:
            return i - t < window
        if block:
            return i // block == t // block or t % block >= block - options["summary_size"]
        return True

    pairs = sum(sees(i, t) for i in range(time) for t in range(time))
    expected = 4 * 24 * pairs * options.get("num_steps", 1)
    assert build(cls, options).flops(time) == expected
    assert build(cls, options).flops(time, batch_size=3) == 3 * expected


@pytest.mark.parametrize(
    "attention", [SlidingWindowAttention(64, 2), SparseAttention(64, 2), StandardAttention(64, 2)], ids=lambda a: type(a).__name__
)
@torch.no_grad()
def test_memory_is_linear_in_time(attention: MultiHeadAttention) -> None:
    peaks = [peak_allocated_bytes(lambda n=n: attention(torch.zeros(1, n, 64))) for n in (2048, 8192)]  # type: ignore[misc]
    assert peaks[1] <= 4.2 * peaks[0]
    # All n×n scores of both heads would take 512 MiB.
    assert peaks[1] < 32 * 2**20


@pytest.mark.parametrize("cls", [StandardAttention, SlidingWindowAttention, HopfieldAttention])
def test_dropout_acts_in_training_only_and_preserves_the_mean(cls: Any) -> None:
    attention = cls(24, 4, dropout=0.25).double()
    x = torch.randn(1, 9, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(2)
    with torch.no_grad():
        samples = torch.stack([attention(x) for _ in range(400)])
        exact = attention.eval()(x)
    assert torch.equal(exact, attention(x))
    assert (samples[0] - samples[1]).abs().max() > 1e-3
    error = samples.std(dim=0) / 400**0.5
    assert ((samples.mean(dim=0) - exact).abs() <= 5 * error + 1e-12).all()


# --- kernels that are not run here ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_cuda_kernels_accept_and_return_these_shapes(dtype: torch.dtype, is_causal: bool) -> None:
    """Checks arguments, shapes and types of the CUDA calls behind sparse attention in half types, on fake tensors.

    A CPU build of torch cannot trace those of float32 even so.
    """
    with FakeTensorMode():
        q = torch.empty(3, 4, 50, 16, dtype=dtype, device="cuda")
        k, v = (torch.empty(3, 2, 50 if is_causal else 20, 16, dtype=dtype, device="cuda") for _ in range(2))
        out, lse = attention_with_lse(q, k, v, is_causal=is_causal)
        assert (out.shape, out.dtype) == (q.shape, dtype)
        assert (lse.shape, lse.dtype) == ((3, 4, 50, 1), torch.float32)
        for gradient, x in zip(attention_with_lse_backward(k, v, q, out, lse, out, is_causal=is_causal), (q, k, v), strict=True):
            assert gradient.shape == x.shape


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SlidingWindowAttention(8, 2, window_size=0), "window_size must be a positive integer, got 0"),
        (lambda: SparseAttention(8, 2, block_size=0), "block_size must be a positive integer, got 0"),
        (lambda: SparseAttention(8, 2, block_size=4, summary_size=5), "summary_size must be at most block_size"),
        (lambda: HopfieldAttention(8, 2, num_steps=0), "num_steps must be a positive integer, got 0"),
        (lambda: HopfieldAttention(8, 2, beta=-1.0), "beta must be above 0, or None"),
        (lambda: StandardAttention(9, 2), "hidden_dim must be a multiple of num_heads"),
        (lambda: StandardAttention(8, 2, dropout=1.0), "dropout must be at least 0 and below 1"),
    ],
)
def test_options_are_checked(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


@FUNCTIONS
def test_errors_name_shapes_that_do_not_fit(fast: Attend, reference: Attend, oracle: Attend, options: Any) -> None:
    q, k, v = inputs(9)
    for wrong in ((q, k[..., :3], v), (q, k, v[:, :, :5]), (q[:, :3], k, v), (q, k[:, :, :5], v[:, :, :5]), (q[0], k, v)):
        with pytest.raises(ValueError, match=r"got q \["):
            fast(*wrong, **options)
