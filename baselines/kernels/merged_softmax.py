"""Softmax attention computed in parts: a fused kernel per part of the keys, and a merge by the parts' log-sum-exp.

`sparse` builds its pattern from such parts; `ring` uses the kernels for shards of other ranks. Torch's public
scaled_dot_product_attention does not return the log-sum-exp, so this module calls the private kernels behind it.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bsbr.backends.cpp.differentiable import Differentiable
from bsbr.backends.sdpa import sdpa, with_contiguous_rows
from bsbr.backends.selection import is_transformed


class Segments(NamedTuple):
    """`number` segments of `length` positions each; segment i begins at start + i · stride."""

    start: int
    length: int
    stride: int
    number: int

    def view(self, x: Tensor) -> Tensor:
        """[batch, heads, time, dim] -> [batch, number, heads, length, dim], a view."""
        # Cells of `stride` positions that begin, or else end, with a segment. Only if neither fits are they strided views, which
        # torch.compile cannot write to: it takes them to overlap.
        gap = self.stride - self.length
        for before in (0, gap):
            first, stop = self.start - before, self.start - before + self.number * self.stride
            if first >= 0 and stop <= x.shape[2]:
                cells: Tensor = x[:, :, first:stop].unflatten(2, (self.number, self.stride))
                return cells[:, :, :, before : before + self.length].transpose(1, 2)
        stop = self.start + (self.number - 1) * self.stride + self.length
        return x[:, :, self.start : stop].unfold(2, self.length, self.stride).permute(0, 2, 1, 4, 3)


def one_segment(start: int, length: int) -> Segments:
    """The positions start … start + length − 1."""
    return Segments(start, length, length, 1)


class Part(NamedTuple):
    """Segment i of the queries attends to segment i of one source's keys: to all keys, or causally if both are equally long."""

    queries: Segments
    keys: Segments
    source: int
    is_causal: bool = False


def attention_over_parts(q: Tensor, sources: Sequence[tuple[Tensor, Tensor]], parts: Sequence[Part]) -> Tensor:
    """Softmax over the union of keys: o_i = Σ_p exp(L_ip) o_ip / Σ_p exp(L_ip).

    o_ip is the attention of query i in part p, and L_ip its log-sum-exp. The gradient is exact: from the merged o and L, the
    backward kernel computes each part's share, as in ring attention (Liu 2023, arXiv:2310.01889). Second derivatives, torch.func,
    torch.vmap and forward mode work too, and hold all pairs of queries and keys.

    Args:
        q: [batch, heads, time, head_dim].
        sources: pairs of keys and values, [batch, kv_heads, any time, head_dim] each; values may have another head_dim.
        parts: which queries attend to which keys. Each query is in at least one part, and no pair is in two parts.

    Returns:
        [batch, heads, time, head_dim].

    Raises:
        ValueError: if no kernel on this device returns the log-sum-exp for such tensors.
    """
    dim, value_dim = q.shape[-1], sources[0][1].shape[-1]
    if dim != value_dim:  # the kernels take one head_dim: zeros change no score, and no other column of the output
        wide = max(dim, value_dim)
        scaled = F.pad(q, (0, wide - dim)) * (wide / dim) ** 0.5  # the kernels divide by √wide
        padded = [(F.pad(k, (0, wide - dim)), F.pad(v, (0, wide - value_dim))) for k, v in sources]
        return attention_over_parts(scaled, padded, parts)[..., :value_dim]
    if q.device.type not in ("cpu", "meta") and not (q.is_cuda and q.dtype.itemsize <= 4 and dim % 8 == 0 and dim <= 256):
        raise ValueError(
            f"no kernel for {q.dtype} on {q.device.type} with q {list(q.shape)}: use the CPU, or on CUDA float32, a half type and "
            "a head_dim that is a multiple of 8 up to 256"
        )
    flat = [x for source in sources for x in source]
    attend: Callable[..., Tensor] = _in_one_piece if is_transformed() else _over_parts
    return attend(q, parts, *flat)


def _merge(q: Tensor, parts: Sequence[Part], *sources: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    # Every merge rounds, so half types are merged in float32.
    merged = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
    lse = torch.full_like(merged[..., :1], -torch.inf)
    for part in parts:
        k, v = sources[2 * part.source : 2 * part.source + 2]
        segments = (part.queries.view(q), part.keys.view(k), part.keys.view(v))
        out, out_lse = attention_with_lse(*(x.flatten(0, 1) for x in segments), is_causal=part.is_causal)
        merged_segments, lse_segments = part.queries.view(merged), part.queries.view(lse)
        out, out_lse = out.reshape(merged_segments.shape), out_lse.reshape(lse_segments.shape)
        merged_segments.lerp_(out.to(merged.dtype), torch.sigmoid(out_lse - lse_segments))
        lse_segments.copy_(torch.logaddexp(lse_segments, out_lse))
    merged = merged.to(q.dtype)
    return merged, (merged, lse)


def _merge_backward(
    arguments: tuple[Any, ...], saved: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    (q, parts, *sources), (out, lse) = arguments, saved
    grads = [torch.zeros_like(x, dtype=lse.dtype) for x in (q, *sources)]
    for part in parts:
        first = 2 * part.source
        keys = [part.keys.view(x).flatten(0, 1) for x in sources[first : first + 2]]
        queries = [part.queries.view(x).flatten(0, 1) for x in (q, out, lse, gradients[0])]
        shares = attention_with_lse_backward(*keys, *queries, is_causal=part.is_causal)
        totals = (part.queries.view(grads[0]), part.keys.view(grads[first + 1]), part.keys.view(grads[first + 2]))
        for total, share in zip(totals, shares, strict=True):
            total += share.reshape(total.shape)
    grad_q, *grad_sources = (grad.to(q.dtype) for grad in grads)
    return grad_q, None, *grad_sources


def _in_one_piece(q: Tensor, parts: Sequence[Part], *sources: Tensor) -> Tensor:
    """`attention_over_parts` with a mask of all pairs of queries and keys."""
    keys, values = torch.cat(sources[::2], dim=2), torch.cat(sources[1::2], dim=2)
    offsets = [0, *itertools.accumulate(k.shape[2] for k in sources[::2])]
    visible = torch.zeros(q.shape[2], keys.shape[2], dtype=torch.bool, device=q.device)
    for part in parts:
        for i in range(part.queries.number):
            row, column = (
                part.queries.start + i * part.queries.stride,
                part.keys.start + i * part.keys.stride + offsets[part.source],
            )
            block = visible[row : row + part.queries.length, column : column + part.keys.length]
            block |= torch.ones_like(block).tril() if part.is_causal else torch.ones_like(block)
    return sdpa(q, keys, values, visible)


_over_parts = cast(Callable[..., Tensor], Differentiable(_merge, _merge_backward, _in_one_piece))


# --- the kernels that return the log-sum-exp ----------------------------------------------------------
#
# The CPU has one for every floating type, CUDA one for half types and one for float32. The CUDA calls were checked on fake tensors
# (arguments, shapes, types), not yet run on a device.


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ/√head_dim) v, and the log-sum-exp of the scores, [batch, heads, time, 1] in float32 or better."""
    aten = torch.ops.aten
    q, k, v = with_contiguous_rows(q, k, v)
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


def attention_with_lse_backward(
    k: Tensor, v: Tensor, q: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, *, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in `attention_with_lse`; out and lse may be those of a softmax over more keys."""
    aten = torch.ops.aten
    k, v, q, out, grad_out = with_contiguous_rows(k, v, q, out, grad_out)
    lse = lse.squeeze(-1).contiguous()
    if not q.is_cuda:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad_out, q, k, v, out, lse, 0.0, is_causal)
        return grads[0], grads[1], grads[2]
    if q.dtype != torch.float32:
        # The kernel requires the random state of dropout, which is off.
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
