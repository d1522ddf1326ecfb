"""Softmax attention by torch's fused kernels, with derivatives of every order and kind."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bsbr.backends.selection import is_transformed


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(q kᵀ·scale + mask) v: torch's `scaled_dot_product_attention`, with grouped heads.

    The fused kernels have a first derivative only. The gradients of a graph that is to be differentiated again (create_graph=True)
    are computed by torch operations that hold all m×n scores; under torch.func, torch.vmap and forward-mode differentiation, so is
    the value.

    Args:
        q: [batch, heads, m, head_dim].
        k, v: [batch, kv_heads, n, head_dim], kv_heads a divisor of heads.
        mask: True where a query attends to a key, broadcast to [batch, heads, m, n]; not differentiated.
        dropout_p: dropout probability of the weights. With dropout, a second derivative exists only where torch has one.
        is_causal: whether query i attends to keys 0 … i.
        scale: factor on the scores; None for 1/√head_dim.

    Returns:
        [batch, heads, m, head_dim of v].
    """
    options: dict[str, Any] = {
        "attn_mask": mask,
        "dropout_p": dropout_p,
        "is_causal": bool(is_causal),  # not of a symbolic size, which torch.compile may bring
        "scale": scale,
        "enable_gqa": bool(q.shape[1] != k.shape[1]),
    }
    if is_transformed():
        return _by_operations(q, k, v, options)
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not wants_gradient or dropout_p or torch.compiler.is_compiling():  # compiled code has no second derivatives
        return F.scaled_dot_product_attention(q, k, v, **options)
    out: Tensor = _Fused.apply(options, q, k, v)  # type: ignore[no-untyped-call]
    return out


def with_contiguous_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors; those without contiguous rows copied. Torch's private kernels behind sdpa do not look at the last stride."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _by_operations(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, **options)


class _Fused(torch.autograd.Function):
    """A fused kernel whose gradients are differentiable."""

    @staticmethod
    def forward(ctx: Any, options: dict[str, Any], *tensors: Tensor) -> Tensor:
        ctx.options = options
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():  # torch keeps what the kernel's first derivative needs
            ctx.leaves = [x.detach().requires_grad_(x.requires_grad) for x in tensors]
            ctx.out = F.scaled_dot_product_attention(*ctx.leaves, **options)
        out: Tensor = ctx.out.detach()
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # create_graph=True
        if again:
            # Each tensor is a new node of the graph, so that one that was computed from another counts for itself only.
            tensors = [x.view_as(x) for x in ctx.saved_tensors]
            q, k, v = tensors
            out = _by_operations(q, k, v, ctx.options)
        else:
            tensors, out = ctx.leaves, ctx.out
        wanted = [x for x in tensors if x.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, gradient, retain_graph=True, create_graph=again))
        return None, *(next(found) if x.requires_grad else None for x in tensors)
