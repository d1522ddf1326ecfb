"""Backward kernels of the output: first dq, dφ(q) and dg, then dk, dv and dφ(k), including the part through the states.

No kernel adds atomically, so a gradient has the same bits every time. Δ_i = Σ_j p_ij dp_ij is computed from the pairs and not as
o·dO, because o also contains the retrieved term; so the forward pass need not store o.

Traffic: each kernel reads Q, K, V and dO from memory once; the first loops over K and V twice, the second time from the cache.
The first writes dQ (and dφ(Q)), the second dK and dV (and dφ(K)).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsbr.backends.triton import tiles, tuning
from bsbr.backends.triton.tiles import LOG2_E, dot, inverse_norm, load_rows, of_head, store_rows, through_unit_norm


@triton.jit
def _weights(queries, keys, row_lse, rows, columns, last, chunk_size, overlap, scale):
    """Local softmax weights of a tile of pairs, from the logarithm of each row's sum; zero outside M_in."""
    visible = (columns[None, :] <= rows[:, None]) & (columns < last)[None, :]
    visible &= columns[None, :] >= (rows // chunk_size * chunk_size - overlap)[:, None]
    scores = dot(queries, tl.trans(keys)) * (scale * LOG2_E)
    return tl.where(visible, tl.exp2(scores - row_lse[:, None]), 0.0)


@triton.jit
def _queries(
    q, k, v, phi, retrieved, gain, grad, lse, delta, grad_q, grad_phi, grad_gain,
    time, chunk_size, overlap, heads, group, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, phi_batch, phi_head, phi_row,
    g_batch, g_head, g_row, gq_batch, gq_head, gq_row, gphi_batch, gphi_head, gphi_row,
    D: tl.constexpr, D_R: tl.constexpr, UNIT: tl.constexpr, GAIN: tl.constexpr, RETRIEVES: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dq, dφ(q), Δ, and each program's part of dg = Σ_i φ(q_i)·(F̄ dO_i)."""
    row_tiles, chunks = tl.cdiv(chunk_size, ROWS), tl.cdiv(time, chunk_size)
    tile = tl.program_id(0) % row_tiles
    chunk = tl.program_id(0) // row_tiles % chunks
    sequence = tl.program_id(0) // row_tiles // chunks
    batch, head = sequence // heads, sequence % heads
    q, phi = of_head(q, batch, head, q_batch, q_head), of_head(phi, batch, head, phi_batch, phi_head)
    k, v = of_head(k, batch, head // group, k_batch, k_head), of_head(v, batch, head // group, v_batch, v_head)
    grad = of_head(grad, batch, head, g_batch, g_head)
    start, stop = chunk * chunk_size + tile * ROWS, tl.minimum((chunk + 1) * chunk_size, time)
    last = tl.minimum(start + ROWS, stop)
    rows = start + tl.arange(0, ROWS)
    queries = load_rows(q, start, stop, q_row, 0, D, ROWS, BLOCK_D)
    upstream = load_rows(grad, start, stop, g_row, 0, D, ROWS, BLOCK_D)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if RETRIEVES:
        retrieved += (tl.cast(sequence, tl.int64) * (chunks - 1) + chunk - 1) * (D_R * D)
        grad_features = tl.zeros([ROWS, BLOCK_R], tl.float32)
        for depth in range(0, tl.where(chunk > 0, D, 0), DEPTH):
            part = load_rows(grad, start, stop, g_row, depth, D, ROWS, DEPTH)
            grad_features += dot(part, tl.trans(load_rows(retrieved, 0, D_R, D, depth, D, BLOCK_R, DEPTH)))
        if UNIT:
            features = queries.to(tl.float32) * inverse_norm(queries)[:, None]
        else:
            features = load_rows(phi, start, stop, phi_row, 0, D_R, ROWS, BLOCK_R).to(tl.float32)
        if GAIN:
            tl.store(grad_gain + tl.program_id(0), tl.sum(features * grad_features))
            grad_features *= tl.load(gain + head).to(tl.float32)
        if UNIT:
            total += through_unit_norm(queries, inverse_norm(queries), grad_features)
        else:
            grad_phi = of_head(grad_phi, batch, head, gphi_batch, gphi_head)
            store_rows(grad_phi, grad_features, start, stop, gphi_row, 0, D_R, ROWS, BLOCK_R)
    row_lse = tl.load(lse + tl.cast(sequence, tl.int64) * time + rows, mask=rows < stop, other=0.0)
    first = tl.maximum(chunk * chunk_size - overlap, 0)
    row_delta = tl.zeros([ROWS], tl.float32)
    for column in range(first, last, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        keys = load_rows(k, column, last, k_row, 0, D, COLUMNS, BLOCK_D)
        weights = _weights(queries, keys, row_lse, rows, columns, last, chunk_size, overlap, scale)
        grad_weights = dot(upstream, tl.trans(load_rows(v, column, last, v_row, 0, D, COLUMNS, BLOCK_D)))
        row_delta += tl.sum(weights * grad_weights, axis=1)
    tl.store(delta + tl.cast(sequence, tl.int64) * time + rows, row_delta, mask=rows < stop)
    for column in range(first, last, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        keys = load_rows(k, column, last, k_row, 0, D, COLUMNS, BLOCK_D)
        weights = _weights(queries, keys, row_lse, rows, columns, last, chunk_size, overlap, scale)
        grad_weights = dot(upstream, tl.trans(load_rows(v, column, last, v_row, 0, D, COLUMNS, BLOCK_D)))
        grad_scores = weights * (grad_weights - row_delta[:, None]) * scale
        total += dot(grad_scores.to(k.dtype.element_ty), keys)
    store_rows(of_head(grad_q, batch, head, gq_batch, gq_head), total, start, stop, gq_row, 0, D, ROWS, BLOCK_D)


@triton.jit
def _keys(
    q, k, v, phi, grad_states, grad, lse, delta, grad_k, grad_v, grad_phi,
    time, chunk_size, overlap, kv_heads, group, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, phi_batch, phi_head, phi_row,
    g_batch, g_head, g_row, gk_batch, gk_head, gk_row, gv_batch, gv_head, gv_row, gphi_batch, gphi_head, gphi_row,
    D: tl.constexpr, D_R: tl.constexpr, UNIT: tl.constexpr, RETRIEVES: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dk and dv from every query that sees the key, and through the chunk's state: dφ(k) = dF v and dv += dFᵀ φ(k)."""
    row_tiles, chunks = tl.cdiv(chunk_size, ROWS), tl.cdiv(time, chunk_size)
    tile = tl.program_id(0) % row_tiles
    chunk = tl.program_id(0) // row_tiles % chunks
    sequence = tl.program_id(0) // row_tiles // chunks
    batch, kv_head = sequence // kv_heads, sequence % kv_heads
    k, v = of_head(k, batch, kv_head, k_batch, k_head), of_head(v, batch, kv_head, v_batch, v_head)
    start, stop = chunk * chunk_size + tile * ROWS, tl.minimum((chunk + 1) * chunk_size, time)
    keys = load_rows(k, start, stop, k_row, 0, D, ROWS, BLOCK_D)
    total_k = tl.zeros([ROWS, BLOCK_D], tl.float32)
    total_v = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if RETRIEVES:
        phi = of_head(phi, batch, kv_head, phi_batch, phi_head)
        grad_states += (tl.cast(sequence, tl.int64) * (chunks - 1) + chunk) * (D_R * D)
        has_state = chunk < chunks - 1  # the last chunk has no state
        for depth in range(0, tl.where(has_state, D_R, 0), DEPTH):
            part = load_rows(phi, start, stop, phi_row, depth, D_R, ROWS, DEPTH)
            total_v += dot(part, load_rows(grad_states, depth, D_R, D, 0, D, DEPTH, BLOCK_D))
        grad_features = tl.zeros([ROWS, BLOCK_R], tl.float32)
        for depth in range(0, tl.where(has_state, D, 0), DEPTH):
            part = load_rows(v, start, stop, v_row, depth, D, ROWS, DEPTH)
            grad_features += dot(part, tl.trans(load_rows(grad_states, 0, D_R, D, depth, D, BLOCK_R, DEPTH)))
        if UNIT:
            total_v *= inverse_norm(keys)[:, None]
            total_k += through_unit_norm(keys, inverse_norm(keys), grad_features)
        else:
            grad_phi = of_head(grad_phi, batch, kv_head, gphi_batch, gphi_head)
            store_rows(grad_phi, grad_features, start, stop, gphi_row, 0, D_R, ROWS, BLOCK_R)
    values = load_rows(v, start, stop, v_row, 0, D, ROWS, BLOCK_D)
    columns = start + tl.arange(0, ROWS)
    last = tl.minimum(start + ROWS, stop)
    # The last chunk that sees the tile's last key begins at most `overlap` tokens after it.
    until = tl.minimum(((last - 1 + overlap) // chunk_size + 1) * chunk_size, time)
    for member in range(group):
        head = kv_head * group + member
        q_member, grad_member = of_head(q, batch, head, q_batch, q_head), of_head(grad, batch, head, g_batch, g_head)
        offset = (tl.cast(sequence, tl.int64) * group + member) * time
        for row in range(start, until, COLUMNS):
            rows = row + tl.arange(0, COLUMNS)
            queries = load_rows(q_member, row, until, q_row, 0, D, COLUMNS, BLOCK_D)
            upstream = load_rows(grad_member, row, until, g_row, 0, D, COLUMNS, BLOCK_D)
            row_lse = tl.load(lse + offset + rows, mask=rows < until, other=0.0)
            row_delta = tl.load(delta + offset + rows, mask=rows < until, other=0.0)
            weights = _weights(queries, keys, row_lse, rows, columns, last, chunk_size, overlap, scale)
            total_v += dot(tl.trans(weights.to(v.dtype.element_ty)), upstream)
            grad_scores = weights * (dot(upstream, tl.trans(values)) - row_delta[:, None]) * scale
            total_k += dot(tl.trans(grad_scores.to(q.dtype.element_ty)), queries)
    store_rows(of_head(grad_k, batch, kv_head, gk_batch, gk_head), total_k, start, stop, gk_row, 0, D, ROWS, BLOCK_D)
    store_rows(of_head(grad_v, batch, kv_head, gv_batch, gv_head), total_v, start, stop, gv_row, 0, D, ROWS, BLOCK_D)


def queries_backward(
    q: Tensor, k: Tensor, v: Tensor, phi: Tensor, retrieved: Tensor | None, gain: Tensor | None, grad: Tensor, lse: Tensor,
    *, chunk_size: int, chunk_overlap: int, unit: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of the queries. Arguments as in `output`, with `grad` = dO and `lse` as `output` returned it.

    Returns:
        dq, dφ(q) (None if `unit`), dg [heads] (None without gain), and Δ [batch, heads, time] for `keys_backward`.
    """
    batch, heads, time, head_dim = q.shape
    step = tuning.tile("queries", q, head_dim=max(head_dim, phi.shape[-1]), chunk_size=chunk_size)
    programs = triton.cdiv(time, chunk_size) * triton.cdiv(chunk_size, step.rows)
    grad_q, delta = tiles.like(q), torch.empty_like(lse)
    retrieves = retrieved is not None
    grad_phi = None if unit else tiles.like(phi) if retrieves else torch.zeros_like(phi)
    gain_parts = None if gain is None else tiles.wide((batch, heads, programs), q) if retrieves else q.new_zeros(batch, heads, 1)
    tiles.launch(
        _queries,
        batch * heads * programs,
        *(q, k, v, phi, retrieved, gain, grad, lse, delta, grad_q, grad_phi, gain_parts),
        *(time, chunk_size, chunk_overlap, heads, heads // k.shape[1], 1 / math.sqrt(head_dim)),
        *(*tiles.strides(q), *tiles.strides(k), *tiles.strides(v), *tiles.strides(phi), *tiles.strides(grad)),
        *(*tiles.strides(grad_q), *tiles.strides(grad_q if grad_phi is None else grad_phi)),
        GAIN=gain is not None,
        **_sizes(step, q, phi, unit, retrieves),
    )
    grad_gain = None if gain is None or gain_parts is None else gain_parts.sum(dim=(0, 2)).to(gain.dtype)
    return grad_q, grad_phi, grad_gain, delta


def keys_backward(
    q: Tensor, k: Tensor, v: Tensor, phi: Tensor, grad_states: Tensor | None, grad: Tensor, lse: Tensor, delta: Tensor,
    *, chunk_size: int, chunk_overlap: int, unit: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of keys and values. Arguments as in `queries_backward`, but phi is φ(k), or k itself if `unit`.

    Args:
        grad_states: dF as `mix_backward` returns it; None if there is only one chunk.
        delta: Δ of `queries_backward`.

    Returns:
        dk, dv and dφ(k) (None if `unit`).
    """
    batch, kv_heads, time, head_dim = k.shape
    group = q.shape[1] // kv_heads
    step = tuning.tile("keys", q, head_dim=max(head_dim, phi.shape[-1]), chunk_size=chunk_size)
    programs = triton.cdiv(time, chunk_size) * triton.cdiv(chunk_size, step.rows)
    retrieves = grad_states is not None
    grad_k, grad_v = tiles.like(k), tiles.like(v)
    grad_phi = None if unit else tiles.like(phi) if retrieves else torch.zeros_like(phi)
    tiles.launch(
        _keys,
        batch * kv_heads * programs,
        *(q, k, v, phi, grad_states, grad, lse, delta, grad_k, grad_v, grad_phi),
        *(time, chunk_size, chunk_overlap, kv_heads, group, 1 / math.sqrt(head_dim)),
        *(*tiles.strides(q), *tiles.strides(k), *tiles.strides(v), *tiles.strides(phi), *tiles.strides(grad)),
        *(*tiles.strides(grad_k), *tiles.strides(grad_v), *tiles.strides(grad_k if grad_phi is None else grad_phi)),
        **_sizes(step, q, phi, unit, retrieves),
    )
    return grad_k, grad_v, grad_phi


def _sizes(step: tuning.Tile, q: Tensor, phi: Tensor, unit: bool, retrieves: bool) -> dict[str, int]:
    head_dim, d_r = q.shape[-1], phi.shape[-1]
    return {
        "D": head_dim,
        "D_R": d_r,
        "UNIT": unit,
        "RETRIEVES": retrieves,
        "BLOCK_D": tiles.padded(head_dim),
        "BLOCK_R": tiles.padded(d_r),
        "ROWS": step.rows,
        "COLUMNS": step.columns,
        "DEPTH": min(step.depth, tiles.padded(max(head_dim, d_r))),
        "num_warps": step.num_warps,
        "num_stages": step.num_stages,
    }
