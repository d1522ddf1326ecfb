"""Gated DeltaNet: the delta rule with a data-dependent decay of the state.

Yang et al. 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv:2412.06464.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.kernels import delta_rule as kernel
from baselines.kernels import fla, qwen3_next
from baselines.kernels.chunkwise_delta_rule import chunkwise_delta_rule
from baselines.kernels.recurrent import RecurrentAttention, decay_parameters
from baselines.kernels.unit_silu import unit_silu
from bsbr.backends.selection import check_impl, select
from bsbr.precision import without_autocast


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor, *, chunk_size: int = 64, impl: str = "auto"
) -> Tensor:
    """Gated delta rule: S_t = α_t (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ,  o_t = S_tᵀ q_t.

    This is arXiv:2412.06464, eq. 10, with S transposed.

    Args:
        q: [batch, heads, time, head_dim].
        k, v: [batch, kv_heads, time, head_dim], kv_heads a divisor of heads; k of at most unit norm.
        beta: [batch, kv_heads, time], in [0, 1]: the write strength.
        log_alpha: [batch, kv_heads, time], at most 0: the logarithm of the decay α. −∞ forgets the state.
        chunk_size: tokens solved together, at most; changes the speed, not the result.
        impl: "cpp", "torch", or "auto" for C++ where it supports the tensors.

    Returns:
        [batch, heads, time, head_dim] in the dtype of q; sums accumulate in float32 or better. In C++, a decay between two
        tokens below the smallest normal number counts as 0. Costs O(n·(chunk_size + head_dim)·head_dim) per head; holds no
        n×n tensor.

    Raises:
        ValueError: if the shapes do not fit, chunk_size is not a positive integer, or impl is unknown.
        NotImplementedError: if impl="cpp" does not support the tensors.
    """
    tensors = q, k, v, beta, log_alpha
    backend = select(check_impl(impl, "cpp"), {"cpp": partial(kernel.KERNELS.unsupported, *tensors)})
    return _RULE(backend, chunk_size, None, *tensors)[0]


def gated_delta_rule_reference(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor) -> Tensor:
    """The recurrence of `gated_delta_rule`, token by token, in float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v, beta, alpha = (
        q.double(),
        *(x.double().repeat_interleave(group, dim=1) for x in (k, v, beta)),
        log_alpha.double().clamp(min=-800).exp().repeat_interleave(group, dim=1),
    )
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[2]):
        state = alpha[:, :, t, None, None] * state
        recalled = torch.einsum("bhde,bhd->bhe", state, k[:, :, t])
        correction = beta[:, :, t, None] * (v[:, :, t] - recalled)
        state = state + torch.einsum("bhd,bhe->bhde", k[:, :, t], correction)
        outputs.append(torch.einsum("bhde,bhd->bhe", state, q[:, :, t]))
    return torch.stack(outputs, dim=2)


_RULE = kernel.DeltaRule(chunkwise_delta_rule)


class GatedDeltaNetAttention(RecurrentAttention):
    """Gated DeltaNet layer: `gated_delta_rule` with q and k through SiLU and scaled to unit norm.

    Per key head, β_t = σ(w·x_t) and log α_t = −exp(a) · softplus(u·x_t + b) with learned a and b, the gate of Mamba-2, as in the
    paper's layer. The paper's short convolutions, output gate and norm are left out, so that all attentions share one decoder.
    rotary=True rotates q and k after they are scaled to unit norm, which does not change their norm.

    Args:
        hidden_dim, num_heads, num_kv_heads, rotary, chunk_size, impl: as in `RecurrentAttention`. impl="transformers" is the
            function of `baselines.kernels.qwen3_next`.
    """

    backends = ("cpp",)
    explicit_backends = ("fla", "transformers")

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
        self.computes_in = qwen3_next.COMPUTES_IN if impl == "transformers" else None
        self.beta_proj = nn.Linear(hidden_dim, self.num_kv_heads, bias=False)
        self.decay_proj = nn.Linear(hidden_dim, self.num_kv_heads, bias=False)
        self.log_rate, self.step_bias = decay_parameters(self.num_kv_heads, self.num_kv_heads)

    def unsupported(self, backend: str, *tensors: Tensor) -> str | None:
        return kernel.KERNELS.unsupported(*tensors) if backend == "cpp" else None

    def project_heads(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project_heads(hidden_states)
        return unit_silu(q, self.impl), unit_silu(k, self.impl), v

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        q, k, v = super().project(hidden_states, start)
        beta = self.beta_proj(hidden_states).sigmoid()
        log_alpha = -self.log_rate.exp() * F.softplus(self.decay_proj(hidden_states) + self.step_bias)
        return q, k, v, beta.transpose(1, 2), log_alpha.transpose(1, 2)

    def attend_after(self, total: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        backend = self.select_backend(*tensors)
        if backend == "fla":
            q, k, v, beta, log_alpha = tensors
            return fla.gated_delta_rule(q, k, v, beta, log_alpha, total)
        if backend == "transformers":
            q, k, v, beta, log_alpha = tensors
            return qwen3_next.gated_delta_rule(q, k, v, beta, log_alpha, self.chunk_size, total)
        return _RULE(backend, self.chunk_size, total, *tensors)

    @without_autocast
    def step(self, total: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, beta, log_alpha = tensors
        keys = k.to(total.dtype)
        total = log_alpha.to(total.dtype).exp().unsqueeze(3) * total
        correction = beta.to(total.dtype).unsqueeze(3) * (v.to(total.dtype) - keys @ total)
        total = torch.addcmul(total, keys.mT, correction)
        outputs = q.to(total.dtype).view(*k.shape[:2], q.shape[1] // k.shape[1], k.shape[3]) @ total
        return outputs.to(q.dtype).view(*q.shape[:3], v.shape[3]), total

    def reference(self, *tensors: Tensor) -> Tensor:
        return gated_delta_rule_reference(*tensors)

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        """FLOPs of the matrix products: those of the delta rule, because the decays are elementwise."""
        return batch_size * kernel.flops(seq_len, self.chunk_size, self.num_heads, self.num_kv_heads, self.head_dim)
