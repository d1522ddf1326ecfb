"""Causal softmax attention (Vaswani 2017): the fused kernel that everybody has."""

import math
import warnings
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bsbr.interface import MultiHeadAttention, check_heads

BACKENDS = {
    "auto": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""The kernels behind torch's scaled_dot_product_attention; auto is torch's own choice."""


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0, backend: str | None = "auto") -> Tensor:
    """softmax(q kᵀ/√head_dim + causal) v.   Vaswani 2017, arXiv:1706.03762, eq. 1.

    q: [batch, heads, m, head_dim]; k, v: [batch, kv_heads, n, head_dim], m <= n, kv_heads a divisor of heads;
    the rows of q are the last m positions. dropout_p acts on the weights. Returns [batch, heads, m, head_dim].
    Cost O(m·n·head_dim). With m = n or m = 1 no m×n tensor; with others, one mask for all heads unless the device has a
    kernel for it (CUDA has). On the CPU, torch has no fused kernel with dropout, and there dropout costs m×n a head.
    backend: one of BACKENDS; None is auto. Raises ValueError if the shapes of q, k and v do not fit, NotImplementedError
    where the backend has no kernel for them.
    """
    check_heads(q, k, v)
    m, n = q.shape[2], k.shape[2]
    mask = mask_of_last(m, n)
    grouped = q.shape[1] != k.shape[1]
    attend = partial(F.scaled_dot_product_attention, q, k, v, mask, dropout_p, is_causal=m == n > 1, enable_gqa=grouped)
    kernel = BACKENDS[checked_backend(backend)]
    if kernel is None:
        return attend()
    what = f"{q.dtype} tensors of head_dim {q.shape[-1]} on {q.device.type}"
    refused = f"backend={backend} has no kernel for {what}: use backend=auto, or a device that has one, such as CUDA"
    # On a CPU torch takes these names, and goes on with another kernel.
    if q.device.type == "cpu" and backend in ("cudnn", "efficient"):
        raise NotImplementedError(refused)
    try:
        # torch warns of every reason why it refuses.
        with sdpa_kernel(kernel), warnings.catch_warnings(action="ignore"):
            return attend()
    except RuntimeError as error:
        if "No available kernel" not in str(error) and "No viable backend" not in str(error):
            raise
        raise NotImplementedError(refused) from error


def mask_of_last(m: int, n: int) -> Tensor | None:
    """What the last m of n positions see, where is_causal, which aligns the first ones of both, does not say it.

    None where it does, and for a single query at the end, which sees everything and needs neither.
    """
    if not 1 < m < n:
        return None
    from torch.nn.attention.bias import causal_lower_right  # not before: it loads torch's compiler, which takes seconds

    return causal_lower_right(m, n)


def checked_backend(backend: str | None) -> str:
    """The name of a backend. Raises ValueError unless it is one of BACKENDS or None, which is auto."""
    name = "auto" if backend is None else backend
    if name not in BACKENDS:
        raise ValueError(f"backend must be null or one of {', '.join(BACKENDS)}, got {backend!r}")
    return name


def softmax_attention_over_pages(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *, scale: float | None = None
) -> Tensor:
    """softmax(q [k_1 … k_p]ᵀ·scale) [v_1 … v_p] of one query that sees all keys, which are read where they lie.

    o = Σ_i exp(L_i) o_i / Σ_i exp(L_i), with o_i the attention to page i and L_i the log of its sum of exponentials: what
    the parts of one softmax say is weighed as in ring attention (Liu 2023, arXiv:2310.01889). scale is 1/√head_dim unless said.
    q: [batch, heads, 1, head_dim]; k_i, v_i: [batch, kv_heads, any time, head_dim]. Returns the shape of q. On CUDA and
    where a gradient is asked for the pages are joined: there is no kernel of torch that does better or is differentiable.
    """
    grouped = q.shape[1] != keys[0].shape[1]
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, *keys, *values))
    if len(keys) == 1 or q.device.type != "cpu" or wants_gradient:
        k, v = (pages[0] if len(pages) == 1 else torch.cat(list(pages), dim=2) for pages in (keys, values))
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    outputs, logs = zip(*(kernel(q, k, v, scale=scale) for k, v in zip(keys, values, strict=True)), strict=True)
    weights = torch.cat(logs, dim=2).softmax(dim=2).unsqueeze(3)
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
    """softmax(q kᵀ/√d + causal) v for every head: `softmax_attention` between projections.

    backend: which of torch's kernels runs, one of BACKENDS; where that one cannot, NotImplementedError says so.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        rotary: bool = False,
        dropout: float = 0.0,
        backend: str | None = "auto",
    ) -> None:
        super().__init__(hidden_dim, num_heads, num_kv_heads=num_kv_heads, rotary=rotary, dropout=dropout)
        self.backend = checked_backend(backend)

    def implementation(self, *_: Tensor) -> str:
        return self.backend

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        return softmax_attention(q, k, v, dropout_p=self.dropout_p, backend=self.backend)

    def attend_pages(self, q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        if q.shape[2] > 1 or self.dropout_p or self.backend != "auto":
            return super().attend_pages(q, keys, values)
        return softmax_attention_over_pages(q, keys, values)

    def reference(self, *tensors: Tensor) -> Tensor:
        return softmax_attention_reference(*tensors)

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        pairs = seq_len * (seq_len + 1) // 2
        return 4 * batch_size * self.num_heads * self.head_dim * pairs
