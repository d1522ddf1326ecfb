"""DeltaNet: linear attention with the delta rule, which replaces the value stored under a key instead of adding to it.

Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", arXiv:2406.06484.
"""

from functools import partial

import torch
from torch import Tensor, nn

from baselines.kernels import delta_rule as kernel
from baselines.kernels import fla
from baselines.kernels.chunkwise_delta_rule import chunkwise_delta_rule
from baselines.kernels.recurrent import RecurrentAttention
from baselines.kernels.unit_silu import unit_silu
from bsbr.backends.selection import check_impl, select
from bsbr.precision import without_autocast


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, chunk_size: int = 64, impl: str = "auto") -> Tensor:
    """Delta rule: S_t = S_{t-1} + β_t k_t (v_t − S_{t-1}ᵀ k_t)ᵀ,  o_t = S_tᵀ q_t  (arXiv:2406.06484, eq. 5).

    Args:
        q: [batch, heads, time, head_dim].
        k, v: [batch, kv_heads, time, head_dim], kv_heads a divisor of heads; k of at most unit norm, since with longer keys
            the recurrence may diverge.
        beta: [batch, kv_heads, time], in [0, 1]: the write strength.
        chunk_size: tokens solved together, at most; changes the speed, not the result.
        impl: "cpp", "torch", or "auto" for C++ where it supports the tensors.

    Returns:
        [batch, heads, time, head_dim] in the dtype of q; sums accumulate in float32 or better. Costs
        O(n·(chunk_size + head_dim)·head_dim) per head; holds no n×n tensor.

    Raises:
        ValueError: if the shapes do not fit, chunk_size is not a positive integer, or impl is unknown.
        NotImplementedError: if impl="cpp" does not support the tensors.
    """
    backend = select(check_impl(impl, "cpp"), {"cpp": partial(kernel.KERNELS.unsupported, q, k, v, beta)})
    return _RULE(backend, chunk_size, None, q, k, v, beta)[0]


def delta_rule_reference(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """The recurrence of `delta_rule`, token by token, in float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v, beta = q.double(), *(x.double().repeat_interleave(group, dim=1) for x in (k, v, beta))
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[2]):
        recalled = torch.einsum("bhde,bhd->bhe", state, k[:, :, t])
        correction = beta[:, :, t, None] * (v[:, :, t] - recalled)
        state = state + torch.einsum("bhd,bhe->bhde", k[:, :, t], correction)
        outputs.append(torch.einsum("bhde,bhd->bhe", state, q[:, :, t]))
    return torch.stack(outputs, dim=2)


_RULE = kernel.DeltaRule(chunkwise_delta_rule)


class DeltaNetAttention(RecurrentAttention):
    """DeltaNet layer: `delta_rule` with q and k through SiLU and scaled to unit norm, and β_t = σ(w·x_t) per key head.

    This is the paper's layer without its short convolutions and its norm before out_proj, so that all attentions share one decoder.
    rotary=True rotates q and k after they are scaled to unit norm, which does not change their norm.

    Args:
        hidden_dim, num_heads, num_kv_heads, rotary, chunk_size, impl: as in `RecurrentAttention`.
    """

    backends = ("cpp",)

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
        self.beta_proj = nn.Linear(hidden_dim, self.num_kv_heads, bias=False)

    def unsupported(self, backend: str, *tensors: Tensor) -> str | None:
        return kernel.KERNELS.unsupported(*tensors) if backend == "cpp" else None

    def project_heads(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project_heads(hidden_states)
        return unit_silu(q, self.impl), unit_silu(k, self.impl), v

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        q, k, v = super().project(hidden_states, start)
        return q, k, v, self.beta_proj(hidden_states).sigmoid().transpose(1, 2)

    def attend_after(self, total: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        backend = self.select_backend(*tensors)
        if backend == "fla":
            q, k, v, beta = tensors
            return fla.delta_rule(q, k, v, beta, total)
        return _RULE(backend, self.chunk_size, total, *tensors)

    @without_autocast
    def step(self, total: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, beta = tensors
        keys = k.to(total.dtype)
        correction = beta.to(total.dtype).unsqueeze(3) * (v.to(total.dtype) - keys @ total)
        total = torch.addcmul(total, keys.mT, correction)
        outputs = q.to(total.dtype).view(*k.shape[:2], q.shape[1] // k.shape[1], k.shape[3]) @ total
        return outputs.to(q.dtype).view(*q.shape[:3], v.shape[3]), total

    def reference(self, *tensors: Tensor) -> Tensor:
        return delta_rule_reference(*tensors)

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        return batch_size * kernel.flops(seq_len, self.chunk_size, self.num_heads, self.num_kv_heads, self.head_dim)
