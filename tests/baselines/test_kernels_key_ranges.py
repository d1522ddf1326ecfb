"""Tests the C++ kernels of sliding_window and sparse, and derivatives of every kind of all attentions made of softmax."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.hopfield import hopfield_attention
from baselines.kernels.key_ranges import KERNELS, QUERIES
from baselines.sliding_window import SlidingWindowAttention, sliding_window_attention
from baselines.sparse import SparseAttention, sparse_attention
from baselines.standard import softmax_attention
from bsbr.backends.cpp import build
from tests import oracles

Attend = Callable[..., Tensor]
WINDOW = partial(sliding_window_attention, window_size=3)
SPARSE = partial(sparse_attention, block_size=3, summary_size=2)


def tensors(
    m: int, n: int, heads: int, kv_heads: int, dim: int, value_dim: int, dtype: torch.dtype, batch: int = 2
) -> list[Tensor]:
    """q, k and v as projections leave them: views of [batch, time, heads, dim]."""
    generator = torch.Generator().manual_seed(m + n)
    shapes = ((m, heads, dim), (n, kv_heads, dim), (n, kv_heads, value_dim))
    return [torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2) for shape in shapes]


# --- values and gradients -------------------------------------------------------------------------

# Lengths around the kernel's blocks of 128 queries and chunks of 256 keys; few heads, so that gradients are computed in spans.
SIZES = [(1, 300, 2, 1, 16, 5), (QUERIES + 1, QUERIES + 1, 4, 2, 3, 24), (300, 700, 1, 1, 8, 8), (2, 259, 3, 3, 1, 1)]
PATTERNS: list[tuple[Attend, Attend, dict[str, int]]] = [
    *((sliding_window_attention, oracles.sliding_window, {"window_size": w}) for w in (1, 17, 130, 600)),
    *(
        (sparse_attention, oracles.sparse, {"block_size": block, "summary_size": c})
        for block, c in ((2, 1), (33, 5), (QUERIES, 8), (600, 600))
    ),
]


def name(value: Any) -> str:
    """The name of a function, which is the same in every process of the tests; anything else as it prints."""
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("fast", "oracle", "options"), PATTERNS, ids=name)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_values_and_gradients_equal_the_oracle(
    fast: Attend, oracle: Attend, options: Any, sizes: Any, dtype: torch.dtype, allowed: float
) -> None:
    inputs = [x.requires_grad_() for x in tensors(*sizes, dtype)]
    output, expected = fast(*inputs, **options, impl="cpp"), oracle(*(x.double() for x in inputs), **options)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=allowed)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = torch.autograd.grad(output, inputs, upstream.to(dtype))
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=allowed)


@pytest.mark.parametrize(("fast", "oracle", "options"), [PATTERNS[1], PATTERNS[5]], ids=name)
def test_any_strides_and_any_number_of_threads(fast: Attend, oracle: Attend, options: Any) -> None:
    q, k, v = tensors(70, 70, 2, 2, 4, 4, torch.float64)
    shared = k[:1, :1].expand(2, 2, 70, 4)  # one head for all, stride 0
    rows = torch.randn(2, 2, 70, 4, 3, dtype=torch.float64)[..., 1]  # no stride is 1
    empty = fast(q[:0], k[:0], v[:0], **options)
    assert empty.shape == (0, 2, 70, 4)
    before = torch.get_num_threads()
    outputs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        inputs = [x.requires_grad_() for x in (q.detach(), shared.detach(), rows.detach())]
        output = fast(*inputs, **options, impl="cpp")
        outputs.append([output, *torch.autograd.grad(output.sum(), inputs)])  # the gradient of a sum is expanded: stride 0
    torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in outputs[1:] for x, y in zip(outputs[0], other, strict=True))
    leaves = [x.detach().requires_grad_() for x in (q, shared, rows)]
    expected = oracle(*leaves, **options)
    for x, y in zip(outputs[0], [expected, *torch.autograd.grad(expected.sum(), leaves)], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fast", [WINDOW, SPARSE], ids=["window", "sparse"])
def test_a_later_key_or_value_that_is_not_finite_changes_no_earlier_output(fast: Attend, bad: float) -> None:
    for place in (0, 1, 2):
        inputs = tensors(40, 40, 2, 1, 4, 4, torch.float64)
        before = fast(*inputs, impl="cpp")
        changed = [x.clone() for x in inputs]
        changed[place][:, :, 20] = bad
        after = fast(*changed, impl="cpp")
        assert torch.equal(before[:, :, :20], after[:, :, :20])
        assert not after[:, :, 20].isfinite().any()


@pytest.mark.parametrize("cls", [SlidingWindowAttention, SparseAttention])
@pytest.mark.parametrize("time", [64, 300, 512])
def test_the_kernel_computes_little_more_than_declared(cls: Any, time: int) -> None:
    """A panel of queries computes the union of what its queries see."""
    attention = cls(32, 2)
    q, k, v = tensors(time, time, 2, 2, 16, 16, torch.float32, batch=1)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        attention.attend(q, k, v)
    assert attention.flops(time) <= counter.get_total_flops() <= 1.35 * attention.flops(time)


# --- derivatives of other kinds ---------------------------------------------------------------------

DERIVATIVES = pytest.mark.parametrize(
    "attend",
    [
        pytest.param(softmax_attention, id="standard"),
        pytest.param(partial(hopfield_attention, num_steps=2), id="hopfield"),
        *(
            pytest.param(partial(f, impl=impl), id=f"{f.func.__name__}-{impl}")
            for f in (WINDOW, SPARSE)
            for impl in ("torch", "cpp")
        ),
    ],
)


@DERIVATIVES
@pytest.mark.parametrize("queries", [5, 8])
def test_second_derivatives_equal_finite_differences(attend: Attend, queries: int) -> None:
    inputs = [x.requires_grad_() for x in tensors(queries, 8, 2, 1, 2, 2, torch.float64, batch=1)]
    torch.autograd.gradgradcheck(attend, inputs)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, when it loads forward mode
@pytest.mark.parametrize(
    ("attend", "oracle"),
    [
        pytest.param(softmax_attention, oracles.standard, id="standard"),
        pytest.param(hopfield_attention, partial(oracles.hopfield, beta=2**-0.5, num_steps=1), id="hopfield"),
        pytest.param(WINDOW, partial(oracles.sliding_window, window_size=3), id="window"),
        pytest.param(SPARSE, partial(oracles.sparse, block_size=3, summary_size=2), id="sparse"),
    ],
)
def test_transforms_of_functions_take_torch(attend: Attend, oracle: Attend) -> None:
    q, k, v = tensors(8, 8, 2, 2, 2, 2, torch.float64, batch=1)
    assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)
    assert_close(torch.vmap(attend)(*(torch.stack([x, 2 * x]) for x in (q, k, v)))[1], oracle(2 * q, 2 * k, 2 * v))
    assert_close(torch.func.jvp(attend, (q, k, v), (k, v, q))[1], torch.func.jvp(oracle, (q, k, v), (k, v, q))[1])
    hessians = [torch.func.hessian(lambda x, f=f: f(x, k, v).square().sum())(q) for f in (attend, oracle)]  # type: ignore[misc]
    assert_close(*hessians)


def test_without_a_compiler_torch_runs_after_one_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("bsbr.backends.cpp.calls.library", build.library.__wrapped__)
    inputs = tensors(9, 9, 2, 2, 4, 4, torch.float32)
    with pytest.warns(RuntimeWarning, match="key_ranges runs on the torch backend, several times slower"):
        assert KERNELS.unsupported(*inputs)
    with pytest.warns(RuntimeWarning, match="no-such-compiler"):
        output = WINDOW(*inputs)
    assert torch.equal(output, WINDOW(*inputs, impl="torch"))


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")  # torch's own
def test_torch_compile_of_sparse_attention_in_parts() -> None:
    """Its merges write to views; views of unfold, which torch.compile takes to overlap, made the backward pass fail."""
    inputs = [x.requires_grad_() for x in tensors(6, 6, 2, 1, 2, 2, torch.float64, batch=1)]
    compiled = torch.compile(partial(SPARSE, impl="torch"), backend="aot_eager", dynamic=False)
    results = [[output, *torch.autograd.grad(output.sum(), inputs)] for output in (f(*inputs) for f in (SPARSE, compiled))]
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
