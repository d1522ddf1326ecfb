"""Adapters to the Triton kernels of flash-linear-attention: `impl: fla` of linear, delta_net and gated_delta_net.

Yang & Zhang 2024, github.com/fla-org/flash-linear-attention, the fastest known GPU kernels for these. The kernels take
[batch, time, heads, head_dim]; the adapters take heads before time. Not yet run on a GPU.
"""

import importlib
from typing import Any

import torch
from torch import Tensor


def linear_attention(q: Tensor, k: Tensor, v: Tensor, epsilon: float, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`baselines.linear.linear_attention` of features after the state `initial`, and the final state.

    Args:
        q: φ of the queries, [batch, heads, time, head_dim].
        k: φ of the keys, [batch, kv_heads, time, head_dim].
        v: [batch, kv_heads, time, head_dim].
        epsilon: added to the normaliser.
        initial: [batch, kv_heads, head_dim, head_dim + 1], S and z as its last column; None at the start of a sequence.

    Returns:
        The output, shaped as q, and the state after the last token, shaped as `initial`.

    Raises:
        NotImplementedError: if the tensors are not on a CUDA device, or fla is not installed.
    """
    kernel, groups = _kernel("linear_attn", "chunk_linear_attn", q), q.shape[1] // k.shape[1]
    queries, keys, values = _time_first(groups, q, k, v)
    start = None if initial is None else initial.repeat_interleave(groups, dim=1)
    total = None if start is None else start[..., :-1].contiguous()
    sums, total = kernel(queries, keys, values, scale=1.0, initial_state=total, output_final_state=True, normalize=False)
    # Computed here in float32, because the kernel sums its normaliser in the dtype of k.
    normaliser = keys.float().cumsum(1)
    if start is not None:
        normaliser = normaliser + start[..., -1].unsqueeze(1)
    out = sums / ((queries.float() * normaliser).sum(-1, keepdim=True) + epsilon)
    final = torch.cat([total, normaliser[:, -1].unsqueeze(-1)], dim=-1)
    return out.transpose(1, 2).to(q.dtype), final[:, ::groups].contiguous()


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`baselines.delta_net.delta_rule` after the state `initial`, and the final state.

    Args:
        q: [batch, heads, time, head_dim].
        k, v: [batch, kv_heads, time, head_dim].
        beta: [batch, kv_heads, time].
        initial: [batch, kv_heads, head_dim, head_dim]; None at the start of a sequence.

    Returns:
        The output, shaped as q, and the state after the last token, shaped as `initial`.

    Raises:
        NotImplementedError: if the tensors are not on a CUDA device or not of a half type, or fla is not installed.
    """
    kernel, groups = _kernel("delta_rule", "chunk_delta_rule", q), q.shape[1] // k.shape[1]
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise NotImplementedError(f"impl=fla of delta_net takes bfloat16 and float16, got {q.dtype}: use impl=torch")
    start = None if initial is None else initial.repeat_interleave(groups, dim=1)
    out, final = kernel(*_time_first(groups, q, k, v, beta), scale=1.0, initial_state=start, output_final_state=True)
    return out.transpose(1, 2), final[:, ::groups].contiguous()


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`baselines.gated_delta_net.gated_delta_rule` after the state `initial`, and the final state.

    Args:
        q: [batch, heads, time, head_dim].
        k, v: [batch, kv_heads, time, head_dim].
        beta, log_alpha: [batch, kv_heads, time].
        initial: [batch, kv_heads, head_dim, head_dim]; None at the start of a sequence.

    Returns:
        The output, shaped as q, and the state after the last token, shaped as `initial`.

    Raises:
        NotImplementedError: if the tensors are not on a CUDA device, or fla is not installed.
    """
    kernel, groups = _kernel("gated_delta_rule", "chunk_gated_delta_rule", q), q.shape[1] // k.shape[1]
    start = None if initial is None else initial.repeat_interleave(groups, dim=1)
    tensors = _time_first(groups, q, k, v, log_alpha, beta)
    out, final = kernel(*tensors, scale=1.0, initial_state=start, output_final_state=True)
    return out.transpose(1, 2), final[:, ::groups].contiguous()


def _kernel(package: str, name: str, q: Tensor) -> Any:
    """Imports function `name` of fla.ops.`package`. Raises NotImplementedError if q is not on CUDA or fla is not installed."""
    if not q.is_cuda:
        raise NotImplementedError(f"impl=fla runs Triton kernels, which need CUDA, got tensors on {q.device.type}: use impl=torch")
    try:
        return getattr(importlib.import_module(f"fla.ops.{package}"), name)
    except ModuleNotFoundError as error:
        raise NotImplementedError(f"impl=fla needs the extra `fla` ({error}): pip install -e '.[fla]'") from error


def _time_first(groups: int, q: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """[batch, heads, time, …] -> [batch, time, heads, …], contiguous; all but q are repeated for the heads that share them."""
    tensors = (q, *(x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in others))
    return tuple(x.transpose(1, 2).contiguous() for x in tensors)
