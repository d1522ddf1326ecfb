"""Matrix states that decay, per head or per key channel, with or without the delta rule, by torch operations.

`mamba2` and `gla` add to a decayed state, `kda` replaces what a decayed state stores under a key. They differ in their projections
and in the shape of the decay; the recurrence, its chunkwise form, its cost and the module that streams it are here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.kernels.recurrent import RecurrentAttention, check_inputs, scan, to_chunks, ungroup_outputs
from bsbr.interface import require_positive
from bsbr.precision import without_autocast


def decayed_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor | None = None,
    *,
    chunk_size: int = 64,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = Diag(α_t) S_{t-1} + k_t v_tᵀ,  o_t = S_tᵀ q_t; with β, S_t = (I − β_t k_t k_tᵀ) Diag(α_t) S_{t-1} + β_t k_t v_tᵀ.

    Within a chunk that begins with S, let γ_i = α_1 ⊙ … ⊙ α_i, and let ⟨x_i, y_j⟩ = Σ_f x_if y_jf γ_if / γ_jf for j ≤ i and else 0.
    Then E = V, or with β the solution of (I + tril(diag(β) ⟨K, K⟩, −1)) E = diag(β) (V − (γ ⊙ K) S). The outputs are
    (γ ⊙ Q) S + ⟨Q, K⟩ E, and the next state is Diag(γ_c) S + (γ_c / γ ⊙ K)ᵀ E. That map of S is affine, and a scan composes the
    maps of all chunks in O(log(n / chunk_size)) sequential steps.

    Args:
        q: [batch, heads, time, head_dim].
        k: [batch, kv_heads, time, head_dim], kv_heads a divisor of heads; with β of at most unit norm.
        v: [batch, kv_heads, time, value_dim].
        log_alpha: [batch, kv_heads, time, 1] for a decay per head, [batch, kv_heads, time, head_dim] for one per channel; at
            most 0. −∞ forgets.
        beta: [batch, kv_heads, time], in [0, 1]; None for the state that only adds.
        chunk_size: tokens computed together, rounded up to a power of two; changes the speed, not the result.
        initial: the state before the first token, [batch, kv_heads, head_dim, value_dim]; None for 0.

    Returns:
        The output [batch, heads, time, value_dim] in the dtype of q, and the final state; sums accumulate in float32 or better.
        Costs O(n·(chunk_size + head_dim)·head_dim) per head; holds no n×n tensor.

    Raises:
        ValueError: if the shapes do not fit, or chunk_size is not a positive integer.
    """
    check_inputs(q, k, v, chunk_size, **({} if beta is None else {"beta": beta}))
    if log_alpha.shape not in ((*k.shape[:3], 1), k.shape):
        raise ValueError(
            f"log_alpha must be [batch, kv_heads, time, 1 or head_dim] = {[*k.shape[:3], f'1 or {k.shape[3]}']}, "
            f"got {list(log_alpha.shape)}"
        )
    shape = (*k.shape[:2], k.shape[3], v.shape[3])
    if initial is not None and initial.shape != shape:
        raise ValueError(f"the state must be [batch, kv_heads, head_dim, value_dim] = {list(shape)}, got {list(initial.shape)}")
    return _chunkwise(power_of_two(min(chunk_size, q.shape[2])), initial, q, k, v, log_alpha, beta)


def decayed_rule_reference(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor | None = None) -> Tensor:
    """The recurrence of `decayed_rule`, token by token, in float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v, alpha = q.double(), *(x.double().repeat_interleave(group, dim=1) for x in (k, v, log_alpha.double().exp()))
    rates = None if beta is None else beta.double().repeat_interleave(group, dim=1)
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[2]):
        state = alpha[:, :, t].unsqueeze(3) * state
        written = v[:, :, t]
        if rates is not None:
            written = rates[:, :, t, None] * (written - torch.einsum("bhde,bhd->bhe", state, k[:, :, t]))
        state = state + torch.einsum("bhd,bhe->bhde", k[:, :, t], written)
        outputs.append(torch.einsum("bhde,bhd->bhe", state, q[:, :, t]))
    return torch.stack(outputs, dim=2)


def decayed_products(x: Tensor, y: Tensor, log_alpha: Tensor, *, strict: bool = False) -> Tensor:
    """Σ_f x_if y_jf exp(Σ_{j<t≤i} log α_tf) for j ≤ i, or j < i if `strict`, and else 0.

    The inverse of a product of decays may overflow, and none is formed. The tokens are halved; the decay between a token of the
    second half and one of the first is the product of those on either side of the middle, both at most 1; and the halves are halved
    in turn. Each sum of logarithms has its own terms alone, so that nothing cancels.

    Args:
        x, y: [..., c, d], c a power of two.
        log_alpha: [..., c, 1 or d], at most 0.

    Returns:
        [..., c, c].
    """
    if log_alpha.shape[-1] == 1 and x.shape[-1] > 1:
        one = torch.ones_like(log_alpha)
        return x @ y.mT * decayed_products(one, one, log_alpha, strict=strict)
    own = (x * y).sum(-1)
    products = (torch.zeros_like(own) if strict else own)[..., None, None]  # [..., blocks, size, size], here of size 1
    while products.shape[-1] < x.shape[-2]:
        size = products.shape[-1]
        _, late = _halves(x, size)
        early, _ = _halves(y, size)
        logs_early, logs_late = _halves(log_alpha, size)
        corner = late * logs_late.cumsum(-2).exp() @ (early * _sums_after(logs_early).exp()).mT
        upper, lower = products[..., 0::2, :, :], products[..., 1::2, :, :]
        products = torch.cat([F.pad(upper, (0, size)), torch.cat([corner, lower], dim=-1)], dim=-2)
    return products.squeeze(-3)


def _halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[..., c, d] -> the first and the second halves of its blocks of 2·size tokens, [..., c / (2·size), size, d] each."""
    blocks: Tensor = x.unflatten(-2, (-1, 2, size))
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _sums_after(x: Tensor) -> Tensor:
    """Sums over the rows after each row of x [..., rows, d]."""
    return F.pad(x[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def power_of_two(number: int) -> int:
    """The least power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


@without_autocast
def _chunkwise(
    size: int, initial: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`decayed_rule` in chunks of `size` tokens, a power of two."""
    time, kv_heads = k.shape[2], k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys, values, logs = (to_chunks(x.to(dtype), size) for x in (k, v, log_alpha))
    queries = to_chunks(q.to(dtype), size).unflatten(1, (kv_heads, q.shape[1] // kv_heads)).transpose(2, 3)
    since_start, until_end = logs.cumsum(3).exp(), _sums_after(logs).exp()
    read, written = keys * since_start, keys * until_end
    whole = since_start[..., -1:, :].mT  # γ_c as a column

    solved = None if beta is None else _solve(keys, logs, to_chunks(beta.to(dtype).unsqueeze(3), size))
    state = keys.new_zeros(*keys.shape[:2], keys.shape[4], values.shape[4]) if initial is None else initial
    steps = slice(0, keys.shape[2] - 1)  # the last chunk's state is computed from its corrections
    if solved is None:
        starts = scan(torch.mul, whole[:, :, steps], written[:, :, steps].mT @ values[:, :, steps], state.unsqueeze(2))
        corrections = values
    else:
        corrected = written[:, :, steps].mT @ solved[:, :, steps]
        diagonal = torch.eye(keys.shape[4], dtype=dtype, device=q.device) * whole[:, :, steps]
        maps = diagonal - corrected @ read[:, :, steps]
        starts = scan(torch.matmul, maps, corrected @ values[:, :, steps], state.unsqueeze(2))
        corrections = solved @ (values - read @ starts)

    scores = decayed_products(queries, keys.unsqueeze(3), logs.unsqueeze(3))
    from_state = (queries * since_start.unsqueeze(3)).flatten(3, 4) @ starts
    outputs = scores.flatten(3, 4) @ corrections + from_state
    final = whole[:, :, -1] * starts[:, :, -1] + written[:, :, -1].mT @ corrections[:, :, -1]
    return ungroup_outputs(outputs, queries.shape[3], time).to(q.dtype), final


def _solve(keys: Tensor, logs: Tensor, rates: Tensor) -> Tensor:
    """(I + tril(diag(β) ⟨K, K⟩, −1))⁻¹ diag(β) of every chunk."""
    # By substitution: with similar keys the terms of the Neumann series grow like binomials and cancel.
    overlaps = rates * decayed_products(keys, keys, logs, strict=True)
    solved: Tensor = torch.linalg.solve_triangular(overlaps, torch.diag_embed(rates.squeeze(4)), upper=False, unitriangular=True)
    return solved


def flops(seq_len: int, chunk_size: int, num_heads: int, num_kv_heads: int, head_dim: int, *, erases: bool) -> int:
    """FLOPs of `decayed_rule` for one sequence: matrix products only, masked pairs not counted, chunk after chunk; d = head_dim.

    - Per query head and chunk of c tokens: ⟨Q, K⟩ and its product with E cost c (c + 1) d each.
    - Each chunk but the first: (γ ⊙ Q) S costs 2 c d² per query head, and with β (γ ⊙ K) S the same per key head.
    - Each chunk but the last: the write costs 2 c d² per key head.
    - With β, ⟨K, K⟩ and the substitution cost c (c − 1) d each per key head and chunk.
    """
    require_positive(seq_len=seq_len)
    size = power_of_two(min(chunk_size, seq_len))
    full, rest = divmod(seq_len, size)
    lengths = [size] * full + [rest] * bool(rest)
    pairs = sum(2 * c * (c + 1) * head_dim for c in lengths)
    read, written = ((seq_len - c) * 2 * head_dim**2 for c in (lengths[0], lengths[-1]))
    erased = sum(2 * c * (c - 1) * head_dim for c in lengths) + read if erases else 0
    return num_heads * (pairs + read) + num_kv_heads * (written + erased)


class DecayedAttention(RecurrentAttention):
    """Multi-head `decayed_rule`. A subclass implements `project`, which returns q, k, v, log α and, if it erases, β.

    Args:
        hidden_dim, num_heads, num_kv_heads, rotary, chunk_size, impl: as in `RecurrentAttention`; "torch" is the only backend.
    """

    explicit_backends = ()

    erases: bool = False
    """Whether the state forgets what it stores under a key before it stores the new value there: the delta rule."""

    def attend_after(self, total: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return decayed_rule(*tensors, chunk_size=self.chunk_size, initial=total)

    @without_autocast
    def step(self, total: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, log_alpha, *beta = (x.to(total.dtype) for x in tensors)
        total = log_alpha.exp().mT * total
        written = beta[0].unsqueeze(3) * (v - k @ total) if beta else v
        total = torch.addcmul(total, k.mT, written)
        outputs = q.view(*k.shape[:2], q.shape[1] // k.shape[1], k.shape[3]) @ total
        return outputs.to(tensors[0].dtype).view(*q.shape[:3], v.shape[3]), total

    def reference(self, *tensors: Tensor) -> Tensor:
        return decayed_rule_reference(*tensors)

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        """FLOPs of the matrix products, see `flops` of baselines.kernels.decayed."""
        sizes = self.num_heads, self.num_kv_heads, self.head_dim
        return batch_size * flops(seq_len, self.chunk_size, *sizes, erases=self.erases)
