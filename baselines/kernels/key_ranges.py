"""Softmax attention of each query over ranges of keys, in C++: a window of tokens, or its block and summaries of earlier blocks.

`sliding_window` and `sparse` share these functions of key_ranges.cpp, which are the operators torch.ops.key_ranges.*.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bsbr.backends.cpp.calls import Kernels
from bsbr.backends.cpp.differentiable import Differentiable

KERNELS = Kernels(Path(__file__).with_name("key_ranges.cpp"), "key_ranges")
"""The functions of key_ranges.cpp."""

UNBOUNDED = 2**40
"""A window or block that is longer than any sequence."""

QUERIES = 128
"""Queries of one task, as in key_ranges.cpp."""

SPAN = 512
"""Queries whose gradients are computed for all heads before the next queries: their pages of memory are then read together."""

TASKS = 8
"""Tasks that the gradients of few heads are split into, so that several cores have work; also the most spans with summaries, as
each has its own gradients of them."""


class Ranges(NamedTuple):
    """The keys that a query sees. The last query is at the last of the tokens, and positions count from the first.

    A query sees the tokens of its block up to itself, and of these the last `window`. It also sees the first
    `earlier` + (number of its block) · `summary_size` rows of the summaries.
    """

    window: int = UNBOUNDED
    block_size: int = UNBOUNDED
    summary_size: int = 0
    earlier: int = 0


class _Sizes(NamedTuple):
    """`RangeSizes` of key_ranges.cpp."""

    batch: int
    heads: int
    kv_heads: int
    time: int
    keys: int
    summaries: int
    head_dim: int
    value_dim: int
    window: int
    block: int
    summary: int
    seen: int
    spans: int


@KERNELS.operator(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? k_summary, Tensor? v_summary, Tensor(a!) out, Tensor(b!)? lse, "
    "int[] ranges) -> int"
)
def _attend(q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor | None, *rest: Any) -> int:
    """Writes the output, and unless it is None the log-sum-exp of each query's scores [batch, heads, time, 1].

    ranges: the fields of `Ranges`.
    """
    *tensors, ranges = rest
    return KERNELS.call("attend", _sizes(q, k, v, k_summary, ranges, spans=1), q, k, v, k_summary, *tensors)


@KERNELS.operator(
    "attend_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor? k_summary, Tensor? v_summary, Tensor out, Tensor lse, "
    "Tensor(a!) d_q, Tensor(b!) d_k, Tensor(c!) d_v, Tensor(d!)? d_k_summary, Tensor(e!)? d_v_summary, "
    "int[] ranges, int spans) -> int"
)
def _attend_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor | None, *rest: Any) -> int:
    """Writes d_q, and adds to the other gradients; those of the summaries are [batch, kv_heads, spans · rows, dim]."""
    *tensors, ranges, spans = rest
    return KERNELS.call("attend_backward", _sizes(q, k, v, k_summary, ranges, spans), d_out, q, k, v, k_summary, *tensors)


def _sizes(q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor | None, ranges: list[int], spans: int) -> _Sizes:
    summaries = 0 if k_summary is None else k_summary.shape[2]
    batch, heads, time, head_dim = q.shape
    return _Sizes(batch, heads, k.shape[1], time, k.shape[2], summaries, head_dim, v.shape[3], *Ranges(*ranges), spans)


def attention(torch_form: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Softmax attention f(q, k, v, k_summary, v_summary, ranges), of tensors that `KERNELS` supports.

    o_i = Σ_t softmax_t(q_i·k_t/√head_dim) v_t over the tokens and summaries that query i sees, with

    - q: [batch, heads, m, head_dim], the queries of the last m tokens;
    - k, v: [batch, kv_heads, n, head_dim or value_dim], with m <= n;
    - k_summary, v_summary: [batch, kv_heads, rows >= 1, head_dim or value_dim], or None for those of the tokens, see `summaries`;
    - ranges: see `Ranges`.

    Costs 2 · (head_dim + value_dim) operations per visible pair, and twice and a half as many for the gradients. Memory beyond the
    output is linear in m.

    Args:
        torch_form: the same function by torch operations.
    """
    return cast(Callable[..., Tensor], Differentiable(_forward, _backward, torch_form))


def summaries(x: Tensor, block_size: int, summary_size: int) -> Tensor:
    """Last rows of every complete block: [batch, heads, n, head_dim] -> [batch, heads, blocks · summary_size, head_dim]."""
    blocks = x.shape[2] // block_size
    return _summary_rows(x, block_size, summary_size).flatten(2, 3) if blocks and summary_size else x[:, :, :0]


def _summary_rows(x: Tensor, block_size: int, summary_size: int) -> Tensor:
    """`summaries` as a view [batch, heads, blocks, summary_size, head_dim]."""
    blocks = x.shape[2] // block_size
    cells: Tensor = x[:, :, : blocks * block_size].unflatten(2, (blocks, block_size))
    return cells[:, :, :, block_size - summary_size :]


def _own_summaries(k: Tensor, v: Tensor, ranges: Ranges) -> tuple[Tensor | None, Tensor | None]:
    rows = [summaries(x, ranges.block_size, ranges.summary_size) for x in (k, v)]
    return (rows[0], rows[1]) if rows[0].shape[2] else (None, None)


def _number_of_spans(time: int, heads: int, ranges: Ranges) -> int:
    """Number of spans of queries whose gradients are computed at once. Neighbours share keys, so none is shorter than a window."""
    spans = max(time // SPAN, TASKS // max(1, heads))
    if ranges.summary_size:
        spans = min(spans, TASKS)
    return max(1, min(spans, time // max(QUERIES, min(ranges.window, ranges.block_size))))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor | None, v_summary: Tensor | None, ranges: Ranges
) -> tuple[Tensor, tuple[Tensor, ...]]:
    batch, heads, time, _ = q.shape
    if k_summary is None:
        k_summary, v_summary = _own_summaries(k, v, ranges)
    out = q.new_empty(batch, time, heads, v.shape[3]).transpose(1, 2)  # joining the heads is then no copy
    wants_gradient = any(x is not None and x.requires_grad for x in (q, k, v, k_summary, v_summary))
    lse = q.new_empty(batch, heads, time, 1) if wants_gradient else None
    torch.ops.key_ranges.attend(q, k, v, k_summary, v_summary, out, lse, ranges)
    return out, () if lse is None else (out, lse)


def _backward(
    arguments: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Ranges],
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    q, k, v, *given, ranges = arguments
    k_summary, v_summary = _own_summaries(k, v, ranges) if given[0] is None else given
    spans = _number_of_spans(q.shape[2], q.shape[0] * k.shape[1], ranges)
    d_q = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    d_k, d_v = (torch.zeros_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2) for x in (k, v))
    rows = [x for x in (k_summary, v_summary) if x is not None]
    by_span = [x.new_zeros(*x.shape[:2], spans * x.shape[2], x.shape[3]) for x in rows]
    tensors = d_q, d_k, d_v, *(by_span or (None, None))
    torch.ops.key_ranges.attend_backward(*gradients, q, k, v, k_summary, v_summary, *saved, *tensors, ranges, spans)
    d_rows = [x.unflatten(2, (spans, -1)).sum(dim=2) if spans > 1 else x for x in by_span]
    if given[0] is not None:
        return d_q, d_k, d_v, *d_rows, None
    for whole, part in zip((d_k, d_v), d_rows, strict=False):
        own = _summary_rows(whole, ranges.block_size, ranges.summary_size)
        own += part.view(own.shape)
    return d_q, d_k, d_v, None, None, None
