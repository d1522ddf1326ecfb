"""Gated DeltaNet: the delta rule with a state that also decays, by as much as each token says.

Yang et al. 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv:2412.06464.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.kernels import fla
from bsbr.interface import (
    MultiHeadAttention,
    State,
    check_heads,
    check_hidden_states,
    next_position,
    position_counter,
    require_positive,
    rotate,
    split_heads,
)


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor, *, chunk_size: int = 64) -> Tensor:
    """S_t = α_t (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ,  o_t = S_tᵀ q_t.   arXiv:2412.06464, eq. 10 (its S transposed).

    q: [batch, heads, time, head_dim]; k, v: [batch, kv_heads, time, head_dim], kv_heads a divisor of heads, k of at
    most unit norm; beta: [batch, kv_heads, time] in [0, 1]; log_alpha: the same shape, at most 0. Returns the shape and
    dtype of q; sums accumulate in float32 or better. Chunkwise: O(n·(chunk_size + head_dim)·head_dim), and
    O(log(n / chunk_size)) steps one after another; no n×n tensor.
    Raises ValueError if the shapes do not fit or chunk_size is no positive integer.
    """
    return _chunked(q, k, v, beta, log_alpha, chunk_size, None)[0]


def gated_delta_rule_reference(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor) -> Tensor:
    """The recurrence of `gated_delta_rule`, one token after another, in float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v, beta, alpha = (
        q.double(),
        *(x.double().repeat_interleave(group, dim=1) for x in (k, v, beta)),
        log_alpha.double().exp().repeat_interleave(group, dim=1),
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


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor, chunk_size: int, initial: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`gated_delta_rule` after a state S [batch, kv_heads, head_dim, head_dim], and the state after it.

    From no state, and where nobody reads one because all is a single chunk, none comes back.

    Within a chunk that begins at S, let γ_i = α_1 … α_i, D_ij = γ_i / γ_j for j <= i and 0 otherwise, and
    T = (I + tril(β K Kᵀ ⊙ D, −1))⁻¹ diag(β) (the WY form with decay, section 3.3). Then the values the state is really
    given are E = T (V − γ K S), the outputs γ Q S + (Q Kᵀ ⊙ D) E, and with K̃ = the keys as decayed by the end of the
    chunk, the state behind it is γ_c S + K̃ᵀ E = A S + N with A = γ_c I − K̃ᵀ T γ K, N = K̃ᵀ T V: a map that composes,
    so that a scan finds every S at once.
    """
    check_heads(q, k, v)
    require_positive(chunk_size=chunk_size)
    time, kv_heads = k.shape[2], k.shape[1]
    if q.shape[2] != time:
        raise ValueError(
            f"q must have as many positions as k and v, got {q.shape[2]} and {time}: to go on from a prefix, use extend"
        )
    for name, x in (("beta", beta), ("log_alpha", log_alpha)):
        if x.shape != k.shape[:3]:
            raise ValueError(f"{name} must be [batch, kv_heads, time] = {list(k.shape[:3])}, got {list(x.shape)}")
    size, group = min(chunk_size, time), q.shape[1] // kv_heads
    dtype = torch.promote_types(q.dtype, torch.float32)

    keys, values = _chunks(k.to(dtype), size), _chunks(v.to(dtype), size)
    rates = _chunks(beta.to(dtype).unsqueeze(3), size)
    # The queries that share a key stand below each other, which spares copies of the keys.
    queries = _chunks(q.to(dtype), size).unflatten(1, (kv_heads, group)).transpose(2, 3)

    # Logarithms, since products of α underflow where their ratios do not; sums in float64, since their differences matter.
    log_decays = _chunks(log_alpha.double().unsqueeze(3), size).cumsum(3)
    since_start = log_decays.to(dtype).exp()
    until_end = (log_decays[..., -1:, :] - log_decays).to(dtype).exp()
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    # Masked before exp, whose gradient would be 0·∞ behind it.
    between = (log_decays - log_decays.mT).to(dtype).masked_fill(future, -torch.inf).exp()

    overlaps = (rates * (keys @ keys.mT) * between).tril(-1)
    # By substitution, as in delta_net: with alike keys the powers of the overlaps grow like binomials and cancel.
    solved: Tensor = torch.linalg.solve_triangular(overlaps, torch.diag_embed(rates.squeeze(4)), upper=False, unitriangular=True)
    starts = None if initial is None else initial.unsqueeze(2)
    if keys.shape[2] > 1:
        written = (keys * until_end).mT @ solved
        decay = torch.eye(keys.shape[4], dtype=dtype, device=q.device) * since_start[..., -1:, :]
        maps = torch.cat([decay - written @ (keys * since_start), written @ values], dim=4)
        if starts is None:
            starts = maps.new_zeros(*maps.shape[:2], 1, keys.shape[4], values.shape[4])
        starts = _scan(maps[:, :, :-1], starts)
    corrections = solved @ (values if starts is None else values - keys * since_start @ starts)
    scores = (queries.flatten(3, 4) @ keys.mT).unflatten(3, (group, size)) * between.unsqueeze(3)
    outputs = scores.flatten(3, 4) @ corrections
    final = None
    if starts is not None:
        outputs = outputs + (queries * since_start.unsqueeze(3)).flatten(3, 4) @ starts
        kept = since_start[:, :, -1, -1:] * starts[:, :, -1]
        final = kept + (keys * until_end)[:, :, -1].mT @ corrections[:, :, -1]
    outputs = outputs.unflatten(3, (group, size)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
    return outputs[:, :, :time].to(q.dtype), final


def _step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """`_chunked` for a single token, by the recurrence itself."""
    keys = k.to(total.dtype)
    total = log_alpha.to(total.dtype).exp().unsqueeze(3) * total
    correction = beta.to(total.dtype).unsqueeze(3) * (v.to(total.dtype) - keys @ total)
    total = torch.addcmul(total, keys.mT, correction)
    outputs = q.to(total.dtype).view(*k.shape[:2], -1, k.shape[3]) @ total
    return outputs.to(q.dtype).view(*q.shape[:3], v.shape[3]), total


def _scan(maps: Tensor, first: Tensor) -> Tensor:
    """S_0 = first, S_{i+1} = A_i S_i + N_i: all of S_0 … S_m from m maps [A | N], in O(log m) steps and O(m) work.

    Two maps in a row are one: A₂ [A₁ | N₁] + [0 | N₂]. So halve them, find every second state, and take one step from
    each of those (Blelloch 1990). maps: [batch, heads, m, d, d + e]; first: [batch, heads, 1, d, e].
    """
    if maps.shape[2] == 0:
        return first
    dim = maps.shape[3]
    early, late = maps[:, :, 0::2], maps[:, :, 1::2]
    paired = late[..., :dim] @ early[:, :, : late.shape[2]] + F.pad(late[..., dim:], (dim, 0))
    evens = _scan(paired, first)
    steps = early.shape[2]
    from_states = evens[:, :, :steps]
    odds = early[..., :dim] @ from_states + early[..., dim:]
    states = torch.stack([from_states, odds], dim=3).flatten(2, 3)
    return torch.cat([states, evens[:, :, steps:]], dim=2)


def _chunks(x: Tensor, size: int) -> Tensor:
    """[batch, heads, time, dim] -> [batch, heads, chunks, size, dim], contiguous, zeros behind the last token."""
    missing = -x.shape[2] % size
    padded = F.pad(x, (0, 0, 0, missing)) if missing else x
    return padded.reshape(*x.shape[:2], -1, size, x.shape[3]).contiguous()


class GatedDeltaNetAttention(MultiHeadAttention):
    """`gated_delta_rule` with projections: q and k go through SiLU and are scaled to unit norm, β_t = σ(w·x_t) and
    log α_t = −exp(a) · softplus(u·x_t + b) per key head, a and b learned (the gate of Mamba-2, as in the paper's layer).

    Without the paper's short convolutions, output gate and norm: those belong to the decoder, the same for every
    attention. The state is S, whatever the context: decoding costs O(head_dim²) a token. rotary=True turns q and k once
    they have unit norm, which keeps it. impl: "torch", or "fla" for the kernel of flash-linear-attention, which needs CUDA; a
    single token is few enough operations to need none.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        *,
        chunk_size: int = 64,
        num_kv_heads: int | None = None,
        rotary: bool = False,
        impl: str = "torch",
    ) -> None:
        super().__init__(hidden_dim, num_heads, num_kv_heads=num_kv_heads, rotary=rotary)
        require_positive(chunk_size=chunk_size)
        self.chunk_size = chunk_size
        self.impl = fla.checked(impl)
        self.beta_proj = nn.Linear(hidden_dim, self.num_kv_heads, bias=False)
        self.decay_proj = nn.Linear(hidden_dim, self.num_kv_heads, bias=False)
        # As Mamba-2 begins (arXiv:2405.21060): rates of 1 … 16, and steps of 0.001 … 0.1, log-uniform, behind softplus.
        steps = torch.empty(self.num_kv_heads).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.log_rate = nn.Parameter(torch.empty(self.num_kv_heads).uniform_(1, 16).log())
        self.step_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))

    @property
    def block_length(self) -> int:
        return self.chunk_size

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        q = _unit(F.silu(split_heads(self.q_proj(hidden_states), self.num_heads)))
        k = _unit(F.silu(split_heads(self.k_proj(hidden_states), self.num_kv_heads)))
        v = split_heads(self.v_proj(hidden_states), self.num_kv_heads)
        if self.rotary:
            q, k = rotate(q, start), rotate(k, start)
        beta = self.beta_proj(hidden_states).sigmoid()
        log_alpha = -self.log_rate.exp() * F.softplus(self.decay_proj(hidden_states) + self.step_bias)
        return q, k, v, beta.transpose(1, 2), log_alpha.transpose(1, 2)

    def implementation(self, *_: Tensor) -> str:
        return self.impl

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v, beta, log_alpha = tensors
        if self.impl == "fla":
            return fla.gated_delta_rule(q, k, v, beta, log_alpha)[0]
        return gated_delta_rule(q, k, v, beta, log_alpha, chunk_size=self.chunk_size)

    def reference(self, *tensors: Tensor) -> Tensor:
        return gated_delta_rule_reference(*tensors)

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        check_hidden_states(hidden_states, self.hidden_dim)
        position = next_position(state)
        q, k, v, beta, log_alpha = self.project(hidden_states, position)
        if state is None:
            dtype = torch.promote_types(q.dtype, torch.float32)
            total = q.new_zeros(q.shape[0], self.num_kv_heads, self.head_dim, self.head_dim, dtype=dtype)
        else:
            total = state["total"]
        final: Tensor | None
        if q.shape[2] == 1:
            attended, final = _step(q, k, v, beta, log_alpha, total)
        elif self.impl == "fla":
            attended, final = fla.gated_delta_rule(q, k, v, beta, log_alpha, total)
        else:
            attended, final = _chunked(q, k, v, beta, log_alpha, self.chunk_size, total)
        assert final is not None
        return self.output(attended), {"total": final, "position": position_counter(position + hidden_states.shape[1])}

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        """The products of `_chunked`, triangular ones counted once, padding not at all; d = head_dim, for a chunk of c:

        per key head K Kᵀ and T (V − γ K S), c² d each, and the inverse, c³/3; per head Q Kᵀ and its product with E, c² d
        each; for each chunk but the last K̃ᵀ T (c² d), K̃ᵀ T γ K and N (4 c d²), one step of the scan (2 d³) and all but
        popcount of them one composition (4 d³); for each but the first K S per key head and Q S per head (2 c d² each).
        """
        size, dim = min(self.chunk_size, seq_len), self.head_dim
        full, rest = divmod(seq_len, size)
        lengths = [size] * full + [rest] * bool(rest)
        maps = len(lengths) - 1
        upto = sum(c * (c + 1) // 2 for c in lengths)
        below = sum(c * (c - 1) // 2 for c in lengths)
        inverses = sum(c**3 // 3 for c in lengths)
        read = 2 * (seq_len - size) * dim**2
        per_map = size * (size + 1) * dim + 4 * size * dim**2 + 2 * dim**3
        per_kv_head = 2 * dim * (upto + below) + inverses + maps * per_map + (maps - maps.bit_count()) * 4 * dim**3 + read
        per_query_head = 4 * dim * upto + read
        return batch_size * (self.num_heads * per_query_head + self.num_kv_heads * per_kv_head)

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        """S, in float32 or better whatever the parameters are in."""
        return batch_size * self.num_kv_heads * self.head_dim**2 * torch.promote_types(self.dtype, torch.float32).itemsize


def _unit(x: Tensor) -> Tensor:
    """x / ‖x‖, 0 where x is 0. The square of a float16 overflows at 256, so the norm is taken in float32."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-6).to(x.dtype)
