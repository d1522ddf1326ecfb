"""Output kernel: o = softmax(QKᵀ/√d ⊙ M_in) V + g φ(Q) F̄ in one pass that writes o once.

A program computes ROWS queries of one chunk. It loops over the keys of that chunk and its overlap as flash attention does, and
then over slices of the chunk's F̄. If φ is the unit norm, it reads Q and multiplies Q F̄ by the inverse norm at the end.

Traffic: Q, K and V are read from memory once, and F̄ once; later tiles of the same chunk and overlaps read K, V and F̄ from L2.
Written are o and, for the backward pass, 4 bytes per head and token.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from bsbr.backends.triton import tiles, tuning
from bsbr.backends.triton.tiles import LOG2_E, dot, inverse_norm, load_rows, of_head, store_rows


@triton.jit
def _output(
    q, k, v, phi, retrieved, gain, out, lse, time, chunk_size, overlap, heads, group, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    phi_batch, phi_head, phi_row, out_batch, out_head, out_row,
    D: tl.constexpr, D_R: tl.constexpr, UNIT: tl.constexpr, GAIN: tl.constexpr, RETRIEVES: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row_tiles, chunks = tl.cdiv(chunk_size, ROWS), tl.cdiv(time, chunk_size)
    tile = tl.program_id(0) % row_tiles
    chunk = tl.program_id(0) // row_tiles % chunks
    sequence = tl.program_id(0) // row_tiles // chunks
    batch, head = sequence // heads, sequence % heads
    q, phi = of_head(q, batch, head, q_batch, q_head), of_head(phi, batch, head, phi_batch, phi_head)
    k, v = of_head(k, batch, head // group, k_batch, k_head), of_head(v, batch, head // group, v_batch, v_head)
    start, stop = chunk * chunk_size + tile * ROWS, tl.minimum((chunk + 1) * chunk_size, time)
    queries = load_rows(q, start, stop, q_row, 0, D, ROWS, BLOCK_D)
    rows = start + tl.arange(0, ROWS)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, BLOCK_D], tl.float32)
    last = tl.minimum(start + ROWS, stop)
    for column in range(tl.maximum(chunk * chunk_size - overlap, 0), last, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        keys = load_rows(k, column, last, k_row, 0, D, COLUMNS, BLOCK_D)
        scores = dot(queries, tl.trans(keys)) * (scale * LOG2_E)
        scores = tl.where((columns[None, :] <= rows[:, None]) & (columns < last)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))  # finite: every row sees the first column
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        values = load_rows(v, column, last, v_row, 0, D, COLUMNS, BLOCK_D)
        attended = attended * shrink[:, None] + dot(weights.to(v.dtype.element_ty), values)
        highest = higher
    attended /= total[:, None]
    if RETRIEVES:
        retrieved += (tl.cast(sequence, tl.int64) * (chunks - 1) + chunk - 1) * (D_R * D)
        read_out = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for depth in range(0, tl.where(chunk > 0, D_R, 0), DEPTH):
            features = load_rows(phi, start, stop, phi_row, depth, D_R, ROWS, DEPTH)
            read_out += dot(features, load_rows(retrieved, depth, D_R, D, 0, D, DEPTH, BLOCK_D))
        if UNIT:
            read_out *= inverse_norm(queries)[:, None]
        if GAIN:
            read_out *= tl.load(gain + head).to(tl.float32)
        attended += read_out
    store_rows(of_head(out, batch, head, out_batch, out_head), attended, start, stop, out_row, 0, D, ROWS, BLOCK_D)
    tl.store(lse + tl.cast(sequence, tl.int64) * time + rows, highest + tl.log2(total), mask=rows < stop)


def output(
    q: Tensor, k: Tensor, v: Tensor, phi: Tensor, retrieved: Tensor | None, gain: Tensor | None,
    *, chunk_size: int, chunk_overlap: int, unit: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Local attention plus read-out.

    Args:
        q: [batch, heads, time, head_dim].
        k, v: [batch, kv_heads, time, head_dim].
        phi: φ(q) [batch, heads, time, d_r], or q itself if `unit`.
        retrieved: F̄ of all chunks but the first [batch, heads, C − 1, d_r, head_dim]; None if there is only one chunk.
        gain: g [heads]; None means 1.
        chunk_size, chunk_overlap: see `BSBROptions`.
        unit: whether φ is the unit norm.

    Returns:
        o [batch, heads, time, head_dim], with the strides of q, and the base-2 logarithm of the sum of each local softmax
        [batch, heads, time].
    """
    batch, heads, time, head_dim = q.shape
    out, lse = tiles.like(q), tiles.wide((batch, heads, time), q)
    tile = tuning.tile("output", q, head_dim=max(head_dim, phi.shape[-1]), chunk_size=chunk_size)
    tiles.launch(
        _output,
        batch * heads * triton.cdiv(time, chunk_size) * triton.cdiv(chunk_size, tile.rows),
        *(q, k, v, phi, retrieved, gain, out, lse),
        *(time, chunk_size, chunk_overlap, heads, heads // k.shape[1], 1 / math.sqrt(head_dim)),
        *(*tiles.strides(q), *tiles.strides(k), *tiles.strides(v), *tiles.strides(phi), *tiles.strides(out)),
        D=head_dim,
        D_R=phi.shape[-1],
        UNIT=unit,
        GAIN=gain is not None,
        RETRIEVES=retrieved is not None,
        BLOCK_D=tiles.padded(head_dim),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=min(tile.depth, tiles.padded(phi.shape[-1])),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out, lse
