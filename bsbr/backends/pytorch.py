"""BSBR in plain torch operations, whole tensors at a time: any device, any type, dropout, differentiable twice.

Four steps, each a function: softmax inside chunks, the states of chunks, their retrieval, and its reading by each token.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    h: Tensor,
    *,
    past: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ()),
    q_features: Tensor | None = None,
    k_features: Tensor | None = None,
    beta: Tensor | None = None,
    gain: Tensor | None = None,
    chunk_size: int,
    chunk_overlap: int = 0,
    top_k: int | None = None,
    normalise: bool = False,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`bsbr.bsbr_attention` of tokens that begin at a chunk's beginning, with chunks before them.

    k and v may hold up to `chunk_overlap` earlier tokens in front. past: the meta keys and the states of all earlier chunks,
    each in pieces that follow each other. Returns the output; the states of as many chunks as h holds meta keys; and
    what the last chunk retrieves [batch, heads, d_r, head_dim].
    """
    before = k.shape[2] - q.shape[2]
    q_features = unit_norm(q) if q_features is None else q_features
    k_features = unit_norm(k[:, :, before:]) if k_features is None else k_features
    attended = local_attention(q, k, v, chunk_size=chunk_size, chunk_overlap=chunk_overlap, dropout_p=dropout_p)
    states = chunk_states(k_features, v[:, :, before:], chunk_size, h.shape[2], beta)
    first = sum(page.shape[2] for page in past[0])
    pieces = [*past[0], h], [*past[1], states]
    retrieved = retrieve(r, *pieces, first=first, top_k=top_k, gain=gain, normalise=normalise, dropout_p=dropout_p)
    if first or h.shape[2]:
        attended = attended + read_out(q_features, retrieved, chunk_size)
    return attended, states, retrieved[:, :, -1]


def local_attention(q: Tensor, k: Tensor, v: Tensor, *, chunk_size: int, chunk_overlap: int = 0, dropout_p: float = 0.0) -> Tensor:
    """softmax(QKᵀ/√d ⊙ M_in) V, M_in: a token sees its chunk up to itself and the `chunk_overlap` tokens before its chunk.

    q: [batch, heads, time, head_dim], its first row at a chunk's beginning; k and v may hold up to
    `chunk_overlap` earlier tokens in front. Returns the shape of q.
    """
    time = q.shape[2]
    before = k.shape[2] - time
    # Three kinds of chunk: those whose view back is cut off by the beginning of the sequence, those in full,
    # and an incomplete last one. Only the middle kind grows with the sequence, and it is one batched call.
    lead = min(time // chunk_size, -(-max(0, chunk_overlap - before) // chunk_size)) * chunk_size
    full = (time - lead) // chunk_size * chunk_size
    pieces: list[Tensor] = []
    for start, stop in ((0, lead), (lead + full, time)):
        if start < stop:
            first_key = max(0, before + start - chunk_overlap)
            visible = None
            if chunk_overlap:
                visible = local_mask(
                    torch.arange(start, stop, device=q.device),
                    torch.arange(first_key - before, stop, device=q.device),
                    chunk_size,
                    chunk_overlap,
                )
            keys = slice(first_key, before + stop)
            pieces.append(sdpa(q[:, :, start:stop], k[:, :, keys], v[:, :, keys], visible, dropout_p))
    if full:
        chunks = full // chunk_size
        window = slice(before + lead - chunk_overlap, before + lead + full)
        visible = None
        if chunk_overlap:
            own = torch.arange(chunk_size, device=q.device)
            visible = local_mask(own, torch.arange(-chunk_overlap, chunk_size, device=q.device), chunk_size, chunk_overlap)
        attended = sdpa(
            _windows(q[:, :, lead : lead + full], chunk_size, chunk_size),
            _windows(k[:, :, window], chunk_size, chunk_size + chunk_overlap),
            _windows(v[:, :, window], chunk_size, chunk_size + chunk_overlap),
            visible,
            dropout_p,
        )
        # The kernel writes [chunk, time, head, dim], so this is a view of [batch, time, heads, dim].
        attended = attended.unflatten(0, (-1, chunks)).transpose(1, 2).flatten(2, 3)
        pieces.insert(1 if lead else 0, attended)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def chunk_states(k_features: Tensor, v: Tensor, chunk_size: int, chunks: int, beta: Tensor | None = None) -> Tensor:
    """F_s = φ(K_s)ᵀ V_s for the first `chunks` chunks: [batch, kv_heads, chunks, d_r, head_dim]; with β, of `corrected` V_s."""
    tokens = chunks * chunk_size
    keys: Tensor = k_features[:, :, :tokens].unflatten(2, (chunks, chunk_size))
    values: Tensor = v[:, :, :tokens].unflatten(2, (chunks, chunk_size))
    if beta is not None:
        values = pseudo_values(keys, values, beta[:, :, :tokens].unflatten(2, (chunks, chunk_size)))
    return keys.mT @ values


def pseudo_values(k_features: Tensor, v: Tensor, beta: Tensor, state: Tensor | None = None) -> Tensor:
    """U of the delta rule S_i = S_{i−1} + φ(k_i) u_iᵀ, u_i = β_i (v_i − S_{i−1}ᵀ φ(k_i)): what is new in each value.

    k_features: [..., tokens, d_r]; v, and what is returned: [..., tokens, head_dim]; beta: [..., tokens]. S begins at
    `state` [..., d_r, head_dim], by default 0. All at once: (I + tril(diag(β) φ(K) φ(K)ᵀ, −1)) U = diag(β) (V − φ(K) S),
    the WY form of Yang 2024 (arXiv:2406.06484, section 3.2).
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    keys, values, rates = k_features.to(wide), v.to(wide), beta.to(wide).unsqueeze(-1)
    if state is not None:
        values = values - keys @ state.to(wide)
    if v.shape[-2] == 1:  # when decoding: there is nobody before it to be disturbed by
        return (rates * values).to(v.dtype)
    # By substitution, not by products of powers, which are shorter: with alike keys they grow like binomials and cancel.
    overlaps = (rates * (keys @ keys.mT)).tril(-1)
    solved: Tensor = torch.linalg.solve_triangular(overlaps, rates * values, upper=False, unitriangular=True)
    return solved.to(v.dtype)


Choose = Callable[[Tensor, int, int], Tensor]
Mix = Callable[[Tensor, Sequence[int], Sequence[Tensor], int], Tensor]


def select_top_k(scores: Tensor, top_k: int, first: int) -> Tensor:
    """Which of `scores` [batch, heads, rows, chunks] are the top_k highest of each row, the earliest of equals."""
    # Not topk: which of equal scores it takes depends on how many columns there are, that is, on the future.
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]


def mix_states(weights: Tensor, sizes: Sequence[int], states: Sequence[Tensor], first: int) -> Tensor:
    """Σ_s weights[s] states[s]; [batch, heads, rows, chunks] and, in pieces of `sizes`, [batch, kv_heads, chunks, size]."""
    parts = weights.reshape(-1, weights.shape[1] // states[0].shape[1] * weights.shape[2], weights.shape[3]).split(sizes, dim=-1)
    mixed = None
    for part, chunks, page in zip(parts, sizes, states, strict=True):
        table = page[:, :, :chunks].flatten(0, 1)
        mixed = torch.bmm(part, table) if mixed is None else mixed.baddbmm_(part, table)
    assert mixed is not None
    return mixed


def retrieve(
    r: Tensor,
    h: Sequence[Tensor],
    states: Sequence[Tensor],
    *,
    first: int = 0,
    top_k: int | None = None,
    gain: Tensor | None = None,
    normalise: bool = False,
    dropout_p: float = 0.0,
    choose: Choose = select_top_k,
    mix: Mix = mix_states,
) -> Tensor:
    """g F̄_t, F̄_t = Σ_s softmax_s(r_t·h_s/√d ⊙ M_out) F_s: [batch, heads, rows, d_r, head_dim].

    r: [batch, heads, rows, head_dim], row i the meta query of chunk `first` + i, which sees the chunks before it.
    h: [batch, kv_heads, chunks, head_dim] and states: [batch, kv_heads, chunks, d_r, head_dim], from chunk 0 on, in one
    piece or several; a piece of states may have room for more chunks than h has of it. gain: g, one factor a head.
    normalise: F̄_t is taken to the norm √head_dim, see `norm_factors`; dropout acts before that.
    A chunk that sees none retrieves zero. choose, mix: what finds the top_k best, and what
    sums the states where all count.
    """
    batch, heads, rows, head_dim = r.shape
    kv_heads = h[0].shape[1]
    group = heads // kv_heads
    sizes = [page.shape[2] for page in h]
    chunks = sum(sizes)
    if chunks == 0:
        return states[0].new_zeros(batch, heads, rows, *states[0].shape[3:])
    # Query heads of one group stand side by side as rows against the states that they share.
    # Scores in float32: rounded to bfloat16, they would tie, and top_k would keep other chunks than the best.
    wide = torch.promote_types(r.dtype, torch.float32)
    grouped = r.reshape(batch, kv_heads, group * rows, head_dim).to(wide) / math.sqrt(head_dim)
    scores = torch.cat([grouped @ page.mT.to(wide) for page in h], dim=-1).unflatten(2, (group, rows))
    visible = torch.ones(rows, chunks, dtype=torch.bool, device=r.device).tril(first - 1)
    if first < chunks:
        # Not -inf: a chunk that sees nothing would be 0/0, and its gradient too.
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    chosen = None
    if top_k is not None and top_k < chunks:
        chosen = choose(scores.detach().flatten(1, 2), top_k, first).view(*scores.shape[:4], top_k)
        scores = scores.gather(-1, chosen)
    # What is not seen weighs exactly 0 already, but in a row that sees nothing. One factor a row: each product of all
    # weights would be kept for the gradient.
    factor = (torch.arange(first, first + rows, device=r.device) > 0).to(wide).view(rows, 1)
    if gain is not None and not normalise:
        factor = factor * gain.view(kv_heads, group, 1, 1)
    weights = torch.softmax(scores, dim=-1) * factor
    weights = F.dropout(weights.to(states[0].dtype), dropout_p)
    pieces = [page.flatten(3) for page in states]
    mixed = mix(weights.flatten(1, 2), sizes, pieces, first) if chosen is None else _mix_chosen(weights, chosen, sizes, pieces)
    mixed = mixed.view(batch, heads, rows, *states[0].shape[3:])
    if not normalise:
        return mixed
    scale = norm_factors(mixed)
    return (mixed * (scale if gain is None else scale * gain.view(heads, 1, 1, 1))).to(mixed.dtype)


def norm_factors(mixed: Tensor) -> Tensor:
    """What F̄ [batch, heads, rows, d_r, head_dim] is taken times, so that its norm is √head_dim: [batch, heads, rows, 1, 1].

    √head_dim is that of a state that holds one value, whose numbers are about 1, under a key of unit norm. The mean of C states of
    which one has what is asked for shrinks as 1/C: without this a model would hear the less of it, the longer the text, and
    least in texts longer than those that it was trained on. 1e-12 keeps the gradient of a state of zeros finite.
    """
    wide = mixed.to(torch.promote_types(mixed.dtype, torch.float32))
    return math.sqrt(mixed.shape[-1]) * torch.rsqrt(wide.square().sum(dim=(-2, -1), keepdim=True) + 1e-12)


def _mix_chosen(weights: Tensor, chosen: Tensor, sizes: Sequence[int], states: Sequence[Tensor]) -> Tensor:
    """`mix` where weights[..., i] is that of state chosen[..., i]: work for those alone, and never a copy of what is chosen."""
    batch, kv_heads, _, size = states[0].shape
    rows = weights.flatten(0, 3)
    mixed, start = None, 0
    for chunks, page in zip(sizes, states, strict=True):
        # embedding_bag is a weighted sum of gathered rows that never holds the gathered rows.
        table = page.reshape(-1, size)
        owner = torch.arange(batch * kv_heads, device=chosen.device).view(batch, kv_heads, 1, 1, 1) * page.shape[2]
        index = (chosen - start + owner).flatten(0, 3)
        if len(states) == 1:
            return F.embedding_bag(index, table, per_sample_weights=rows, mode="sum")
        inside = ((chosen >= start) & (chosen < start + chunks)).flatten(0, 3)
        start += chunks
        asking, counts = inside.nonzero()[:, 0].unique_consecutive(return_counts=True)
        if mixed is None:
            mixed = table.new_zeros(len(rows), size)
        if len(asking):
            bags = counts.cumsum(0) - counts
            found = F.embedding_bag(index[inside], table, bags, per_sample_weights=rows[inside], mode="sum")
            mixed = mixed.index_add(0, asking, found)
    assert mixed is not None
    return mixed


def read_out(q_features: Tensor, retrieved: Tensor, chunk_size: int) -> Tensor:
    """φ(q_i)ᵀ F̄_t for every token i of chunk t: [batch, heads, time, head_dim]."""
    full, rest = divmod(q_features.shape[2], chunk_size)
    pieces = []
    if full:
        chunked = q_features[:, :, : full * chunk_size].unflatten(2, (full, chunk_size))
        pieces.append((chunked @ retrieved[:, :, :full]).flatten(2, 3))
    if rest:
        pieces.append(q_features[:, :, full * chunk_size :] @ retrieved[:, :, full])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def unit_norm(x: Tensor) -> Tensor:
    """φ's normalisation, x / sqrt(|x|² + 1e-6): a key asked for exactly returns its value at its own size.

    Unit length bounds a retrieved term by the sum of |v| over a chunk whatever the inputs, which the plain
    product does not, and leaves how much retrieval weighs to one gain per head. 1e-6 keeps zero inputs finite.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)


def local_mask(queries: Tensor, keys: Tensor, chunk_size: int, chunk_overlap: int) -> Tensor:
    """M_in as booleans [queries, keys], for positions counted from any chunk's beginning."""
    earliest = queries // chunk_size * chunk_size - chunk_overlap
    return (keys >= earliest[:, None]) & (keys <= queries[:, None])


def _windows(x: Tensor, step: int, length: int) -> Tensor:
    """[batch, heads, time, dim] -> [batch * windows, heads, length, dim], one window every `step` tokens, a view where possible."""
    return x.unfold(2, length, step).permute(0, 2, 1, 4, 3).flatten(0, 1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, dropout_p: float, *, is_causal: bool | None = None) -> Tensor:
    """softmax(qkᵀ/√d) v over what is visible; where `visible` is None, causal of equal lengths unless said otherwise."""
    is_causal = visible is None if is_causal is None else is_causal
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=is_causal, dropout_p=dropout_p, enable_gqa=q.shape[1] != k.shape[1]
    )
