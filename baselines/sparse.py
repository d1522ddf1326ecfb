"""Sparse attention with the fixed pattern: each token sees its own block, and the last tokens of every earlier block.

Child et al. 2019, "Generating Long Sequences with Sparse Transformers", arXiv:1904.10509.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from baselines.kernels import flex, key_ranges
from baselines.kernels.merged_softmax import Part, Segments, attention_over_parts, one_segment
from baselines.standard import softmax_attention_over_pages
from bsbr.backends.selection import check_impl, select
from bsbr.interface import (
    MultiHeadAttention,
    State,
    check_heads,
    check_hidden_states,
    next_position,
    position_counter,
    require_positive,
)

# --- the function -----------------------------------------------------------------------------------


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, *, block_size: int, summary_size: int, impl: str = "auto") -> Tensor:
    """Fixed sparse pattern: o_i = Σ_t softmax_t(q_i·k_t/√head_dim) v_t over the visible t <= i.

    Visible are the tokens of i's own block and the last summary_size tokens, the summary, of every earlier block. One softmax
    covers both: "fixed" with "merged heads" of arXiv:1904.10509, sec. 4.3. There is no dropout, because no kernel on a CPU has any.

    Args:
        q: [batch, heads, m, head_dim]; its rows are the last m positions.
        k, v: [batch, kv_heads, n, head_dim], m <= n, kv_heads a divisor of heads; v may have another head_dim in C++.
        block_size: tokens of a block.
        summary_size: tokens of each earlier block that later blocks see.
        impl: "torch"; "cpp" for the C++ kernels, which run on a CPU; or "auto" for C++ where it can run.

    Returns:
        [batch, heads, m, head_dim of v]. Costs O(n·(block_size + summary_size·n/block_size)·head_dim) per head; memory is linear
        in n.

    Raises:
        ValueError: if the shapes do not fit, summary_size is not within 1 … block_size, or torch's device has no kernel.
        NotImplementedError: if `impl` names a backend that cannot take these tensors.
    """
    check_pattern(block_size, summary_size)
    check_heads(q, k, v)
    blocks_before = (k.shape[2] - q.shape[2]) // block_size * block_size  # tokens of the blocks that hold no query
    if not blocks_before:
        return _attend(q, k, v, None, None, block_size=block_size, summary_size=summary_size, impl=impl)
    k_summary, v_summary = (key_ranges.summaries(x, block_size, summary_size) for x in (k, v))
    tensors = q, k[:, :, blocks_before:], v[:, :, blocks_before:], k_summary, v_summary
    return _attend(*tensors, block_size=block_size, summary_size=summary_size, impl=impl)


def check_pattern(block_size: int, summary_size: int) -> None:
    """Raises ValueError unless 1 <= summary_size <= block_size."""
    require_positive(block_size=block_size, summary_size=summary_size)
    if summary_size > block_size:
        raise ValueError(f"summary_size must be at most block_size, got summary_size={summary_size}, block_size={block_size}")


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_summary: Tensor | None,
    v_summary: Tensor | None,
    *,
    block_size: int,
    summary_size: int,
    impl: str,
) -> Tensor:
    """`sparse_attention` with k and v from the block of the first query on, and the summaries of all complete blocks.

    The summaries are None if they are those of k and v.
    """
    earlier_rows = 0 if k_summary is None else k_summary.shape[2] - k.shape[2] // block_size * summary_size
    tensors = [x for x in (q, k, v, k_summary, v_summary) if x is not None]
    backend = select(check_impl(impl, "cpp"), {"cpp": partial(key_ranges.KERNELS.unsupported, *tensors)})
    if not earlier_rows:
        k_summary = v_summary = None
    if q.shape[2] == 1:  # a decoded token sees all keys that are left
        if k_summary is None or v_summary is None:
            return softmax_attention_over_pages(q, [k], [v])
        return softmax_attention_over_pages(q, [k_summary[:, :, :earlier_rows], k], [v_summary[:, :, :earlier_rows], v])
    ranges = key_ranges.Ranges(block_size=block_size, summary_size=summary_size, earlier=earlier_rows)
    attend: Callable[..., Tensor] = _compiled if backend == "cpp" else _attend_in_parts
    return attend(q, k, v, k_summary, v_summary, ranges)


def _attend_in_parts(
    q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor | None, v_summary: Tensor | None, ranges: key_ranges.Ranges
) -> Tensor:
    """`key_ranges.attention` by torch operations."""
    parts = _pattern_parts(k.shape[2] - q.shape[2], k.shape[2], ranges.earlier, ranges.block_size, ranges.summary_size)
    if k_summary is None or v_summary is None:
        k_summary, v_summary = (key_ranges.summaries(x, ranges.block_size, ranges.summary_size) for x in (k, v))
    return attention_over_parts(q, [(k, v), (k_summary, v_summary)], parts)


_compiled = key_ranges.attention(_attend_in_parts)
"""`_attend_in_parts` by C++ kernels."""


TOKENS, SUMMARIES = 0, 1
"""Values of `Part.source`."""


def _pattern_parts(start: int, stop: int, earlier_rows: int, block_size: int, summary_size: int) -> list[Part]:
    """Pattern of queries at positions start … stop − 1.

    Positions count from the block of the first query, so 0 <= start < block_size. Earlier blocks have `earlier_rows` summary rows.
    """
    parts = _own_block_parts(start, stop, block_size)
    if earlier_rows:
        parts.append(Part(one_segment(0, stop - start), one_segment(0, earlier_rows), SUMMARIES))
    return parts + _summary_parts(start, stop, earlier_rows, block_size, summary_size)


def _own_block_parts(start: int, stop: int, block_size: int) -> list[Part]:
    """Parts of each query with the keys of its own block: first block from `start` on, complete blocks, incomplete last block."""

    def causal_part(first: int, length: int, number: int = 1) -> Part:
        queries, keys = Segments(first - start, length, length, number), Segments(first, length, length, number)
        return Part(queries, keys, TOKENS, is_causal=True)

    parts, first = [], 0
    if start:
        first = min(block_size, stop)
        parts += [Part(one_segment(0, first - start), one_segment(0, start), TOKENS), causal_part(start, first - start)]
    complete, rest = divmod(stop - first, block_size)
    if complete:
        parts.append(causal_part(first, block_size, complete))
    if rest:
        parts.append(causal_part(stop - rest, rest))
    return parts


def _summary_parts(start: int, stop: int, earlier_rows: int, block_size: int, summary_size: int) -> list[Part]:
    """Parts of each query with the summaries of the blocks from position 0 up to its own block.

    Pairs of a block and an earlier block form a strict triangle, which is split recursively: on the levels 1, 2, 4, … blocks, the
    right half of each pair of neighbours sees all summaries of the left half, without a mask. No masked score is computed, and
    the number of parts is logarithmic in the number of blocks.
    """
    parts, half = [], 1
    while half * block_size < stop:
        length, pair = half * block_size, 2 * half * block_size
        rows, pair_rows = half * summary_size, 2 * half * summary_size
        complete = stop // pair
        if complete:
            queries, keys = Segments(length - start, length, pair, complete), Segments(earlier_rows, rows, pair_rows, complete)
            parts.append(Part(queries, keys, SUMMARIES))
        begin = complete * pair + length
        if begin < stop:
            keys = one_segment(earlier_rows + complete * pair_rows, rows)
            parts.append(Part(one_segment(begin - start, stop - begin), keys, SUMMARIES))
        half *= 2
    return parts


@cache
def fixed_pattern(block_size: int, summary_size: int, offset: int) -> flex.MaskFunction:
    """Mask function of the pattern; query 0 is at position `offset` of the keys."""

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        position = query + offset
        own_block = key // block_size == position // block_size
        return (key <= position) & (own_block | (key % block_size >= block_size - summary_size))

    return is_visible


# --- reference and module -----------------------------------------------------------------------


def sparse_attention_reference(q: Tensor, k: Tensor, v: Tensor, *, block_size: int, summary_size: int) -> Tensor:
    """`sparse_attention` in float64, query by query over its visible keys."""
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    m, n = q.shape[2], k.shape[2]
    outputs = []
    for row in range(m):
        i = n - m + row
        visible = [t for t in range(i + 1) if t // block_size == i // block_size or t % block_size >= block_size - summary_size]
        scores = torch.einsum("bhd,bhtd->bht", q[:, :, row], k[:, :, visible]) / q.shape[-1] ** 0.5
        outputs.append(torch.einsum("bht,bhtd->bhd", scores.softmax(dim=-1), v[:, :, visible]))
    return torch.stack(outputs, dim=2)


class SparseAttention(MultiHeadAttention):
    """Sparse attention layer: `sparse_attention` between projections.

    The decoding state holds the keys and values of the incomplete block and the summaries of all complete ones; a token costs
    O((block_size + summary_size·n/block_size)·head_dim) per head.

    Args:
        hidden_dim, num_heads, num_kv_heads, rotary: as in `MultiHeadAttention`.
        block_size, summary_size: as in `sparse_attention`.
        impl: see `Attention`. "cpp" is `baselines.kernels.key_ranges`; "flex" is torch's FlexAttention, made for CUDA. Instead of
            the latter, `extend` takes the torch path, because its state does not hold all keys; so does a single token always.

    Raises:
        ValueError: if summary_size is not within 1 … block_size, or impl is unknown.
    """

    backends = ("cpp",)
    explicit_backends = ("flex",)
    bounded_state = True

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        *,
        block_size: int = 128,
        summary_size: int = 8,
        num_kv_heads: int | None = None,
        rotary: bool = False,
        impl: str = "auto",
    ) -> None:
        check_pattern(block_size, summary_size)
        super().__init__(hidden_dim, num_heads, num_kv_heads=num_kv_heads, rotary=rotary, impl=impl)
        self.block_size = block_size
        self.summary_size = summary_size

    @property
    def block_length(self) -> int:
        return self.block_size

    def unsupported(self, backend: str, *tensors: Tensor) -> str | None:
        return key_ranges.KERNELS.unsupported(*tensors) if backend == "cpp" else None

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        backend = self.select_backend(*tensors)
        if backend == "flex" and q.shape[2] > 1:
            return flex.masked_attention(fixed_pattern(self.block_size, self.summary_size, k.shape[2] - q.shape[2]), q, k, v)
        return sparse_attention(q, k, v, block_size=self.block_size, summary_size=self.summary_size, impl=_without_flex(backend))

    def reference(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        return sparse_attention_reference(q, k, v, block_size=self.block_size, summary_size=self.summary_size)

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        check_hidden_states(hidden_states, self.hidden_dim)
        position = next_position(state)
        q, k, v = self.project(hidden_states, position)
        if state is not None:
            k, v = torch.cat([state["keys"], k], dim=2), torch.cat([state["values"], v], dim=2)
        completed = k.shape[2] // self.block_size * self.block_size  # tokens that leave the incomplete block
        if state is not None and not completed:  # no block was completed: the summaries stay as they are
            k_summary, v_summary = state["key_summaries"], state["value_summaries"]
        else:
            k_summary, v_summary = (key_ranges.summaries(x, self.block_size, self.summary_size) for x in (k, v))
            if state is not None:
                k_summary = torch.cat([state["key_summaries"], k_summary], dim=2)
                v_summary = torch.cat([state["value_summaries"], v_summary], dim=2)
        tensors, impl = (q, k, v, k_summary, v_summary), _without_flex(self.impl)
        output = self.output(_attend(*tensors, block_size=self.block_size, summary_size=self.summary_size, impl=impl))
        if completed:
            # Cloned: a view would keep all the keys in memory.
            k, v = (x[:, :, completed:].clone(memory_format=torch.contiguous_format) for x in (k, v))
        kept = {"keys": k, "values": v, "key_summaries": k_summary, "value_summaries": v_summary}
        # An empty view would keep its base in memory, too.
        kept = {name: x.contiguous() if x.shape[2] else x.new_empty(x.shape) for name, x in kept.items()}
        return output, {**kept, "position": position_counter(position + hidden_states.shape[1])}

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        """Bytes of the keys and values of the incomplete block and of all summaries."""
        blocks, rest = divmod(seq_len, self.block_size)
        rows = rest + blocks * self.summary_size
        return 2 * batch_size * self.num_kv_heads * rows * self.head_dim * self.dtype.itemsize

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        """FLOPs: 4·head_dim per head for each pair of a query and a visible key."""
        blocks, rest = divmod(seq_len, self.block_size)
        own_block = blocks * self.block_size * (self.block_size + 1) // 2 + rest * (rest + 1) // 2
        earlier = self.summary_size * (self.block_size * (blocks * (blocks - 1) // 2) + rest * blocks)
        return 4 * batch_size * self.num_heads * self.head_dim * (own_block + earlier)


def _without_flex(impl: str) -> str:
    return "torch" if impl == "flex" else impl
