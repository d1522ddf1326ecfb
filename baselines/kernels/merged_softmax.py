"""Softmax attention computed in parts: a fused kernel per part of the keys, and a merge by the parts' log-sum-exp.

`sparse` builds its pattern from such parts; `ring` uses the kernels for shards of other ranks. Torch's public
scaled_dot_product_attention does not return the log-sum-exp, so this module calls the private kernels behind it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Segments(NamedTuple):
    """`number` segments of `length` positions each; segment i begins at start + i · stride."""

    start: int
    length: int
    stride: int = 1
    number: int = 1

    def view(self, x: Tensor) -> Tensor:
        """[batch, heads, time, dim] -> [batch, number, heads, length, dim], a view."""
        stop = self.start + (self.number - 1) * self.stride + self.length
        return x[:, :, self.start : stop].unfold(2, self.length, self.stride).permute(0, 2, 1, 4, 3)


class Part(NamedTuple):
    """Segment i of the queries attends to segment i of one source's keys: to all keys, or causally if both are equally long."""

    queries: Segments
    keys: Segments
    source: int
    is_causal: bool = False


def attention_over_parts(q: Tensor, sources: Sequence[tuple[Tensor, Tensor]], parts: Sequence[Part]) -> Tensor:
    """Softmax over the union of keys: o_i = Σ_p exp(L_ip) o_ip / Σ_p exp(L_ip).

    o_ip is the attention of query i in part p, and L_ip its log-sum-exp. The gradient is exact: from the merged o and L, the
    backward kernel computes each part's share, as in ring attention (Liu 2023, arXiv:2310.01889). Differentiable once.

    Args:
        q: [batch, heads, time, head_dim].
        sources: pairs of keys and values, [batch, kv_heads, any time, head_dim] each.
        parts: which queries attend to which keys. Each query is in at least one part, and no pair is in two parts.

    Returns:
        [batch, heads, time, head_dim].

    Raises:
        ValueError: if no kernel on this device returns the log-sum-exp for such tensors.
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
            segments = (part.queries.view(q), part.keys.view(k), part.keys.view(v))
            out, out_lse = attention_with_lse(*(x.flatten(0, 1) for x in segments), is_causal=part.is_causal)
            merged_segments, lse_segments = part.queries.view(merged), part.queries.view(lse)
            out, out_lse = out.reshape(merged_segments.shape), out_lse.reshape(lse_segments.shape)
            merged_segments.lerp_(out.to(merged.dtype), torch.sigmoid(out_lse - lse_segments))
            lse_segments.copy_(torch.logaddexp(lse_segments, out_lse))
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
            first = 2 * part.source
            keys = [part.keys.view(x).flatten(0, 1) for x in sources[first : first + 2]]
            queries = [part.queries.view(x).flatten(0, 1) for x in (q, out, lse, grad_out)]
            shares = attention_with_lse_backward(*keys, *queries, is_causal=part.is_causal)
            totals = (part.queries.view(grads[0]), part.keys.view(grads[first + 1]), part.keys.view(grads[first + 2]))
            for total, share in zip(totals, shares, strict=True):
                total += share.reshape(total.shape)
        grad_q, *grad_sources = (grad.to(q.dtype) for grad in grads)
        return grad_q, None, *grad_sources


# --- the kernels that return the log-sum-exp ----------------------------------------------------------
#
# The CPU has one for every floating type, CUDA one for half types and one for float32. The CUDA calls were checked on fake tensors
# (arguments, shapes, types), not yet run on a device.


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ/√head_dim) v, and the log-sum-exp of the scores, [batch, heads, time, 1] in float32 or better."""
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


def attention_with_lse_backward(
    k: Tensor, v: Tensor, q: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, *, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in `attention_with_lse`; out and lse may be those of a softmax over more keys."""
    aten = torch.ops.aten
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
