"""Retrieval of all earlier chunks, F̄_t = Σ_{s<t} softmax_s(r_t·h_s/√d) F_s: causal attention whose values are whole states.

Row i is chunk i + 1, which sees the states s ≤ i. The first chunk retrieves nothing and has no row, so that no softmax is empty.
A program computes a slice of DEPTH numbers of F̄ for ROWS chunks. Each slice computes the scores again: d products per pair of
chunks beside the DEPTH products of mixing. There is no C×C tensor.

Forward traffic: F is read once from memory (a slice of all states fits in L2) and F̄ is written. The backward kernels read dF̄ for
each of dF, Δ, dr and dh, F for dr and dh, and F̄ for Δ, tile by tile; they write dF.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsbr.backends.triton import tiles, tuning
from bsbr.backends.triton.tiles import LOG2_E, dot, load_rows, of_head, store_rows


@triton.jit
def _scores(queries, keys, row, state, chunks, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """r·h/√d in base 2 of a tile of rows from `row` on and states from `state` on; -inf where a row does not see the state."""
    rows, states = row + tl.arange(0, ROWS), state + tl.arange(0, COLUMNS)
    visible = (states[None, :] <= rows[:, None]) & (states < chunks)[None, :]
    return tl.where(visible, dot(queries, tl.trans(keys)) * (scale * LOG2_E), float("-inf"))


@triton.jit
def _mix(
    meta_query, meta_key, states, out, lse, chunks, heads, group, scale,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row_tiles, slices = tl.cdiv(chunks, ROWS), tl.cdiv(WIDTH, DEPTH)
    # Neighbouring programs read the same slice of all states.
    row = (row_tiles - 1 - tl.program_id(0) % row_tiles) * ROWS  # rows that see the most states first
    first = tl.program_id(0) // row_tiles % slices * DEPTH
    sequence = tl.program_id(0) // row_tiles // slices
    batch, head = sequence // heads, sequence % heads
    meta_query = of_head(meta_query, batch, head, query_batch, query_head) + query_row
    meta_key = of_head(meta_key, batch, head // group, key_batch, key_head)
    states += tl.cast(sequence // group, tl.int64) * chunks * WIDTH
    queries = load_rows(meta_query, row, chunks, query_row, 0, D, ROWS, BLOCK_D)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DEPTH], tl.float32)
    for state in range(0, tl.minimum(row + ROWS, chunks), COLUMNS):
        keys = load_rows(meta_key, state, chunks, key_row, 0, D, COLUMNS, BLOCK_D)
        scores = _scores(queries, keys, row, state, chunks, scale, ROWS, COLUMNS)
        higher = tl.maximum(highest, tl.max(scores, axis=1))  # finite: every row sees state 0
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        values = load_rows(states, state, chunks, WIDTH, first, WIDTH, COLUMNS, DEPTH)
        mixed = mixed * shrink[:, None] + dot(weights.to(states.dtype.element_ty), values)
        highest = higher
    store_rows(
        out + tl.cast(sequence, tl.int64) * chunks * WIDTH, mixed / total[:, None], row, chunks, WIDTH, first, WIDTH, ROWS, DEPTH
    )
    if first == 0:
        rows = row + tl.arange(0, ROWS)
        tl.store(lse + tl.cast(sequence, tl.int64) * chunks + rows, highest + tl.log2(total), mask=rows < chunks)


@triton.jit
def _mix_states(
    meta_query, meta_key, lse, grad, grad_states, chunks, kv_heads, group, scale,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dF_s = Σ_t w_ts dF̄_t, over all rows that see s and all heads that share it."""
    state_tiles, slices = tl.cdiv(chunks, ROWS), tl.cdiv(WIDTH, DEPTH)
    state = tl.program_id(0) % state_tiles * ROWS
    first = tl.program_id(0) // state_tiles % slices * DEPTH
    sequence = tl.program_id(0) // state_tiles // slices
    batch, kv_head = sequence // kv_heads, sequence % kv_heads
    meta_key = of_head(meta_key, batch, kv_head, key_batch, key_head)
    keys = load_rows(meta_key, state, chunks, key_row, 0, D, ROWS, BLOCK_D)
    total = tl.zeros([ROWS, DEPTH], tl.float32)
    for member in range(group):
        query_member = of_head(meta_query, batch, kv_head * group + member, query_batch, query_head) + query_row
        offset = (tl.cast(sequence, tl.int64) * group + member) * chunks
        for row in range(state, chunks, COLUMNS):
            rows = row + tl.arange(0, COLUMNS)
            queries = load_rows(query_member, row, chunks, query_row, 0, D, COLUMNS, BLOCK_D)
            row_lse = tl.load(lse + offset + rows, mask=rows < chunks, other=0.0)
            weights = tl.exp2(_scores(queries, keys, row, state, chunks, scale, COLUMNS, ROWS) - row_lse[:, None])
            upstream = load_rows(grad + offset * WIDTH, row, chunks, WIDTH, first, WIDTH, COLUMNS, DEPTH)
            total += dot(tl.trans(weights.to(grad.dtype.element_ty)), upstream)
    store_rows(grad_states + tl.cast(sequence, tl.int64) * chunks * WIDTH, total, state, chunks, WIDTH, first, WIDTH, ROWS, DEPTH)


@triton.jit
def _score_gradient(
    queries, keys, row_lse, delta, grad, states, row, state, chunks, scale,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores r·h of a tile of pairs, w (dF̄·F − Δ)/√d."""
    grad_weights = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, WIDTH, DEPTH):
        upstream = load_rows(grad, row, chunks, WIDTH, first, WIDTH, ROWS, DEPTH)
        values = load_rows(states, state, chunks, WIDTH, first, WIDTH, COLUMNS, DEPTH)
        grad_weights += dot(upstream, tl.trans(values))
    weights = tl.exp2(_scores(queries, keys, row, state, chunks, scale, ROWS, COLUMNS) - row_lse[:, None])
    return weights * (grad_weights - delta[:, None]) * scale


@triton.jit
def _mix_queries(
    meta_query, meta_key, states, out, grad, lse, delta, grad_meta_query, chunks, heads, group, scale,
    query_batch, query_head, query_row, key_batch, key_head, key_row, grad_batch, grad_head, grad_row,
    D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Δ_t = dF̄_t·F̄_t, which `_mix_keys` reads, and dr_t = Σ_s w_ts (dF̄_t·F_s − Δ_t) h_s/√d."""
    row_tiles = tl.cdiv(chunks, ROWS)
    row = (row_tiles - 1 - tl.program_id(0) % row_tiles) * ROWS
    sequence = tl.program_id(0) // row_tiles
    batch, head = sequence // heads, sequence % heads
    meta_query = of_head(meta_query, batch, head, query_batch, query_head) + query_row
    meta_key = of_head(meta_key, batch, head // group, key_batch, key_head)
    offset = tl.cast(sequence, tl.int64) * chunks
    states += tl.cast(sequence // group, tl.int64) * chunks * WIDTH
    # By the same products as dF̄·F: a chunk that sees one state has F̄ = F, and then the difference must be exactly 0.
    grad_weights = tl.zeros([ROWS, ROWS], tl.float32)
    for first in range(0, WIDTH, DEPTH):
        upstream = load_rows(grad + offset * WIDTH, row, chunks, WIDTH, first, WIDTH, ROWS, DEPTH)
        mixed = load_rows(out + offset * WIDTH, row, chunks, WIDTH, first, WIDTH, ROWS, DEPTH)
        grad_weights += dot(upstream, tl.trans(mixed))
    rows = row + tl.arange(0, ROWS)
    row_delta = tl.sum(tl.where(rows[:, None] == rows[None, :], grad_weights, 0.0), axis=1)
    tl.store(delta + offset + rows, row_delta, mask=rows < chunks)
    row_lse = tl.load(lse + offset + rows, mask=rows < chunks, other=0.0)
    queries = load_rows(meta_query, row, chunks, query_row, 0, D, ROWS, BLOCK_D)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for state in range(0, tl.minimum(row + ROWS, chunks), COLUMNS):
        keys = load_rows(meta_key, state, chunks, key_row, 0, D, COLUMNS, BLOCK_D)
        grad_scores = _score_gradient(
            queries, keys, row_lse, row_delta, grad + offset * WIDTH, states, row, state, chunks, scale, WIDTH, ROWS, COLUMNS, DEPTH
        )
        total += dot(grad_scores.to(meta_key.dtype.element_ty), keys)
    store_rows(
        of_head(grad_meta_query, batch, head, grad_batch, grad_head) + grad_row, total, row, chunks, grad_row, 0, D, ROWS, BLOCK_D
    )


@triton.jit
def _mix_keys(
    meta_query, meta_key, states, grad, lse, delta, grad_meta_key, chunks, kv_heads, group, scale,
    query_batch, query_head, query_row, key_batch, key_head, key_row, grad_batch, grad_head, grad_row,
    D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dh_s = Σ_t w_ts (dF̄_t·F_s − Δ_t) r_t/√d, over all rows that see s and all heads that share it."""
    state_tiles = tl.cdiv(chunks, ROWS)
    state = tl.program_id(0) % state_tiles * ROWS
    sequence = tl.program_id(0) // state_tiles
    batch, kv_head = sequence // kv_heads, sequence % kv_heads
    states += tl.cast(sequence, tl.int64) * chunks * WIDTH
    keys = load_rows(of_head(meta_key, batch, kv_head, key_batch, key_head), state, chunks, key_row, 0, D, ROWS, BLOCK_D)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for member in range(group):
        query_member = of_head(meta_query, batch, kv_head * group + member, query_batch, query_head) + query_row
        offset = (tl.cast(sequence, tl.int64) * group + member) * chunks
        for row in range(state, chunks, COLUMNS):
            rows = row + tl.arange(0, COLUMNS)
            queries = load_rows(query_member, row, chunks, query_row, 0, D, COLUMNS, BLOCK_D)
            row_lse = tl.load(lse + offset + rows, mask=rows < chunks, other=0.0)
            row_delta = tl.load(delta + offset + rows, mask=rows < chunks, other=0.0)
            grad_scores = _score_gradient(
                queries, keys, row_lse, row_delta, grad + offset * WIDTH, states, row, state, chunks, scale,
                WIDTH, COLUMNS, ROWS, DEPTH,
            )  # fmt: skip
            total += dot(tl.trans(grad_scores.to(meta_query.dtype.element_ty)), queries)
    store_rows(of_head(grad_meta_key, batch, kv_head, grad_batch, grad_head), total, state, chunks, grad_row, 0, D, ROWS, BLOCK_D)


def mix(meta_query: Tensor, meta_key: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """F̄ of every chunk but the first.

    Args:
        meta_query: r [batch, heads, C, head_dim].
        meta_key: h [batch, kv_heads, C − 1 or more, head_dim].
        states: F [batch, kv_heads, C − 1, d_r, head_dim].

    Returns:
        F̄ [batch, heads, C − 1, d_r, head_dim], and the base-2 logarithm of each softmax's sum [batch, heads, C − 1].
    """
    batch, heads = meta_query.shape[:2]
    kv_heads, chunks, d_r, head_dim = states.shape[1:]
    width = d_r * head_dim
    out = torch.empty(batch, heads, chunks, d_r, head_dim, dtype=states.dtype, device=states.device)
    lse = tiles.wide((batch, heads, chunks), states)
    sizes = _sizes("mix", meta_query, chunks, width)
    tiles.launch(
        _mix,
        batch * heads * triton.cdiv(chunks, sizes["ROWS"]) * triton.cdiv(width, sizes["DEPTH"]),
        *(meta_query, meta_key, states, out, lse, chunks, heads, heads // kv_heads, 1 / math.sqrt(meta_query.shape[-1])),
        *(*tiles.strides(meta_query), *tiles.strides(meta_key)),
        **sizes,
    )
    return out, lse


def mix_backward(
    meta_query: Tensor, meta_key: Tensor, states: Tensor, out: Tensor, lse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dr, dh and dF, from dF̄ of the shape of `out`; the other arguments are those that `mix` took and returned."""
    batch, heads = meta_query.shape[:2]
    kv_heads, chunks, d_r, head_dim = states.shape[1:]
    width, group, scale = d_r * head_dim, heads // kv_heads, 1 / math.sqrt(meta_query.shape[-1])
    grad_states = torch.empty_like(states)
    sizes = _sizes("mix_states", meta_query, chunks, width)
    tiles.launch(
        _mix_states,
        batch * kv_heads * triton.cdiv(chunks, sizes["ROWS"]) * triton.cdiv(width, sizes["DEPTH"]),
        *(meta_query, meta_key, lse, grad, grad_states, chunks, kv_heads, group, scale),
        *(*tiles.strides(meta_query), *tiles.strides(meta_key)),
        **sizes,
    )
    # Zeros where no program writes: the first chunk retrieves nothing, and no chunk reads meta keys after the first C − 1.
    grad_meta_query, grad_meta_key, delta = tiles.like(meta_query).zero_(), tiles.like(meta_key).zero_(), torch.empty_like(lse)
    sizes = _sizes("mix_scores", meta_query, chunks, width)
    blocks = triton.cdiv(chunks, sizes["ROWS"])
    tiles.launch(
        _mix_queries,
        batch * heads * blocks,
        *(meta_query, meta_key, states, out, grad, lse, delta, grad_meta_query, chunks, heads, group, scale),
        *(*tiles.strides(meta_query), *tiles.strides(meta_key), *tiles.strides(grad_meta_query)),
        **sizes,
    )
    tiles.launch(
        _mix_keys,
        batch * kv_heads * blocks,
        *(meta_query, meta_key, states, grad, lse, delta, grad_meta_key, chunks, kv_heads, group, scale),
        *(*tiles.strides(meta_query), *tiles.strides(meta_key), *tiles.strides(grad_meta_key)),
        **sizes,
    )
    return grad_meta_query, grad_meta_key, grad_states


def _sizes(step: str, meta_query: Tensor, chunks: int, width: int) -> dict[str, int]:
    head_dim = meta_query.shape[-1]
    tile = tuning.tile(step, meta_query, head_dim=head_dim, chunk_size=1)
    return {
        "D": head_dim,
        "WIDTH": width,
        "BLOCK_D": tiles.padded(head_dim),
        "ROWS": min(tile.rows, tiles.padded(chunks)),
        "COLUMNS": min(tile.columns, tiles.padded(chunks)),
        "DEPTH": min(tile.depth, tiles.padded(width)),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
