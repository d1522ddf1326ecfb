"""DeltaNet: a linear attention whose state is corrected towards each new value instead of only added to.

Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", arXiv:2406.06484.
"""

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


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, chunk_size: int = 64) -> Tensor:
    """S_t = S_{t-1} + β_t k_t (v_t − S_{t-1}ᵀ k_t)ᵀ,  o_t = S_tᵀ q_t.

    q: [batch, heads, time, head_dim]; k, v: [batch, kv_heads, time, head_dim], kv_heads a divisor of heads, k of at
    most unit norm (longer keys make the recurrence itself diverge); beta: [batch, kv_heads, time] in [0, 1].
    Returns the shape and dtype of q; sums accumulate in float32 or better. Chunkwise: O(n·(chunk_size + head_dim)·head_dim),
    and O(log(n / chunk_size)) steps one after another; no n×n tensor.
    Raises ValueError if the shapes do not fit or chunk_size is no positive integer. arXiv:2406.06484, section 3.
    """
    return _chunked(q, k, v, beta, chunk_size, None)[0]


def delta_rule_reference(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """The recurrence of `delta_rule`, one token after another, in float64."""
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


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, chunk_size: int, initial: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`delta_rule` after a state S [batch, kv_heads, head_dim, head_dim], and the state after it.

    From no state, and where nobody reads one because all is a single chunk, none comes back.

    Within a chunk that begins at S, let T = (I + tril(β K Kᵀ, −1))⁻¹ diag(β) (the WY form). Then the values the
    state is really given are E = T (V − K S), the outputs Q S + tril(Q Kᵀ) E, and the state behind the chunk is
    S + Kᵀ E = S − M S + N with M = Kᵀ T K, N = Kᵀ T V: a map that composes, so that a scan finds every S at once.
    """
    check_heads(q, k, v)
    require_positive(chunk_size=chunk_size)
    time, kv_heads = k.shape[2], k.shape[1]
    if q.shape[2] != time:
        raise ValueError(
            f"q must have as many positions as k and v, got {q.shape[2]} and {time}: to go on from a prefix, use extend"
        )
    if beta.shape != k.shape[:3]:
        raise ValueError(f"beta must be [batch, kv_heads, time] = {list(k.shape[:3])}, got {list(beta.shape)}")
    size, group = min(chunk_size, time), q.shape[1] // kv_heads
    dtype = torch.promote_types(q.dtype, torch.float32)

    keys, values = _chunks(k.to(dtype), size), _chunks(v.to(dtype), size)
    rates = _chunks(beta.to(dtype).unsqueeze(3), size)
    # The queries that share a key stand below each other, which spares copies of the keys.
    queries = _chunks(q.to(dtype), size).unflatten(1, (kv_heads, group)).transpose(2, 3).flatten(3, 4)

    solved = _solve(keys, rates)
    starts = None if initial is None else initial.unsqueeze(2)
    if keys.shape[2] > 1:
        starts = _starts(keys, values, solved, starts)
    corrections = solved @ (values if starts is None else values - keys @ starts)
    scores = (queries @ keys.mT).unflatten(3, (group, size)).tril().flatten(3, 4)
    outputs = scores @ corrections
    final = None
    if starts is not None:
        outputs = outputs + queries @ starts
        final = starts[:, :, -1] + keys[:, :, -1].mT @ corrections[:, :, -1]
    outputs = outputs.unflatten(3, (group, size)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
    return outputs[:, :, :time].to(q.dtype), final


def _step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """`_chunked` for a single token, by the recurrence itself."""
    keys = k.to(total.dtype)
    correction = beta.to(total.dtype).unsqueeze(3) * (v.to(total.dtype) - keys @ total)
    total = torch.addcmul(total, keys.mT, correction)
    outputs = q.to(total.dtype).view(*k.shape[:2], -1, k.shape[3]) @ total
    return outputs.to(q.dtype).view(*q.shape[:3], v.shape[3]), total


def _solve(keys: Tensor, rates: Tensor) -> Tensor:
    """T of every chunk, [batch, kv_heads, chunks, size, size], lower triangular."""
    # By substitution, not by the shorter product of powers: with alike keys those grow like binomials and cancel.
    overlaps = (rates * (keys @ keys.mT)).tril(-1)
    solved: Tensor = torch.linalg.solve_triangular(overlaps, torch.diag_embed(rates.squeeze(4)), upper=False, unitriangular=True)
    return solved


def _starts(keys: Tensor, values: Tensor, solved: Tensor, first: Tensor | None) -> Tensor:
    """S at the start of every chunk, [batch, kv_heads, chunks, d, e]; the first is zero unless given."""
    written = keys.mT @ solved
    maps = torch.cat([written @ keys, written @ values], dim=4)
    if first is None:
        first = maps.new_zeros(*maps.shape[:2], 1, keys.shape[4], values.shape[4])
    return _scan(maps[:, :, :-1], first)


def _scan(maps: Tensor, first: Tensor) -> Tensor:
    """S_0 = first, S_{i+1} = S_i − M_i S_i + N_i: all of S_0 … S_m from m maps [M | N], in O(log m) steps and O(m) work.

    Two maps in a row are one: [M₁ | N₁] + [M₂ | N₂] − M₂ [M₁ | N₁]. So halve them, find every second state, and take
    one step from each of those (Blelloch 1990). maps: [batch, heads, m, d, d + e]; first: [batch, heads, 1, d, e].
    """
    if maps.shape[2] == 0:
        return first
    dim = maps.shape[3]
    early, late = maps[:, :, 0::2], maps[:, :, 1::2]
    paired = early[:, :, : late.shape[2]]
    evens = _scan(paired + late - late[..., :dim] @ paired, first)
    steps = early.shape[2]
    from_states = evens[:, :, :steps]
    odds = from_states - early[..., :dim] @ from_states + early[..., dim:]
    states = torch.stack([from_states, odds], dim=3).flatten(2, 3)
    return torch.cat([states, evens[:, :, steps:]], dim=2)


def _chunks(x: Tensor, size: int) -> Tensor:
    """[batch, heads, time, dim] -> [batch, heads, chunks, size, dim], contiguous, zeros behind the last token."""
    missing = -x.shape[2] % size
    padded = F.pad(x, (0, 0, 0, missing)) if missing else x
    return padded.reshape(*x.shape[:2], -1, size, x.shape[3]).contiguous()


class DeltaNetAttention(MultiHeadAttention):
    """`delta_rule` with projections: q and k go through SiLU and are scaled to unit norm, β_t = σ(w·x_t) per head.

    As in the paper's layer, without its short convolutions and its norm before out_proj: those belong to the decoder,
    the same for every attention. As many β as key heads. The state is S, whatever the context: decoding costs
    O(head_dim²) a token. rotary=True turns q and k once they have unit norm, which keeps it.
    impl: "torch", or "fla" for the kernel of flash-linear-attention, which needs CUDA; a single token is few enough
    operations to need none.
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

    @property
    def block_length(self) -> int:
        return self.chunk_size

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        q = _unit(F.silu(split_heads(self.q_proj(hidden_states), self.num_heads)))
        k = _unit(F.silu(split_heads(self.k_proj(hidden_states), self.num_kv_heads)))
        v = split_heads(self.v_proj(hidden_states), self.num_kv_heads)
        if self.rotary:
            q, k = rotate(q, start), rotate(k, start)
        return q, k, v, self.beta_proj(hidden_states).sigmoid().transpose(1, 2)

    def implementation(self, *_: Tensor) -> str:
        return self.impl

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v, beta = tensors
        if self.impl == "fla":
            return fla.delta_rule(q, k, v, beta)[0]
        return delta_rule(q, k, v, beta, chunk_size=self.chunk_size)

    def reference(self, *tensors: Tensor) -> Tensor:
        return delta_rule_reference(*tensors)

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        check_hidden_states(hidden_states, self.hidden_dim)
        position = next_position(state)
        q, k, v, beta = self.project(hidden_states, position)
        if state is None:
            dtype = torch.promote_types(q.dtype, torch.float32)
            total = q.new_zeros(q.shape[0], self.num_kv_heads, self.head_dim, self.head_dim, dtype=dtype)
        else:
            total = state["total"]
        final: Tensor | None
        if q.shape[2] == 1:
            attended, final = _step(q, k, v, beta, total)
        elif self.impl == "fla":
            attended, final = fla.delta_rule(q, k, v, beta, total)
        else:
            attended, final = _chunked(q, k, v, beta, self.chunk_size, total)
        assert final is not None
        return self.output(attended), {"total": final, "position": position_counter(position + hidden_states.shape[1])}

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        """The products of `_chunked`, triangular ones counted once, padding not at all; d = head_dim, for a chunk of c:

        per key head K Kᵀ and T (V − K S), c² d each, and the inverse, c³/3; per head Q Kᵀ and its product with E, c² d each;
        for each chunk but the last Kᵀ T (c² d), M and N (4 c d²), one step of the scan (2 d³) and all but
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
