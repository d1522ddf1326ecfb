"""The delta rule, with or without decay, by torch operations: all chunks at once, and a scan over their states.

`baselines.delta_net` and `baselines.gated_delta_net` have the definitions; C++ leaves second derivatives to this form.
"""

import torch
from torch import Tensor

from baselines.kernels.recurrent import group_queries, scan, to_chunks, ungroup_outputs
from bsbr.precision import to_float64, without_autocast


@without_autocast
def chunkwise_delta_rule(
    chunk_size: int, initial: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The rule after the state `initial` [batch, kv_heads, head_dim, value_dim], and the final state.

    Within a chunk of c tokens that begins with S, let γ_i = α_1 … α_i, Γ = diag(γ), D_ij = γ_i / γ_j for j ≤ i and else 0, and
    T = (I + tril(diag(β) K Kᵀ ⊙ D, −1))⁻¹ diag(β), the WY form of arXiv:2406.06484, sec. 3, and with decay of arXiv:2412.06464,
    sec. 3.3. Then the corrected values are E = T (V − Γ K S), and the outputs are Γ Q S + (Q Kᵀ ⊙ D) E. With K̃ = γ_c Γ⁻¹ K, the
    keys decayed to the end of the chunk, the state after the chunk is γ_c S + K̃ᵀ E = A S + N with A = γ_c I − K̃ᵀ T Γ K and
    N = K̃ᵀ T V. Such maps compose, so a scan computes all S in O(log(n / chunk_size)) sequential steps. Without log_alpha, γ = 1.

    With a single chunk and `initial` None no state is computed, and the final state is None.

    Args:
        chunk_size: tokens solved together, at most.
        initial: None for 0.
        q: [batch, heads, time, head_dim].
        k, v: [batch, kv_heads, time, head_dim or value_dim].
        beta, log_alpha: [batch, kv_heads, time].
    """
    time, kv_heads = k.shape[2], k.shape[1]
    size, group = min(chunk_size, time), q.shape[1] // kv_heads
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys, values = to_chunks(k.to(dtype), size), to_chunks(v.to(dtype), size)
    rates = to_chunks(beta.to(dtype).unsqueeze(3), size)
    queries = group_queries(to_chunks(q.to(dtype), size), kv_heads)
    read_keys, read_queries, written_keys, between, kept = keys, queries, keys, None, None
    if log_alpha is not None:
        # Logarithms, because products of α underflow while their ratios do not; in float64, because differences of the sums are
        # used. e^x is 0 from -750 on, so the clamp changes no decay, and -∞ - (-∞) does not arise.
        log_decays = to_chunks(to_float64(log_alpha).clamp(min=-800).unsqueeze(3), size).cumsum(3)
        since_start = _exponential(log_decays, keys)
        kept = since_start[..., -1:, :]
        read_keys, written_keys = keys * since_start, keys * _exponential(log_decays[..., -1:, :] - log_decays, keys)
        read_queries = (queries.unflatten(3, (group, size)) * since_start.unsqueeze(3)).flatten(3, 4)
        future = torch.ones(size, size, dtype=torch.bool, device=log_decays.device).triu(1)
        # Masked before exp: masked after it, an overflowed exp would have the gradient 0·∞.
        between = _exponential((log_decays - log_decays.mT).masked_fill(future, -torch.inf), keys)

    solved = _solve(keys, rates, between)
    starts = None if initial is None else initial.unsqueeze(2)
    if keys.shape[2] > 1:
        starts = _chunk_starts(read_keys, written_keys, values, solved, kept, starts)
    corrections = solved @ (values if starts is None else values - read_keys @ starts)
    scores = (queries @ keys.mT).unflatten(3, (group, size))
    scores = scores.tril() if between is None else scores * between.unsqueeze(3)
    outputs = scores.flatten(3, 4) @ corrections
    final = None
    if starts is not None:
        outputs = outputs + read_queries @ starts
        last = starts[:, :, -1] if kept is None else kept[:, :, -1] * starts[:, :, -1]
        final = last + written_keys[:, :, -1].mT @ corrections[:, :, -1]
    return ungroup_outputs(outputs, group, time).to(q.dtype), final


def _exponential(logarithm: Tensor, like: Tensor) -> Tensor:
    """e^logarithm in the dtype and on the device of `like`."""
    return logarithm.to(like.dtype).to(like.device).exp()


# A function each, so that their intermediates are freed before the next is computed: inline they raise the peak by a quarter.


def _solve(keys: Tensor, rates: Tensor, between: Tensor | None) -> Tensor:
    """T of every chunk, [batch, kv_heads, chunks, size, size], lower triangular."""
    # By substitution. The Neumann series of the inverse is shorter, but with similar keys its terms grow like binomials and cancel.
    overlaps = rates * (keys @ keys.mT)
    overlaps = (overlaps if between is None else overlaps * between).tril(-1)
    solved: Tensor = torch.linalg.solve_triangular(overlaps, torch.diag_embed(rates.squeeze(4)), upper=False, unitriangular=True)
    return solved


def _chunk_starts(
    read_keys: Tensor, written_keys: Tensor, values: Tensor, solved: Tensor, kept: Tensor | None, first: Tensor | None
) -> Tensor:
    """S at the start of every chunk, [batch, kv_heads, chunks, d, e]; the first is zero unless given."""
    written = written_keys.mT @ solved
    identity = torch.eye(read_keys.shape[4], dtype=values.dtype, device=values.device)
    maps, writes = (identity if kept is None else identity * kept) - written @ read_keys, written @ values
    if first is None:
        first = torch.zeros_like(writes[:, :, :1])
    return scan(torch.matmul, maps[:, :, :-1], writes[:, :, :-1], first)
