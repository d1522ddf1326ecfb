"""States of chunks, F_s = φ(K_s)ᵀ V_s. The same kernel computes dF̄ from φ(Q) and dO instead of φ(K) and V.

Traffic: K is read once for each tile of V's columns (once up to head_dim 64), V once; F is written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsbr.backends.triton import tiles, tuning
from bsbr.backends.triton.tiles import dot, inverse_norm, load_rows, of_head, store_rows


@triton.jit
def _states(
    x, v, gain, out, first, chunks, heads, time, chunk_size,
    x_batch, x_head, x_row, v_batch, v_head, v_row,
    D_R: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, GAIN: tl.constexpr,
    BLOCK_R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(D, COLUMNS)
    column = tl.program_id(0) % column_tiles * COLUMNS
    state = tl.program_id(0) // column_tiles  # index over batch, heads and chunks
    chunk, batch, head = state % chunks, state // chunks // heads, state // chunks % heads
    x, v = of_head(x, batch, head, x_batch, x_head), of_head(v, batch, head, v_batch, v_head)
    start = (first + chunk) * chunk_size
    stop = tl.minimum(start + chunk_size, time)
    total = tl.zeros([BLOCK_R, COLUMNS], tl.float32)
    for row in range(start, stop, ROWS):
        features = load_rows(x, row, stop, x_row, 0, D_R, ROWS, BLOCK_R)
        if UNIT:
            features = (features.to(tl.float32) * inverse_norm(features)[:, None]).to(x.dtype.element_ty)
        total += dot(tl.trans(features), load_rows(v, row, stop, v_row, column, D, ROWS, COLUMNS))
    if GAIN:
        total *= tl.load(gain + head).to(tl.float32)
    store_rows(out + tl.cast(state, tl.int64) * (D_R * D), total, 0, D_R, D, column, D, BLOCK_R, COLUMNS)


def chunk_states(
    x: Tensor, v: Tensor, *, first: int, chunks: int, chunk_size: int, unit: bool, gain: Tensor | None = None
) -> Tensor:
    """g Σ_i φ(x_i) v_iᵀ over the tokens of each chunk.

    Args:
        x: [batch, heads, time, d_r] with contiguous rows: φ(x), or x itself if `unit`.
        v: [batch, heads, time, head_dim] with contiguous rows.
        first, chunks: index of the first chunk, and number of chunks.
        chunk_size: tokens in a chunk.
        unit: whether φ is the unit norm.
        gain: g [heads]; None means 1.

    Returns:
        [batch, heads, chunks, d_r, head_dim] in the dtype of x.
    """
    batch, heads, time, d_r = x.shape
    head_dim = v.shape[-1]
    out = torch.empty(batch, heads, chunks, d_r, head_dim, dtype=x.dtype, device=x.device)
    tile = tuning.tile("states", x, head_dim=max(d_r, head_dim), chunk_size=chunk_size)
    columns = min(tile.columns, tiles.padded(head_dim))
    tiles.launch(
        _states,
        out.shape[:3].numel() * triton.cdiv(head_dim, columns),
        *(x, v, gain, out, first, chunks, heads, time, chunk_size, *tiles.strides(x), *tiles.strides(v)),
        D_R=d_r,
        D=head_dim,
        UNIT=unit,
        GAIN=gain is not None,
        BLOCK_R=tiles.padded(d_r),
        ROWS=tile.rows,
        COLUMNS=columns,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
