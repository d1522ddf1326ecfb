"""Standard attention: causal softmax attention by torch's fused kernels.

Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762.
"""

import math
import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bsbr.backends.sdpa import sdpa, with_contiguous_rows
from bsbr.backends.selection import check_impl, is_transformed
from bsbr.interface import MultiHeadAttention, check_heads

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Kernels behind torch's scaled_dot_product_attention, by name."""


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0, impl: str = "auto") -> Tensor:
    """Causal softmax attention: softmax(q kᵀ/√head_dim + causal) v  (arXiv:1706.03762, eq. 1).

    Args:
        q: [batch, heads, m, head_dim]; its rows are the last m positions.
        k, v: [batch, kv_heads, n, head_dim], m <= n, kv_heads a divisor of heads.
        dropout_p: dropout probability of the weights. On a CPU no fused kernel has dropout, which then costs m×n memory per head.
        impl: "torch" or "auto" for the kernel that torch chooses, or one of `KERNELS`.

    Returns:
        [batch, heads, m, head_dim]. Costs O(m·n·head_dim) per head. If 1 < m < n, a CPU holds one m×n mask for all heads; otherwise
        there is no m×n tensor.

    Raises:
        ValueError: if the shapes do not fit, or `impl` is unknown.
        NotImplementedError: if that kernel does not support these tensors.
    """
    check_heads(q, k, v)
    m, n = q.shape[2], k.shape[2]
    mask = suffix_mask(m, n)
    attend = partial(sdpa, q, k, v, mask, dropout_p, is_causal=m == n > 1)
    if check_impl(impl, *KERNELS) in ("auto", "torch"):
        return attend()
    tensors = f"{q.dtype} tensors of head_dim {q.shape[-1]} on {q.device.type}"
    refusal = f"impl={impl} has no kernel for {tensors}: use impl=torch, or a device that has one, such as CUDA"
    # On a CPU torch accepts these names and then runs another kernel.
    if q.device.type == "cpu" and impl in ("cudnn", "efficient"):
        raise NotImplementedError(refusal)
    try:
        # Torch warns with every reason why it rejects a kernel.
        with sdpa_kernel(KERNELS[impl]), warnings.catch_warnings(action="ignore"):
            return attend()
    except RuntimeError as error:
        if "No available kernel" not in str(error) and "No viable backend" not in str(error):
            raise
        raise NotImplementedError(refusal) from error


def suffix_mask(m: int, n: int) -> Tensor | None:
    """Causal mask for queries at the last m of n positions; torch's `is_causal` is for queries at the first m.

    Returns:
        The mask; None if m = n, where is_causal is right, or m = 1, where the query sees all keys.
    """
    if not 1 < m < n:
        return None
    from torch.nn.attention.bias import causal_lower_right  # imported late: it loads torch's compiler, which takes seconds

    return causal_lower_right(m, n)


def softmax_attention_over_pages(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *, scale: float | None = None
) -> Tensor:
    """Softmax attention of one query that sees all keys, read page by page: softmax(q [k_1 … k_p]ᵀ·scale) [v_1 … v_p].

    o = Σ_i exp(L_i) o_i / Σ_i exp(L_i), where o_i is the attention to page i and L_i its log-sum-exp, as in ring attention
    (Liu 2023, arXiv:2310.01889). On CUDA, or if a gradient is required, or if values have another
    head_dim, the pages are concatenated.

    Args:
        q: [batch, heads, 1, head_dim].
        keys, values: pages, [batch, kv_heads, any time, head_dim] each.
        scale: factor on the scores; None for 1/√head_dim.

    Returns:
        [batch, heads, 1, head_dim].
    """
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, *keys, *values))
    one_size = all(k.shape[-1] == v.shape[-1] for k, v in zip(keys, values, strict=True))  # the kernel takes no other
    if len(keys) == 1 or q.device.type != "cpu" or wants_gradient or is_transformed() or not one_size:
        k, v = (pages[0] if len(pages) == 1 else torch.cat(list(pages), dim=2) for pages in (keys, values))
        return sdpa(q, k, v, scale=scale)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    parts = [with_contiguous_rows(q, k, v) for k, v in zip(keys, values, strict=True)]
    outputs, lses = zip(*(kernel(*part, scale=scale) for part in parts), strict=True)
    weights = torch.cat(lses, dim=2).softmax(dim=2).unsqueeze(3)
    return (weights * torch.cat(outputs, dim=2)).sum(dim=2, keepdim=True).to(q.dtype)


def softmax_attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`softmax_attention` in float64 with the m×n scores written out."""
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    m, n = q.shape[2], k.shape[2]
    query = torch.arange(n - m, n, device=q.device)[:, None]
    key = torch.arange(n, device=q.device)[None, :]
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(key > query, -torch.inf).softmax(dim=-1) @ v


class StandardAttention(MultiHeadAttention):
    """Standard attention layer: `softmax_attention` between projections.

    Args:
        hidden_dim, num_heads, num_kv_heads, rotary, dropout: as in `MultiHeadAttention`.
        impl: as in `softmax_attention`. A call that the kernel does not support raises NotImplementedError.

    Raises:
        ValueError: if an option is out of range.
    """

    explicit_backends = tuple(KERNELS)

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        return softmax_attention(q, k, v, dropout_p=self.dropout_p, impl=self.impl)

    def attend_pages(self, q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        if q.shape[2] > 1 or self.dropout_p or self.impl in KERNELS:
            return super().attend_pages(q, keys, values)
        return softmax_attention_over_pages(q, keys, values)

    def reference(self, *tensors: Tensor) -> Tensor:
        return softmax_attention_reference(*tensors)

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        """FLOPs: 4·head_dim per head and causal pair."""
        pairs = seq_len * (seq_len + 1) // 2
        return 4 * batch_size * self.num_heads * self.head_dim * pairs
