"""Retrieval where each chunk mixes only the top_k states of the highest scores: F̄_t = Σ_m w_tm F_{s(t, m)}.

Scores, selection and weights are torch operations on tensors of chunks, quadratic in the number of chunks; the kernels gather
and scatter states, linear in it. Row i is chunk i + 1, which sees i + 1 states: of its top_k slots, those with m ≤ i have a state,
and the others are never read.

Forward traffic of the kernel: per chunk, top_k states are read (from L2 if they fit) and one F̄ is written.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsbr.backends.triton import tiles, tuning

ROWS_AT_ONCE = 256  # rows of scores that are in memory together


def select(meta_query: Tensor, meta_key: Tensor, chunks: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Selects the `top_k` states of the highest scores for each row, the highest first and the earliest of equals.

    Args:
        meta_query: r [batch, heads, C, head_dim].
        meta_key: h [batch, kv_heads, C − 1 or more, head_dim].
        chunks: C − 1, the number of rows and of states.
        top_k: number of states to select, below `chunks`.

    Returns:
        Weights [batch, heads, chunks, top_k] in float32, differentiable in r and h, 0 in slots without a state; and the indices
        of the selected states (int32) of the same shape.
    """
    heads, head_dim = meta_query.shape[1], meta_query.shape[3]
    kv_heads = meta_key.shape[1]
    rows = meta_query[:, :, 1:].unflatten(1, (kv_heads, heads // kv_heads)).float()
    keys = meta_key[:, :, :chunks].unsqueeze(2).float()
    selected = []
    with torch.no_grad():
        for start in range(0, chunks, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, chunks)
            scores = rows[:, :, :, start:stop] @ keys[:, :, :, : max(stop, top_k)].mT / math.sqrt(head_dim)
            visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=meta_query.device).tril(start)
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
            # Not torch.topk: which of equal scores it selects depends on the number of columns, that is, on the future.
            selected.append(scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k])
    slots = torch.arange(top_k, device=meta_query.device) <= torch.arange(chunks, device=meta_query.device)[:, None]
    states = torch.cat(selected, dim=3).where(slots, 0)
    group_keys = keys.expand(-1, -1, heads // kv_heads, -1, -1).flatten(2, 3)
    # The heads of a group read the same keys: the copy of each head begins a multiple of `chunks` later.
    copy = torch.arange(heads // kv_heads, device=meta_query.device).view(-1, 1, 1) * chunks
    offset = (states + copy).flatten(2).unsqueeze(-1).expand(-1, -1, -1, head_dim)
    scores = (rows.unsqueeze(-2) * group_keys.gather(2, offset).view(*states.shape, head_dim)).sum(dim=-1) / math.sqrt(head_dim)
    weights = torch.softmax(scores.masked_fill(~slots, -torch.inf), dim=-1)
    return weights.flatten(1, 2), states.flatten(1, 2).int()


@triton.jit
def _gather(states, weights, selected, out, chunks, group, TOP_K: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    row = tl.program_id(0) // tl.cdiv(WIDTH, DEPTH)
    columns = tl.program_id(0) % tl.cdiv(WIDTH, DEPTH) * DEPTH + tl.arange(0, DEPTH)
    states += tl.cast(row // chunks // group, tl.int64) * chunks * WIDTH
    total = tl.zeros([DEPTH], tl.float32)
    for slot in range(tl.minimum(TOP_K, row % chunks + 1)):
        offset = tl.cast(row, tl.int64) * TOP_K + slot
        state = states + tl.cast(tl.load(selected + offset), tl.int64) * WIDTH
        total += tl.load(weights + offset) * tl.load(state + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + tl.cast(row, tl.int64) * WIDTH + columns, total.to(out.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def _gather_weights(
    states, selected, grad, grad_weights, chunks, group, TOP_K: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr
):
    """dw_tm = dF̄_t·F_{s(t, m)}, one program per pair (t, m); zero in slots without a state."""
    pair = tl.program_id(0)
    row = pair // TOP_K
    states += tl.cast(row // chunks // group, tl.int64) * chunks * WIDTH + tl.cast(tl.load(selected + pair), tl.int64) * WIDTH
    grad += tl.cast(row, tl.int64) * WIDTH
    total = tl.zeros([DEPTH], tl.float32)
    for first in range(0, tl.where(pair % TOP_K <= row % chunks, WIDTH, 0), DEPTH):
        columns = first + tl.arange(0, DEPTH)
        upstream = tl.load(grad + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        total += upstream * tl.load(states + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    tl.store(grad_weights + pair, tl.sum(total))


@triton.jit
def _scatter(
    grad, weights, pairs, ends, grad_states, chunks, group, TOP_K: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """dF_s = Σ w_tm dF̄_t over the pairs that selected s, which follow each other in `pairs` up to ends[s]."""
    state = tl.program_id(0) // tl.cdiv(WIDTH, DEPTH)
    columns = tl.program_id(0) % tl.cdiv(WIDTH, DEPTH) * DEPTH + tl.arange(0, DEPTH)
    sequence = tl.cast(state // chunks, tl.int64)
    begin = tl.load(ends + state - 1, mask=state % chunks > 0, other=0)
    pairs += sequence * (group * chunks * TOP_K)
    total = tl.zeros([DEPTH], tl.float32)
    for offset in range(begin, tl.load(ends + state)):
        pair = sequence * (group * chunks * TOP_K) + tl.load(pairs + offset)
        row = pair // TOP_K
        if pair % TOP_K <= row % chunks:
            upstream = tl.load(grad + row * WIDTH + columns, mask=columns < WIDTH, other=0.0)
            total += tl.load(weights + pair) * upstream.to(tl.float32)
    tl.store(grad_states + tl.cast(state, tl.int64) * WIDTH + columns, total.to(grad_states.dtype.element_ty), mask=columns < WIDTH)


def gather(states: Tensor, weights: Tensor, selected: Tensor) -> Tensor:
    """F̄ [batch, heads, C − 1, d_r, head_dim] from F [batch, kv_heads, C − 1, d_r, head_dim] and the results of `select`."""
    out = states.new_empty(*selected.shape[:3], *states.shape[3:])
    sizes = _sizes(states, selected)
    programs = selected.shape[:3].numel() * triton.cdiv(sizes["WIDTH"], sizes["DEPTH"])
    tiles.launch(_gather, programs, states, weights, selected, out, *_counts(states, selected), **sizes)
    return out


def gather_backward(states: Tensor, weights: Tensor, selected: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """dF and dw, from dF̄."""
    batch, kv_heads, chunks = states.shape[:3]
    sizes, counts = _sizes(states, selected), _counts(states, selected)
    grad_weights = torch.empty_like(weights)
    tiles.launch(_gather_weights, selected.numel(), states, selected, grad, grad_weights, *counts, **sizes)
    ordered, pairs = selected.reshape(batch, kv_heads, -1).sort(dim=-1, stable=True)
    every = torch.arange(chunks, device=selected.device, dtype=selected.dtype).expand(batch, kv_heads, chunks)
    ends = torch.searchsorted(ordered, every.contiguous(), right=True)
    grad_states = torch.empty_like(states)
    programs = batch * kv_heads * chunks * triton.cdiv(sizes["WIDTH"], sizes["DEPTH"])
    tiles.launch(_scatter, programs, grad, weights, pairs, ends, grad_states, *counts, **sizes)
    return grad_states, grad_weights


def _counts(states: Tensor, selected: Tensor) -> tuple[int, int]:
    return states.shape[2], selected.shape[1] // states.shape[1]


def _sizes(states: Tensor, selected: Tensor) -> dict[str, int]:
    width = states.shape[3:].numel()
    tile = tuning.tile("gather", states, head_dim=states.shape[-1], chunk_size=1)
    return {
        "TOP_K": selected.shape[3],
        "WIDTH": width,
        "DEPTH": min(tile.depth, tiles.padded(width)),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
