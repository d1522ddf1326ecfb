"""Mamba-2: a matrix state that decays by one number per head and token. With a constant decay it is retention.

Dao and Gu 2024, "Transformers are SSMs", arXiv:2405.21060; Sun et al. 2023, "Retentive Network", arXiv:2307.08621.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.kernels.decayed import DecayedAttention, decayed_rule, decayed_rule_reference
from baselines.kernels.recurrent import decay_parameters


def state_space_duality(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, *, chunk_size: int = 64) -> Tensor:
    """Decaying linear attention: S_t = α_t S_{t-1} + k_t v_tᵀ,  o_t = S_tᵀ q_t, with α_t a number per head.

    This is arXiv:2405.21060, eq. 1 and 16, with C = q, B = k and x = v, and arXiv:2307.08621, eq. 3, if α is constant.

    Args:
        q: [batch, heads, time, head_dim].
        k, v: [batch, kv_heads, time, head_dim], kv_heads a divisor of heads; v may have another head_dim.
        log_alpha: [batch, kv_heads, time], at most 0. −∞ forgets the state.
        chunk_size: tokens computed together, rounded up to a power of two; changes the speed, not the result.

    Returns:
        [batch, heads, time, head_dim of v] in the dtype of q; sums accumulate in float32 or better. Costs
        O(n·(chunk_size + head_dim)·head_dim) per head; holds no n×n tensor.

    Raises:
        ValueError: if the shapes do not fit, or chunk_size is not a positive integer.
    """
    return decayed_rule(q, k, v, log_alpha.unsqueeze(3), chunk_size=chunk_size)[0]


def state_space_duality_reference(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor) -> Tensor:
    """The recurrence of `state_space_duality`, token by token, in float64."""
    return decayed_rule_reference(q, k, v, log_alpha.unsqueeze(3))


class Mamba2Attention(DecayedAttention):
    """Mamba-2 layer: `state_space_duality` with q, k and v through SiLU, or, with decay="constant", the retention of RetNet.

    decay="input": per key head Δ_t = softplus(u·x_t + b), log α_t = −exp(a) Δ_t, and v_t is multiplied by Δ_t; a and b are learned.
    decay="constant": α = 1 − 2^(−5−h) for key head h; q, k and v are the projections themselves.
    In both, q is divided by √head_dim. The papers' short convolutions, skip connection, output gate and norm are left out, so that
    all attentions share one decoder.

    Args:
        hidden_dim, num_heads, num_kv_heads, rotary, chunk_size, impl: as in `DecayedAttention`.
        decay: "input" or "constant".

    Raises:
        ValueError: if decay is neither.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        *,
        chunk_size: int = 64,
        decay: Literal["input", "constant"] = "input",
        num_kv_heads: int | None = None,
        rotary: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__(hidden_dim, num_heads, chunk_size=chunk_size, num_kv_heads=num_kv_heads, rotary=rotary, impl=impl)
        if decay not in ("input", "constant"):
            raise ValueError(f"decay must be input or constant, got {decay!r}")
        self.decay = decay
        if decay == "constant":
            return
        self.step_proj = nn.Linear(hidden_dim, self.num_kv_heads, bias=False)
        self.log_rate, self.step_bias = decay_parameters(self.num_kv_heads, self.num_kv_heads)

    def project_heads(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project_heads(hidden_states)
        return (q, k, v) if self.decay == "constant" else (F.silu(q), F.silu(k), F.silu(v))

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        q, k, v = super().project(hidden_states, start)
        q = q / math.sqrt(self.head_dim)
        if self.decay == "constant":
            head = torch.arange(self.num_kv_heads, device=k.device, dtype=torch.promote_types(k.dtype, torch.float32))
            log_alpha = torch.log1p(-(2.0 ** (-5 - head))).to(k.dtype)
            return q, k, v, log_alpha[None, :, None, None].expand(*k.shape[:3], 1)
        delta = F.softplus(self.step_proj(hidden_states) + self.step_bias).mT.unsqueeze(3)
        return q, k, delta * v, -self.log_rate.exp()[:, None, None] * delta
