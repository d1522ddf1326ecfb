"""The fixed sparse pattern (Child 2019): one's own block, and a summary of every earlier one."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from baselines.kernels import flex
from baselines.standard import softmax_attention_over_pages
from bsbr.interface import (
    MultiHeadAttention,
    State,
    check_heads,
    check_hidden_states,
    next_position,
    position_counter,
    require_positive,
)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, *, block_size: int, summary_size: int) -> Tensor:
    """o_i = Σ_t softmax_t(q_i·k_t/√head_dim) v_t over the t <= i in i's block or among the last summary_size of an earlier one.

    Child 2019, arXiv:1904.10509, sec. 4.3 ("fixed"), both kinds of keys under one softmax ("merged heads").
    q: [batch, heads, m, head_dim]; k, v: [batch, kv_heads, n, head_dim], m <= n, kv_heads a divisor of heads;
    the rows of q are the last m positions. Returns [batch, heads, m, head_dim]. Differentiable once.
    Cost O(n·(block_size + summary_size·n/block_size)·head_dim), memory linear in n. No dropout: the CPU kernel has none.
    Raises ValueError if the shapes do not fit, summary_size is not within 1 … block_size or the device has no kernel.
    """
    check_pattern(block_size, summary_size)
    check_heads(q, k, v)
    closed = (k.shape[2] - q.shape[2]) // block_size * block_size  # the blocks that no query is in
    k_summary, v_summary = (summarise(x, block_size, summary_size) for x in (k, v))
    return _attend(q, k[:, :, closed:], v[:, :, closed:], k_summary, v_summary, block_size, summary_size)


def summarise(x: Tensor, block_size: int, summary_size: int) -> Tensor:
    """[batch, heads, n, head_dim] -> [batch, heads, blocks · summary_size, head_dim]: the last rows of every whole block."""
    blocks = x.shape[2] // block_size
    if not blocks:
        return x[:, :, :0]
    return x.unfold(2, block_size, block_size)[..., block_size - summary_size :].mT.flatten(2, 3)


def _attend(q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor, v_summary: Tensor, block_size: int, summary_size: int) -> Tensor:
    """`sparse_attention` where k and v begin with the block of the first query, and the summaries with the first block of all."""
    earlier = k_summary.shape[2] - k.shape[2] // block_size * summary_size
    if q.shape[2] == 1:  # a decoded token sees all there is
        if not earlier:
            return softmax_attention_over_pages(q, [k], [v])
        return softmax_attention_over_pages(q, [k_summary[:, :, :earlier], k], [v_summary[:, :, :earlier], v])
    parts = _plan(k.shape[2] - q.shape[2], k.shape[2], earlier, block_size, summary_size)
    return attention_over_parts(q, [(k, v), (k_summary, v_summary)], parts)


class Runs(NamedTuple):
    """`number` runs of `length` positions, the first from `start`, each `step` after the one before."""

    start: int
    length: int
    step: int = 1
    number: int = 1

    def of(self, x: Tensor) -> Tensor:
        """[batch, heads, time, dim] -> [batch, number, heads, length, dim], a view."""
        stop = self.start + (self.number - 1) * self.step + self.length
        return x[:, :, self.start : stop].unfold(2, self.length, self.step).permute(0, 2, 1, 4, 3)


class Part(NamedTuple):
    """Run i of the queries attends to run i of the keys of a source: to all of it, or causally (runs of one length)."""

    queries: Runs
    keys: Runs
    source: int
    is_causal: bool = False


TOKENS, SUMMARIES = 0, 1


def _plan(start: int, stop: int, earlier: int, block_size: int, summary_size: int) -> list[Part]:
    """The parts for queries at positions start … stop − 1, 0 <= start < block_size, behind `earlier` rows of summaries.

    Earlier blocks seen by later ones are a triangle without its diagonal, which is halved: at every level the right
    halves of pairs of 1, 2, 4, … blocks see all the summaries of the left halves, densely. No score is computed in
    vain, and the number of calls grows with the logarithm of the number of blocks.
    """
    parts = []

    def own(first: int, length: int, number: int = 1) -> Part:
        return Part(Runs(first - start, length, length, number), Runs(first, length, length, number), TOKENS, is_causal=True)

    first = 0
    if start:
        first = min(block_size, stop)
        parts += [Part(Runs(0, first - start), Runs(0, start), TOKENS), own(start, first - start)]
    whole, rest = divmod(stop - first, block_size)
    if whole:
        parts.append(own(first, block_size, whole))
    if rest:
        parts.append(own(stop - rest, rest))

    if earlier:
        parts.append(Part(Runs(0, stop - start), Runs(0, earlier), SUMMARIES))
    half = 1
    while half * block_size < stop:
        length, pair = half * block_size, 2 * half * block_size
        rows, pair_rows = half * summary_size, 2 * half * summary_size
        whole = stop // pair
        if whole:
            parts.append(Part(Runs(length - start, length, pair, whole), Runs(earlier, rows, pair_rows, whole), SUMMARIES))
        begin = whole * pair + length
        if begin < stop:
            parts.append(Part(Runs(begin - start, stop - begin), Runs(earlier + whole * pair_rows, rows), SUMMARIES))
        half *= 2
    return parts


# --- one softmax over keys that are attended in parts -------------------------------------------


def attention_over_parts(q: Tensor, sources: Sequence[tuple[Tensor, Tensor]], parts: Sequence[Part]) -> Tensor:
    """o_i = Σ_p exp(L_ip) o_ip / Σ_p exp(L_ip): the softmax over the union of all the keys that query i meets.

    o_ip is the attention of query i in part p, L_ip the log of its sum of exponentials. q: [batch, heads, time,
    head_dim]; every source: k, v of [batch, kv_heads, any time, head_dim]. A query must be in at least one part and
    meet no key twice. The gradient is exact: given the merged o and L, the backward pass of the kernel of a part yields
    that part's share, as in ring attention (Liu 2023, arXiv:2310.01889). Differentiable once.
    Raises ValueError where there is no kernel that returns L.
    """
    same_dim = q.shape[-1] == sources[0][1].shape[-1]
    half = q.dtype in (torch.bfloat16, torch.float16)
    cuda = q.is_cuda and (half or q.dtype == torch.float32) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    if not (same_dim and (cuda or q.device.type == "cpu")):
        raise ValueError(
            f"no kernel for {q.dtype} on {q.device.type} with q {list(q.shape)} and v {list(sources[0][1].shape)}: use one "
            "head_dim for both on the CPU, or with float32, bfloat16 or float16 on CUDA a multiple of 8 up to 256"
        )
    out: Tensor = _AttentionOverParts.apply(q, parts, *(x for source in sources for x in source))  # type: ignore[no-untyped-call]
    return out


class _AttentionOverParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, parts: Sequence[Part], *sources: Tensor) -> Tensor:
        # Every merge rounds, so half types are merged in float32.
        merged = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
        lse = torch.full_like(merged[..., :1], -torch.inf)
        for part in parts:
            k, v = sources[2 * part.source : 2 * part.source + 2]
            runs = (part.queries.of(q), part.keys.of(k), part.keys.of(v))
            out, out_lse = attention_part(*(x.flatten(0, 1) for x in runs), is_causal=part.is_causal)
            into, into_lse = part.queries.of(merged), part.queries.of(lse)
            out, out_lse = out.reshape(into.shape), out_lse.reshape(into_lse.shape)
            into.lerp_(out.to(merged.dtype), torch.sigmoid(out_lse - into_lse))
            into_lse.copy_(torch.logaddexp(into_lse, out_lse))
        merged = merged.to(q.dtype)
        ctx.parts = parts
        ctx.save_for_backward(q, merged, lse, *sources)
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, out, lse, *sources = ctx.saved_tensors
        grads = [torch.zeros_like(x, dtype=lse.dtype) for x in (q, *sources)]
        for part in ctx.parts:
            at = 2 * part.source
            keys = [part.keys.of(x).flatten(0, 1) for x in sources[at : at + 2]]
            queries = [part.queries.of(x).flatten(0, 1) for x in (q, out, lse, grad_out)]
            shares = attention_part_backward(*keys, *queries, is_causal=part.is_causal)
            into = (part.queries.of(grads[0]), part.keys.of(grads[at + 1]), part.keys.of(grads[at + 2]))
            for total, share in zip(into, shares, strict=True):
                total += share.reshape(total.shape)
        grad_q, *grad_sources = (grad.to(q.dtype) for grad in grads)
        return grad_q, None, *grad_sources


# --- the kernels that return the log of the sum of exponentials ----------------------------------
#
# F.scaled_dot_product_attention hides it. These two functions are all that knows the kernels behind: the CPU has one for
# every floating type, CUDA one for half types and one for float32. The CUDA calls were checked on fake tensors (arguments,
# shapes, types), not yet run on a device.


def attention_part(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ/√head_dim) v, and the log of the sum of exponentials, [batch, heads, time, 1] in float32 or better."""
    aten = torch.ops.aten
    if not q.is_cuda:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)
    elif q.dtype != torch.float32:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)
    else:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, is_causal)
        lse = lse.narrow(2, 0, q.shape[2])  # this kernel pads the queries to a multiple of 32
    return out, lse.unsqueeze(-1)


def attention_part_backward(
    k: Tensor, v: Tensor, q: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, *, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v in `attention_part`, where out and lse may be those of a softmax over more keys."""
    aten = torch.ops.aten
    lse = lse.squeeze(-1).contiguous()
    if not q.is_cuda:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad_out, q, k, v, out, lse, 0.0, is_causal)
        return grads[0], grads[1], grads[2]
    if q.dtype != torch.float32:
        # Of the dropout, which is none.
        seed, offset = (torch.zeros(size, dtype=torch.uint64, device=q.device) for size in ((2,), ()))
        lengths = (None, None, q.shape[2], k.shape[2])
        grads = aten._scaled_dot_product_flash_attention_backward(
            grad_out, q, k, v, out, lse, *lengths, 0.0, is_causal, seed, offset
        )
        return grads[0], grads[1], grads[2]
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    lse = F.pad(lse, (0, -lse.shape[-1] % 32))
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    grads = aten._scaled_dot_product_efficient_attention_backward(
        grad_out, q, k, v, None, out, lse, seed, seed, 0.0, [True, True, True, False], is_causal
    )
    grad_k, grad_v = (x.reshape(x.shape[0], -1, groups, *x.shape[2:]).sum(2) for x in grads[1:3])
    return grads[0], grad_k, grad_v


# --- reference and module -----------------------------------------------------------------------


@cache
def fixed_pattern(block_size: int, summary_size: int, ahead: int) -> flex.Sees:
    """Query i, at position `ahead` + i, sees its own block up to itself and the last summary_size keys of every earlier one."""

    def sees(batch: Tensor, head: Tensor, i: Tensor, t: Tensor) -> Tensor:
        position = i + ahead
        own = t // block_size == position // block_size
        return (t <= position) & (own | (t % block_size >= block_size - summary_size))

    return sees


def sparse_attention_reference(q: Tensor, k: Tensor, v: Tensor, *, block_size: int, summary_size: int) -> Tensor:
    """`sparse_attention` in float64, query by query over the keys that it may see."""
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    m, n = q.shape[2], k.shape[2]
    outputs = []
    for row in range(m):
        i = n - m + row
        seen = [t for t in range(i + 1) if t // block_size == i // block_size or t % block_size >= block_size - summary_size]
        scores = torch.einsum("bhd,bhtd->bht", q[:, :, row], k[:, :, seen]) / q.shape[-1] ** 0.5
        outputs.append(torch.einsum("bht,bhtd->bhd", scores.softmax(dim=-1), v[:, :, seen]))
    return torch.stack(outputs, dim=2)


class SparseAttention(MultiHeadAttention):
    """`sparse_attention` between projections.

    Decoding keeps the keys and values of the open block and the summaries of all whole ones: a token costs
    O((block_size + summary_size·n/block_size)·head_dim).

    impl: "torch", or "flex" for torch's FlexAttention, which is made for CUDA. `extend` goes by torch either way: behind a
    state lie summaries, not positions.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        *,
        block_size: int = 128,
        summary_size: int = 8,
        num_kv_heads: int | None = None,
        rotary: bool = False,
        impl: str = "torch",
    ) -> None:
        check_pattern(block_size, summary_size)
        super().__init__(hidden_dim, num_heads, num_kv_heads=num_kv_heads, rotary=rotary)
        self.block_size = block_size
        self.summary_size = summary_size
        self.impl = flex.checked(impl)

    @property
    def block_length(self) -> int:
        return self.block_size

    def implementation(self, *_: Tensor) -> str:
        return self.impl

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        if self.impl == "flex" and q.shape[2] > 1:
            return flex.attention_where(fixed_pattern(self.block_size, self.summary_size, k.shape[2] - q.shape[2]), q, k, v)
        return sparse_attention(q, k, v, block_size=self.block_size, summary_size=self.summary_size)

    def reference(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        return sparse_attention_reference(q, k, v, block_size=self.block_size, summary_size=self.summary_size)

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        check_hidden_states(hidden_states, self.hidden_dim)
        position = next_position(state)
        q, k, v = self.project(hidden_states, position)
        if state is not None:
            k, v = torch.cat([state["keys"], k], dim=2), torch.cat([state["values"], v], dim=2)
        closed = k.shape[2] // self.block_size * self.block_size
        if state is not None and not closed:  # no block became whole: its summaries go on as they are
            k_summary, v_summary = state["key_summaries"], state["value_summaries"]
        else:
            k_summary, v_summary = (summarise(x, self.block_size, self.summary_size) for x in (k, v))
            if state is not None:
                k_summary = torch.cat([state["key_summaries"], k_summary], dim=2)
                v_summary = torch.cat([state["value_summaries"], v_summary], dim=2)
        output = self.output(_attend(q, k, v, k_summary, v_summary, self.block_size, self.summary_size))
        if closed:
            # Cloned: a view would keep all the keys alive.
            k, v = (x[:, :, closed:].clone(memory_format=torch.contiguous_format) for x in (k, v))
        kept = {"keys": k, "values": v, "key_summaries": k_summary, "value_summaries": v_summary}
        # Neither does a view of nothing.
        kept = {name: x.contiguous() if x.shape[2] else x.new_empty(x.shape) for name, x in kept.items()}
        return output, {**kept, "position": position_counter(position + hidden_states.shape[1])}

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        blocks, open_tokens = divmod(seq_len, self.block_size)
        kept = open_tokens + blocks * self.summary_size
        return 2 * batch_size * self.num_kv_heads * kept * self.head_dim * self.dtype.itemsize

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        blocks, rest = divmod(seq_len, self.block_size)
        own = blocks * self.block_size * (self.block_size + 1) // 2 + rest * (rest + 1) // 2
        earlier = self.summary_size * (self.block_size * (blocks * (blocks - 1) // 2) + rest * blocks)
        return 4 * batch_size * self.num_heads * self.head_dim * (own + earlier)


def check_pattern(block_size: int, summary_size: int) -> None:
    require_positive(block_size=block_size, summary_size=summary_size)
    if summary_size > block_size:
        raise ValueError(f"summary_size must be at most block_size, got summary_size={summary_size}, block_size={block_size}")
