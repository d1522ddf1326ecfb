"""Modern Hopfield network: queries move towards stored keys before the read-out.

Ramsauer et al. 2021, "Hopfield Networks is All You Need", arXiv:2008.02217.
"""

import torch
from torch import Tensor

from baselines.standard import softmax_attention_over_pages, suffix_mask
from bsbr.backends.sdpa import sdpa
from bsbr.interface import MultiHeadAttention, check_heads, require_positive


def hopfield_attention(
    q: Tensor, k: Tensor, v: Tensor, *, beta: float | None = None, num_steps: int = 1, dropout_p: float = 0.0
) -> Tensor:
    """Hopfield attention: ξ = q; num_steps − 1 times ξ ← softmax(β ξ kᵀ + causal) k; output softmax(β ξ kᵀ + causal) v.

    This is arXiv:2008.02217, eq. 3 and 10. With num_steps = 1 and the default β it is softmax attention.

    Args:
        q: [batch, heads, m, head_dim]; its rows are the last m positions.
        k, v: [batch, kv_heads, n, head_dim], m <= n, kv_heads a divisor of heads.
        beta: inverse temperature; None for 1/√head_dim.
        num_steps: number of softmax attentions in sequence, the last of which is the read-out of v.
        dropout_p: dropout probability of the weights of the read-out.

    Returns:
        [batch, heads, m, head_dim]. Costs O(num_steps·m·n·head_dim) per head; memory as `softmax_attention`.

    Raises:
        ValueError: if the shapes do not fit, num_steps < 1 or beta <= 0.
    """
    check_options(beta, num_steps)
    check_heads(q, k, v)
    m, n = q.shape[2], k.shape[2]
    mask = suffix_mask(m, n)

    def retrieve(state: Tensor, patterns: Tensor, dropout_p: float) -> Tensor:
        return sdpa(state, k, patterns, mask, dropout_p, is_causal=m == n > 1, scale=beta)

    state = q
    for _ in range(num_steps - 1):
        state = retrieve(state, k, 0.0)
    return retrieve(state, v, dropout_p)


def hopfield_attention_reference(q: Tensor, k: Tensor, v: Tensor, *, beta: float | None = None, num_steps: int = 1) -> Tensor:
    """`hopfield_attention` in float64, query by query over the keys up to its position."""
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    inverse_temperature = q.shape[-1] ** -0.5 if beta is None else beta
    m, n = q.shape[2], k.shape[2]
    outputs = []
    for row in range(m):
        past = n - m + row + 1
        stored, values = k[:, :, :past], v[:, :, :past]
        state = q[:, :, row]
        for step in range(num_steps):
            weights = torch.einsum("bhd,bhtd->bht", inverse_temperature * state, stored).softmax(dim=-1)
            state = torch.einsum("bht,bhtd->bhd", weights, values if step == num_steps - 1 else stored)
        outputs.append(state)
    return torch.stack(outputs, dim=2)


def check_options(beta: float | None, num_steps: int) -> None:
    """Raises ValueError unless num_steps is a positive integer and beta is positive or None."""
    require_positive(num_steps=num_steps)
    if beta is not None and not beta > 0:
        raise ValueError(f"beta must be above 0, or None for 1/sqrt(head_dim), got {beta!r}")


class HopfieldAttention(MultiHeadAttention):
    """Hopfield layer: `hopfield_attention` between projections.

    Args:
        hidden_dim, num_heads, num_kv_heads, rotary, dropout: as in `MultiHeadAttention`.
        beta, num_steps: as in `hopfield_attention`.
        impl: see `Attention`.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        *,
        beta: float | None = None,
        num_steps: int = 2,
        num_kv_heads: int | None = None,
        rotary: bool = False,
        dropout: float = 0.0,
        impl: str = "auto",
    ) -> None:
        check_options(beta, num_steps)
        super().__init__(hidden_dim, num_heads, num_kv_heads=num_kv_heads, rotary=rotary, dropout=dropout, impl=impl)
        self.beta = beta
        self.num_steps = num_steps

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        return hopfield_attention(q, k, v, beta=self.beta, num_steps=self.num_steps, dropout_p=self.dropout_p)

    def attend_pages(self, q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        if q.shape[2] > 1 or self.dropout_p:
            return super().attend_pages(q, keys, values)
        for _ in range(self.num_steps - 1):
            q = softmax_attention_over_pages(q, keys, keys, scale=self.beta)
        return softmax_attention_over_pages(q, keys, values, scale=self.beta)

    def reference(self, *tensors: Tensor) -> Tensor:
        q, k, v = tensors
        return hopfield_attention_reference(q, k, v, beta=self.beta, num_steps=self.num_steps)

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        """FLOPs: 4·head_dim per head, step and causal pair."""
        pairs = seq_len * (seq_len + 1) // 2
        return 4 * batch_size * self.num_heads * self.head_dim * pairs * self.num_steps
