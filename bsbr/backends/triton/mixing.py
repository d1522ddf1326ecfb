"""F̄_t = Σ_{s<t} softmax_s(r_t·h_s/√d) F_s: causal attention over chunks, whose values are whole states; no C×C tensor.

Row i of everything here is the chunk i + 1, which sees the states s ≤ i: the first chunk retrieves nothing and has no row,
so that no softmax is empty. A program holds `rows` chunks by a slice of `depth` numbers of a state, and takes the scores
anew for each slice: d products a pair beside the depth that it mixes.

Traffic forward: reads F once from memory (a slice of every state fits L2), writes F̄. Backward: F̄, dF̄ and F once, dF̄ and F
once more for each of dr and dh in tiles, writes dF.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsbr.backends.triton import tiles, tuning
from bsbr.backends.triton.tiles import LOG2_E, dot, load_rows, of_head, store_rows


@triton.jit
def _scores(asks, keys, row, state, chunks, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """r·h of rows `row`… by states `state`…, in base 2; -inf where a row does not see the state."""
    rows, states = row + tl.arange(0, ROWS), state + tl.arange(0, COLUMNS)
    visible = (states[None, :] <= rows[:, None]) & (states < chunks)[None, :]
    return tl.where(visible, dot(asks, tl.trans(keys)) * (scale * LOG2_E), float("-inf"))


@triton.jit
def _mix(
    r, h, f, out, lse, chunks, heads, group, scale,
    r_batch, r_head, r_row, h_batch, h_head, h_row,
    D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row_tiles, slices = tl.cdiv(chunks, ROWS), tl.cdiv(WIDTH, DEPTH)
    # Neighbouring programs share a slice of all states.
    row = (row_tiles - 1 - tl.program_id(0) % row_tiles) * ROWS  # the longest first
    first = tl.program_id(0) // row_tiles % slices * DEPTH
    sequence = tl.program_id(0) // row_tiles // slices
    batch, head = sequence // heads, sequence % heads
    r, h = of_head(r, batch, head, r_batch, r_head) + r_row, of_head(h, batch, head // group, h_batch, h_head)
    f += tl.cast(sequence // group, tl.int64) * chunks * WIDTH
    asks = load_rows(r, row, chunks, r_row, 0, D, ROWS, BLOCK_D)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DEPTH], tl.float32)
    for state in range(0, tl.minimum(row + ROWS, chunks), COLUMNS):
        keys = load_rows(h, state, chunks, h_row, 0, D, COLUMNS, BLOCK_D)
        scores = _scores(asks, keys, row, state, chunks, scale, ROWS, COLUMNS)
        higher = tl.maximum(highest, tl.max(scores, axis=1))  # finite: every row sees state 0
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        values = load_rows(f, state, chunks, WIDTH, first, WIDTH, COLUMNS, DEPTH)
        mixed = mixed * shrink[:, None] + dot(weights.to(f.dtype.element_ty), values)
        highest = higher
    store_rows(
        out + tl.cast(sequence, tl.int64) * chunks * WIDTH, mixed / total[:, None], row, chunks, WIDTH, first, WIDTH, ROWS, DEPTH
    )
    if first == 0:
        rows = row + tl.arange(0, ROWS)
        tl.store(lse + tl.cast(sequence, tl.int64) * chunks + rows, highest + tl.log2(total), mask=rows < chunks)


@triton.jit
def _mix_states(
    r, h, lse, grad, grad_f, chunks, kv_heads, group, scale,
    r_batch, r_head, r_row, h_batch, h_head, h_row,
    D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dF_s = Σ_t w_ts dF̄_t, over all rows that see s and all heads that share it."""
    state_tiles, slices = tl.cdiv(chunks, ROWS), tl.cdiv(WIDTH, DEPTH)
    state = tl.program_id(0) % state_tiles * ROWS
    first = tl.program_id(0) // state_tiles % slices * DEPTH
    sequence = tl.program_id(0) // state_tiles // slices
    batch, kv_head = sequence // kv_heads, sequence % kv_heads
    h = of_head(h, batch, kv_head, h_batch, h_head)
    keys = load_rows(h, state, chunks, h_row, 0, D, ROWS, BLOCK_D)
    total = tl.zeros([ROWS, DEPTH], tl.float32)
    for member in range(group):
        r_member = of_head(r, batch, kv_head * group + member, r_batch, r_head) + r_row
        at = (tl.cast(sequence, tl.int64) * group + member) * chunks
        for row in range(state, chunks, COLUMNS):
            rows = row + tl.arange(0, COLUMNS)
            asks = load_rows(r_member, row, chunks, r_row, 0, D, COLUMNS, BLOCK_D)
            normal = tl.load(lse + at + rows, mask=rows < chunks, other=0.0)
            weights = tl.exp2(_scores(asks, keys, row, state, chunks, scale, COLUMNS, ROWS) - normal[:, None])
            upstream = load_rows(grad + at * WIDTH, row, chunks, WIDTH, first, WIDTH, COLUMNS, DEPTH)
            total += dot(tl.trans(weights.to(grad.dtype.element_ty)), upstream)
    store_rows(grad_f + tl.cast(sequence, tl.int64) * chunks * WIDTH, total, state, chunks, WIDTH, first, WIDTH, ROWS, DEPTH)


@triton.jit
def _score_gradient(
    asks, keys, normal, delta, grad, f, row, state, chunks, scale,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """w (dF̄·F − Δ)/√d of a tile of pairs: what dr and dh both are sums of."""
    against = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, WIDTH, DEPTH):
        upstream = load_rows(grad, row, chunks, WIDTH, first, WIDTH, ROWS, DEPTH)
        values = load_rows(f, state, chunks, WIDTH, first, WIDTH, COLUMNS, DEPTH)
        against += dot(upstream, tl.trans(values))
    weights = tl.exp2(_scores(asks, keys, row, state, chunks, scale, ROWS, COLUMNS) - normal[:, None])
    return weights * (against - delta[:, None]) * scale


@triton.jit
def _mix_asks(
    r, h, f, out, grad, lse, delta, grad_r, chunks, heads, group, scale,
    r_batch, r_head, r_row, h_batch, h_head, h_row, grad_batch, grad_head, grad_row,
    D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Δ_t = dF̄_t·F̄_t, kept for `_mix_keys`, and dr_t = Σ_s w_ts (dF̄_t·F_s − Δ_t) h_s/√d."""
    row_tiles = tl.cdiv(chunks, ROWS)
    row = (row_tiles - 1 - tl.program_id(0) % row_tiles) * ROWS
    sequence = tl.program_id(0) // row_tiles
    batch, head = sequence // heads, sequence % heads
    r, h = of_head(r, batch, head, r_batch, r_head) + r_row, of_head(h, batch, head // group, h_batch, h_head)
    at = tl.cast(sequence, tl.int64) * chunks
    f += tl.cast(sequence // group, tl.int64) * chunks * WIDTH
    # By the same products as dF̄·F: of a chunk that sees one state, F̄ is F, and their difference is to be 0 and not rounding.
    against = tl.zeros([ROWS, ROWS], tl.float32)
    for first in range(0, WIDTH, DEPTH):
        upstream = load_rows(grad + at * WIDTH, row, chunks, WIDTH, first, WIDTH, ROWS, DEPTH)
        mixed = load_rows(out + at * WIDTH, row, chunks, WIDTH, first, WIDTH, ROWS, DEPTH)
        against += dot(upstream, tl.trans(mixed))
    rows = row + tl.arange(0, ROWS)
    own = tl.sum(tl.where(rows[:, None] == rows[None, :], against, 0.0), axis=1)
    tl.store(delta + at + rows, own, mask=rows < chunks)
    normal = tl.load(lse + at + rows, mask=rows < chunks, other=0.0)
    asks = load_rows(r, row, chunks, r_row, 0, D, ROWS, BLOCK_D)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for state in range(0, tl.minimum(row + ROWS, chunks), COLUMNS):
        keys = load_rows(h, state, chunks, h_row, 0, D, COLUMNS, BLOCK_D)
        pairs = _score_gradient(
            asks, keys, normal, own, grad + at * WIDTH, f, row, state, chunks, scale, WIDTH, ROWS, COLUMNS, DEPTH
        )
        total += dot(pairs.to(h.dtype.element_ty), keys)
    store_rows(of_head(grad_r, batch, head, grad_batch, grad_head) + grad_row, total, row, chunks, grad_row, 0, D, ROWS, BLOCK_D)


@triton.jit
def _mix_keys(
    r, h, f, grad, lse, delta, grad_h, chunks, kv_heads, group, scale,
    r_batch, r_head, r_row, h_batch, h_head, h_row, grad_batch, grad_head, grad_row,
    D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dh_s = Σ_t w_ts (dF̄_t·F_s − Δ_t) r_t/√d, over all rows that see s and all heads that share it."""
    state_tiles = tl.cdiv(chunks, ROWS)
    state = tl.program_id(0) % state_tiles * ROWS
    sequence = tl.program_id(0) // state_tiles
    batch, kv_head = sequence // kv_heads, sequence % kv_heads
    f += tl.cast(sequence, tl.int64) * chunks * WIDTH
    keys = load_rows(of_head(h, batch, kv_head, h_batch, h_head), state, chunks, h_row, 0, D, ROWS, BLOCK_D)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for member in range(group):
        r_member = of_head(r, batch, kv_head * group + member, r_batch, r_head) + r_row
        at = (tl.cast(sequence, tl.int64) * group + member) * chunks
        for row in range(state, chunks, COLUMNS):
            rows = row + tl.arange(0, COLUMNS)
            asks = load_rows(r_member, row, chunks, r_row, 0, D, COLUMNS, BLOCK_D)
            normal = tl.load(lse + at + rows, mask=rows < chunks, other=0.0)
            own = tl.load(delta + at + rows, mask=rows < chunks, other=0.0)
            pairs = _score_gradient(
                asks, keys, normal, own, grad + at * WIDTH, f, row, state, chunks, scale, WIDTH, COLUMNS, ROWS, DEPTH
            )
            total += dot(tl.trans(pairs.to(r.dtype.element_ty)), asks)
    store_rows(of_head(grad_h, batch, kv_head, grad_batch, grad_head), total, state, chunks, grad_row, 0, D, ROWS, BLOCK_D)


def mix(r: Tensor, h: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """F̄ of every chunk but the first [batch, heads, C - 1, d_r, head_dim], and the log of its softmax's sum, in base 2.

    r: [batch, heads, C, head_dim]; h: [batch, kv_heads, C - 1 or more, head_dim]; states: [batch, kv_heads, C - 1, d_r, head_dim].
    """
    batch, heads = r.shape[:2]
    kv_heads, chunks, d_r, head_dim = states.shape[1:]
    width = d_r * head_dim
    out = torch.empty(batch, heads, chunks, d_r, head_dim, dtype=states.dtype, device=states.device)
    lse = tiles.wide((batch, heads, chunks), states)
    sizes = _sizes("mix", r, chunks, width)
    tiles.launch(
        _mix,
        batch * heads * triton.cdiv(chunks, sizes["ROWS"]) * triton.cdiv(width, sizes["DEPTH"]),
        *(r, h, states, out, lse, chunks, heads, heads // kv_heads, 1 / math.sqrt(r.shape[-1])),
        *(*tiles.strides(r), *tiles.strides(h)),
        **sizes,
    )
    return out, lse


def mix_backward(r: Tensor, h: Tensor, states: Tensor, out: Tensor, lse: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dr, dh, dF from dF̄, which has the shape of `out`; the rest as `mix` took and gave it."""
    batch, heads = r.shape[:2]
    kv_heads, chunks, d_r, head_dim = states.shape[1:]
    width, group, scale = d_r * head_dim, heads // kv_heads, 1 / math.sqrt(r.shape[-1])
    grad_f = torch.empty_like(states)
    sizes = _sizes("mix_states", r, chunks, width)
    tiles.launch(
        _mix_states,
        batch * kv_heads * triton.cdiv(chunks, sizes["ROWS"]) * triton.cdiv(width, sizes["DEPTH"]),
        *(r, h, lse, grad, grad_f, chunks, kv_heads, group, scale, *tiles.strides(r), *tiles.strides(h)),
        **sizes,
    )
    # The first chunk asks in vain and later keys are nobody's: zeros where no program writes.
    grad_r, grad_h, delta = tiles.like(r).zero_(), tiles.like(h).zero_(), torch.empty_like(lse)
    sizes = _sizes("mix_scores", r, chunks, width)
    blocks = triton.cdiv(chunks, sizes["ROWS"])
    tiles.launch(
        _mix_asks,
        batch * heads * blocks,
        *(r, h, states, out, grad, lse, delta, grad_r, chunks, heads, group, scale),
        *(*tiles.strides(r), *tiles.strides(h), *tiles.strides(grad_r)),
        **sizes,
    )
    tiles.launch(
        _mix_keys,
        batch * kv_heads * blocks,
        *(r, h, states, grad, lse, delta, grad_h, chunks, kv_heads, group, scale),
        *(*tiles.strides(r), *tiles.strides(h), *tiles.strides(grad_h)),
        **sizes,
    )
    return grad_r, grad_h, grad_f


def _sizes(step: str, r: Tensor, chunks: int, width: int) -> dict[str, int]:
    head_dim = r.shape[-1]
    tile = tuning.tile(step, r, head_dim=head_dim, chunk_size=1)
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
