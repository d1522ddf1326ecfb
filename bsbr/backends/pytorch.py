"""BSBR in torch operations on whole tensors: any device, any dtype, dropout, differentiable twice.

Its four steps are softmax attention inside chunks, the states of chunks, retrieval between chunks, and the read-out of the
retrieved state by each token. Retrieval is in `bsbr.backends.retrieval`.
"""

import torch
from torch import Tensor

from bsbr.backends.retrieval import retrieve, zero_of
from bsbr.backends.sdpa import sdpa
from bsbr.inputs import EMPTY_MEMORY, BSBRInputs, BSBROptions, ChunkMemory, Segment
from bsbr.precision import without_autocast


def segment(inputs: BSBRInputs, options: BSBROptions, past: ChunkMemory = EMPTY_MEMORY) -> Segment:
    """BSBR of tokens that begin at a chunk boundary, with the chunks of `past` before them.

    Args:
        inputs: the tensors; k and v may hold up to `chunk_overlap` earlier tokens in front. The chunks that have a meta key get a
            state: all complete chunks, or all but the last.
        options: see `BSBROptions`.
        past: meta keys and states of all earlier chunks.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    before = k.shape[2] - q.shape[2]
    q_features = unit_norm(q) if inputs.q_features is None else inputs.q_features
    k_features = unit_norm(k[:, :, before:]) if inputs.k_features is None else inputs.k_features
    output = local_attention(
        q, k, v, chunk_size=options.chunk_size, chunk_overlap=options.chunk_overlap, dropout_p=options.dropout_p
    )
    states = chunk_states(k_features, v[:, :, before:], options.chunk_size, inputs.meta_key.shape[2], inputs.beta)
    memory = past.followed_by(inputs.meta_key, states)
    retrieved = retrieve(
        inputs.meta_query,
        memory,
        first=past.num_chunks,
        top_k=options.top_k,
        gain=inputs.gain,
        normalise=options.normalise,
        dropout_p=options.dropout_p,
    )
    has_chunks = memory.num_chunks > 0
    output = output + (read_out(q_features, retrieved, options.chunk_size) if has_chunks else zero_of(q_features, retrieved))
    return Segment(output, states, retrieved[:, :, -1])


# --- inside chunks ------------------------------------------------------------------------------


def local_attention(q: Tensor, k: Tensor, v: Tensor, *, chunk_size: int, chunk_overlap: int = 0, dropout_p: float = 0.0) -> Tensor:
    """softmax(QKᵀ/√d ⊙ M_in) V: a token attends to its chunk up to itself and to the `chunk_overlap` tokens before its chunk.

    Args:
        q: [batch, heads, time, head_dim]; row 0 is the first token of a chunk.
        k, v: [batch, kv_heads, time or more, head_dim]; may hold up to `chunk_overlap` earlier tokens in front.
        chunk_size, chunk_overlap, dropout_p: see `BSBROptions`.

    Returns:
        The shape of q.
    """
    time = q.shape[2]
    before = k.shape[2] - time
    # There are three kinds of chunk: those whose overlap is cut off by the beginning of the sequence, those in full, and an
    # incomplete last one. Only the number of full ones grows with the sequence, and they are one batched call.
    cut_off = min(time // chunk_size, -(-max(0, chunk_overlap - before) // chunk_size)) * chunk_size
    end_of_full = time // chunk_size * chunk_size
    pieces: list[Tensor] = []
    for start, stop in ((0, cut_off), (end_of_full, time)):
        if start < stop:
            keys = slice(max(0, before + start - chunk_overlap), before + stop)
            visible = local_mask(start, stop, keys.start - before, chunk_size, chunk_overlap, q.device) if chunk_overlap else None
            tensors = q[:, :, start:stop], k[:, :, keys], v[:, :, keys]
            pieces.append(sdpa(*tensors, visible, dropout_p, is_causal=visible is None))
    if cut_off < end_of_full:
        keys = slice(before + cut_off - chunk_overlap, before + end_of_full)
        full = _full_chunks(q[:, :, cut_off:end_of_full], k[:, :, keys], v[:, :, keys], chunk_size, chunk_overlap, dropout_p)
        pieces.insert(1 if cut_off else 0, full)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _full_chunks(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, chunk_overlap: int, dropout_p: float) -> Tensor:
    """`local_attention` of complete chunks, each with its whole overlap, as one batch; k and v begin with the overlap."""
    window = chunk_size + chunk_overlap
    visible = local_mask(0, chunk_size, -chunk_overlap, chunk_size, chunk_overlap, q.device) if chunk_overlap else None
    tensors = _windows(q, chunk_size, chunk_size), _windows(k, chunk_size, window), _windows(v, chunk_size, window)
    attended = sdpa(*tensors, visible, dropout_p, is_causal=visible is None)
    # The kernel writes [chunk, time, head, dim], so this is a view of [batch, time, heads, dim].
    chunked: Tensor = attended.unflatten(0, (-1, q.shape[2] // chunk_size))
    return chunked.transpose(1, 2).flatten(2, 3)


def _windows(x: Tensor, step: int, length: int) -> Tensor:
    """[batch, heads, time, dim] -> [batch · windows, heads, length, dim], one window every `step` tokens, a view if possible."""
    return x.unfold(2, length, step).permute(0, 2, 1, 4, 3).flatten(0, 1)


def local_mask(start: int, stop: int, first_key: int, chunk_size: int, chunk_overlap: int, device: torch.device) -> Tensor:
    """M_in of queries start … stop − 1 and keys first_key … stop − 1 as booleans; positions count from a chunk boundary."""
    queries = torch.arange(start, stop, device=device)
    keys = torch.arange(first_key, stop, device=device)
    earliest = queries // chunk_size * chunk_size - chunk_overlap
    return (keys >= earliest[:, None]) & (keys <= queries[:, None])


# --- between chunks -----------------------------------------------------------------------------


def chunk_states(k_features: Tensor, v: Tensor, chunk_size: int, chunks: int, beta: Tensor | None = None) -> Tensor:
    """States of the first `chunks` chunks: F_s = φ(K_s)ᵀ V_s, or with β the delta rule's state after the chunk, from 0.

    Args:
        k_features: φ(k) [batch, kv_heads, time, d_r].
        v: [batch, kv_heads, time, head_dim].
        chunk_size: tokens in a chunk.
        chunks: number of chunks, all complete.
        beta: β [batch, kv_heads, time], or None.

    Returns:
        [batch, kv_heads, chunks, d_r, head_dim].
    """
    tokens = chunks * chunk_size
    keys: Tensor = k_features[:, :, :tokens].unflatten(2, (chunks, chunk_size))
    values: Tensor = v[:, :, :tokens].unflatten(2, (chunks, chunk_size))
    if beta is not None:
        values = pseudo_values(keys, values, beta[:, :, :tokens].unflatten(2, (chunks, chunk_size)))
    return keys.mT @ values


@without_autocast
def pseudo_values(k_features: Tensor, v: Tensor, beta: Tensor, state: Tensor | None = None) -> Tensor:
    """Pseudo-values U of the delta rule, S_i = S_{i−1} + φ(k_i) u_iᵀ with u_i = β_i (v_i − S_{i−1}ᵀ φ(k_i)).

    All tokens are solved at once: (I + tril(diag(β) φ(K) φ(K)ᵀ, −1)) U = diag(β) (V − φ(K) S_0), the WY form of
    arXiv:2406.06484, section 3.2.

    Args:
        k_features: φ(k) [..., tokens, d_r].
        v: [..., tokens, head_dim].
        beta: β [..., tokens].
        state: S_0 [..., d_r, head_dim]; None means 0.

    Returns:
        U [..., tokens, head_dim], in the dtype of v.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    keys, values, rates = k_features.to(wide), v.to(wide), beta.to(wide).unsqueeze(-1)
    if state is not None:
        values = values - keys @ state.to(wide)
    if v.shape[-2] == 1:  # a single token, as in decoding, has no earlier token in the system
        return (rates * values).to(v.dtype)
    # By substitution. The Neumann series of the inverse is shorter, but with similar keys its terms grow like binomials and cancel.
    overlaps = (rates * (keys @ keys.mT)).tril(-1)
    solved: Tensor = torch.linalg.solve_triangular(overlaps, rates * values, upper=False, unitriangular=True)
    return solved.to(v.dtype)


def read_out(q_features: Tensor, retrieved: Tensor, chunk_size: int) -> Tensor:
    """φ(q_i)ᵀ F̄_t of every token i, t being its chunk.

    Args:
        q_features: φ(q) [batch, heads, time, d_r].
        retrieved: F̄ [batch, heads, chunks, d_r, head_dim].
        chunk_size: tokens in a chunk.

    Returns:
        [batch, heads, time, head_dim].
    """
    full, rest = divmod(q_features.shape[2], chunk_size)
    pieces = []
    if full:
        chunked = q_features[:, :, : full * chunk_size].unflatten(2, (full, chunk_size))
        pieces.append((chunked @ retrieved[:, :, :full]).flatten(2, 3))
    if rest:
        pieces.append(q_features[:, :, full * chunk_size :] @ retrieved[:, :, full])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def unit_norm(x: Tensor) -> Tensor:
    """x / sqrt(|x|² + 1e-6) along the last dimension: the default feature map φ.

    With it, a query equal to a stored key reads that key's value unscaled, and the norm of a read-out is at most the sum of |v|
    over a chunk, for any queries and keys. One gain per head sets the weight of the retrieved term. The 1e-6 keeps zero inputs
    finite.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)


def quadratic_features(x: Tensor, size: int) -> Tensor:
    """`pairwise_products`(`unit_norm`(x), size): [batch, heads, time, p] -> [batch, heads, time, size]."""
    return pairwise_products(unit_norm(x), size)


def pairwise_products(x: Tensor, size: int) -> Tensor:
    """The first `size` pairwise products of the entries of x: [..., p] -> [..., size].

    Order: x_i² for all i, then √2 x_i x_{i+1}, then √2 x_i x_{i+2}, …, with indices modulo p. With all p (p + 1) / 2 products,
    pairwise_products(x)·pairwise_products(y) = (x·y)².
    """
    steps = -(-size // x.shape[-1])
    shifted = torch.cat([x, x[..., : steps - 1]], dim=-1).unfold(-1, x.shape[-1], 1)  # row j is x shifted by j
    weights = torch.full((steps, 1), 2**0.5, dtype=x.dtype, device=x.device)
    weights[0] = 1
    return (shifted * (weights * x.unsqueeze(-2))).flatten(-2)[..., :size]
