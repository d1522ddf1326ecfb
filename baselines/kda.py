"""Kimi Delta Attention: the gated delta rule with a decay per key channel.

Kimi Team 2025, "Kimi Linear: An Expressive, Efficient Attention Architecture", arXiv:2510.26692.
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from baselines.kernels.decayed import DecayedAttention, decayed_rule, decayed_rule_reference
from baselines.kernels.recurrent import decay_parameters, unit_norm
from bsbr.interface import split_heads


def kimi_delta_attention(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, *, chunk_size: int = 64) -> Tensor:
    """Kimi Delta Attention: S_t = (I − β_t k_t k_tᵀ) Diag(α_t) S_{t-1} + β_t k_t v_tᵀ,  o_t = S_tᵀ q_t  (arXiv:2510.26692, eq. 1).

    Args:
        q: [batch, heads, time, head_dim].
        k, v: [batch, kv_heads, time, head_dim], kv_heads a divisor of heads; k of at most unit norm; v may have another head_dim.
        log_alpha: shaped as k, at most 0. −∞ forgets the channel.
        beta: [batch, kv_heads, time], in [0, 1]: the write strength.
        chunk_size: tokens solved together, rounded up to a power of two; changes the speed, not the result.

    Returns:
        [batch, heads, time, head_dim of v] in the dtype of q; sums accumulate in float32 or better. Costs
        O(n·(chunk_size + head_dim)·head_dim) per head; holds no n×n tensor.

    Raises:
        ValueError: if the shapes do not fit, or chunk_size is not a positive integer.
    """
    return decayed_rule(q, k, v, log_alpha, beta, chunk_size=chunk_size)[0]


def kimi_delta_attention_reference(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor) -> Tensor:
    """The recurrence of `kimi_delta_attention`, token by token, in float64."""
    return decayed_rule_reference(q, k, v, log_alpha, beta)


class KimiDeltaAttention(DecayedAttention):
    """Kimi Delta Attention layer: q and k through SiLU and scaled to unit norm, β_t = σ(w·x_t) per key head.

    log α_t = −exp(a) · softplus(W₂ W₁ x_t + b), with W₁ to head_dim numbers, a per key head and b per channel. So the layer is that
    of Gated DeltaNet with a finer decay; the paper's short convolutions, output gate and norm are left out there and here.

    Args:
        hidden_dim, num_heads, num_kv_heads, rotary, chunk_size, impl: as in `DecayedAttention`.
    """

    erases = True

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
        self.beta_proj = nn.Linear(hidden_dim, self.num_kv_heads, bias=False)
        self.decay_proj = nn.Sequential(
            nn.Linear(hidden_dim, self.head_dim, bias=False), nn.Linear(self.head_dim, width, bias=False)
        )
        self.log_rate, self.step_bias = decay_parameters(self.num_kv_heads, width)

    def project_heads(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project_heads(hidden_states)
        return unit_norm(F.silu(q)), unit_norm(F.silu(k)), v

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        q, k, v = super().project(hidden_states, start)
        steps = split_heads(F.softplus(cast(Tensor, self.decay_proj(hidden_states)) + self.step_bias), self.num_kv_heads)
        return q, k, v, -self.log_rate.exp()[:, None, None] * steps, self.beta_proj(hidden_states).sigmoid().mT
