"""Gated linear attention: a matrix state of which every key channel decays by a number of its own.

Yang et al. 2023, "Gated Linear Attention Transformers with Hardware-Efficient Training", arXiv:2312.06635.
"""

import math
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from baselines.kernels.decayed import DecayedAttention, decayed_rule, decayed_rule_reference
from bsbr.interface import split_heads

GATE_RANK = 16
"""Inner width of the projection to the gates."""

GATE_TEMPERATURE = 16
"""α is the sigmoid's root of this degree, so that states are kept for long: arXiv:2312.06635, sec. 4.4."""


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, *, chunk_size: int = 64) -> Tensor:
    """Gated linear attention: S_t = Diag(α_t) S_{t-1} + k_t v_tᵀ,  o_t = S_tᵀ q_t  (arXiv:2312.06635, eq. 3).

    Args:
        q: [batch, heads, time, head_dim].
        k, v: [batch, kv_heads, time, head_dim], kv_heads a divisor of heads; v may have another head_dim.
        log_alpha: shaped as k, at most 0. −∞ forgets the channel.
        chunk_size: tokens computed together, rounded up to a power of two; changes the speed, not the result.

    Returns:
        [batch, heads, time, head_dim of v] in the dtype of q; sums accumulate in float32 or better. Costs
        O(n·(chunk_size + head_dim)·head_dim) per head; holds no n×n tensor.

    Raises:
        ValueError: if the shapes do not fit, or chunk_size is not a positive integer.
    """
    return decayed_rule(q, k, v, log_alpha, chunk_size=chunk_size)[0]


def gated_linear_attention_reference(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor) -> Tensor:
    """The recurrence of `gated_linear_attention`, token by token, in float64."""
    return decayed_rule_reference(q, k, v, log_alpha)


class GatedLinearAttention(DecayedAttention):
    """Gated linear attention layer: `gated_linear_attention` with α_t = σ(W₂ W₁ x_t + b)^(1/16) and q divided by √head_dim.

    The paper's output gate and norm are left out, so that all attentions share one decoder. Keys are as wide as values here.

    Args:
        hidden_dim, num_heads, num_kv_heads, rotary, chunk_size, impl: as in `DecayedAttention`.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        *,
        chunk_size: int = 64,
        num_kv_heads: int | None = None,
        rotary: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__(hidden_dim, num_heads, chunk_size=chunk_size, num_kv_heads=num_kv_heads, rotary=rotary, impl=impl)
        width = self.num_kv_heads * self.head_dim
        self.decay_proj = nn.Sequential(nn.Linear(hidden_dim, GATE_RANK, bias=False), nn.Linear(GATE_RANK, width))

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        q, k, v = super().project(hidden_states, start)
        log_alpha = F.logsigmoid(cast(Tensor, self.decay_proj(hidden_states))) / GATE_TEMPERATURE
        return q / math.sqrt(self.head_dim), k, v, split_heads(log_alpha, self.num_kv_heads)
