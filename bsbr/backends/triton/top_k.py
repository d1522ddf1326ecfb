"""The mixing where each chunk keeps only its `top_k` best-scored states: F̄_t = Σ_m w_tm F_{s(t, m)}, linear in time.

torch chooses and weighs, on tensors of chunks and not of tokens; the kernels gather and scatter states. Row i is the chunk
i + 1, which sees i + 1 states: its places m ≤ i hold one, the others none and are never read.

Traffic forward: reads `top_k` states a chunk (from L2 where they fit), writes F̄.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsbr.backends.triton import tiles, tuning

SELECTED_AT_ONCE = 256  # rows of scores that are held while their best are chosen


def select(r: Tensor, h: Tensor, chunks: int, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` best states of each row, best first and the earliest of equals: their weights, and which (int32).

    Both are [batch, heads, chunks, top_k]; weights are float32, differentiable in r and h, and 0 where a row sees fewer.
    """
    heads, head_dim = r.shape[1], r.shape[3]
    kv_heads = h.shape[1]
    rows = r[:, :, 1:].unflatten(1, (kv_heads, heads // kv_heads)).float()
    keys = h[:, :, :chunks].unsqueeze(2).float()
    chosen = []
    with torch.no_grad():
        for start in range(0, chunks, SELECTED_AT_ONCE):
            stop = min(start + SELECTED_AT_ONCE, chunks)
            scores = rows[:, :, :, start:stop] @ keys[:, :, :, : max(stop, top_k)].mT / math.sqrt(head_dim)
            visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=r.device).tril(start)
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
            # Not topk: which of equal scores it takes depends on how many columns there are, that is, on the future.
            chosen.append(scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k])
    places = torch.arange(top_k, device=r.device) <= torch.arange(chunks, device=r.device)[:, None]
    states = torch.cat(chosen, dim=3).where(places, 0)
    kept = keys.expand(-1, -1, heads // kv_heads, -1, -1).flatten(2, 3)
    # Heads of a group read the same keys: each one's copy begins a multiple of `chunks` later.
    copy = torch.arange(heads // kv_heads, device=r.device).view(-1, 1, 1) * chunks
    at = (states + copy).flatten(2).unsqueeze(-1).expand(-1, -1, -1, head_dim)
    scores = (rows.unsqueeze(-2) * kept.gather(2, at).view(*states.shape, head_dim)).sum(dim=-1) / math.sqrt(head_dim)
    weights = torch.softmax(scores.masked_fill(~places, -torch.inf), dim=-1)
    return weights.flatten(1, 2), states.flatten(1, 2).int()


@triton.jit
def _gather(f, weights, chosen, out, chunks, group, TOP_K: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    row = tl.program_id(0) // tl.cdiv(WIDTH, DEPTH)
    columns = tl.program_id(0) % tl.cdiv(WIDTH, DEPTH) * DEPTH + tl.arange(0, DEPTH)
    f += tl.cast(row // chunks // group, tl.int64) * chunks * WIDTH
    total = tl.zeros([DEPTH], tl.float32)
    for place in range(tl.minimum(TOP_K, row % chunks + 1)):
        at = tl.cast(row, tl.int64) * TOP_K + place
        state = f + tl.cast(tl.load(chosen + at), tl.int64) * WIDTH
        total += tl.load(weights + at) * tl.load(state + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + tl.cast(row, tl.int64) * WIDTH + columns, total.to(out.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def _gather_weights(f, chosen, grad, grad_weights, chunks, group, TOP_K: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """dw_tm = dF̄_t·F_{s(t, m)}, one program a pair; zero at places that hold no state."""
    pair = tl.program_id(0)
    row = pair // TOP_K
    f += tl.cast(row // chunks // group, tl.int64) * chunks * WIDTH + tl.cast(tl.load(chosen + pair), tl.int64) * WIDTH
    grad += tl.cast(row, tl.int64) * WIDTH
    total = tl.zeros([DEPTH], tl.float32)
    for first in range(0, tl.where(pair % TOP_K <= row % chunks, WIDTH, 0), DEPTH):
        columns = first + tl.arange(0, DEPTH)
        upstream = tl.load(grad + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        total += upstream * tl.load(f + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    tl.store(grad_weights + pair, tl.sum(total))


@triton.jit
def _scatter(
    grad, weights, pairs, ends, grad_f, chunks, group, TOP_K: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """dF_s = Σ w_tm dF̄_t over the pairs that chose s, which stand side by side in `pairs`, up to ends[s]."""
    state = tl.program_id(0) // tl.cdiv(WIDTH, DEPTH)
    columns = tl.program_id(0) % tl.cdiv(WIDTH, DEPTH) * DEPTH + tl.arange(0, DEPTH)
    sequence = tl.cast(state // chunks, tl.int64)
    begin = tl.load(ends + state - 1, mask=state % chunks > 0, other=0)
    pairs += sequence * (group * chunks * TOP_K)
    total = tl.zeros([DEPTH], tl.float32)
    for at in range(begin, tl.load(ends + state)):
        pair = sequence * (group * chunks * TOP_K) + tl.load(pairs + at)
        row = pair // TOP_K
        if pair % TOP_K <= row % chunks:
            upstream = tl.load(grad + row * WIDTH + columns, mask=columns < WIDTH, other=0.0)
            total += tl.load(weights + pair) * upstream.to(tl.float32)
    tl.store(grad_f + tl.cast(state, tl.int64) * WIDTH + columns, total.to(grad_f.dtype.element_ty), mask=columns < WIDTH)


def gather(states: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """F̄ of every chunk but the first [batch, heads, C - 1, d_r, head_dim]; states [batch, kv_heads, C - 1, d_r, head_dim]."""
    out = states.new_empty(*chosen.shape[:3], *states.shape[3:])
    sizes = _sizes(states, chosen)
    programs = chosen.shape[:3].numel() * triton.cdiv(sizes["WIDTH"], sizes["DEPTH"])
    tiles.launch(_gather, programs, states, weights, chosen, out, *_counts(states, chosen), **sizes)
    return out


def gather_backward(states: Tensor, weights: Tensor, chosen: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """dF and dw from dF̄."""
    batch, kv_heads, chunks = states.shape[:3]
    sizes, counts = _sizes(states, chosen), _counts(states, chosen)
    grad_weights = torch.empty_like(weights)
    tiles.launch(_gather_weights, chosen.numel(), states, chosen, grad, grad_weights, *counts, **sizes)
    ordered, pairs = chosen.reshape(batch, kv_heads, -1).sort(dim=-1, stable=True)
    every = torch.arange(chunks, device=chosen.device, dtype=chosen.dtype).expand(batch, kv_heads, chunks)
    ends = torch.searchsorted(ordered, every.contiguous(), right=True)
    grad_f = torch.empty_like(states)
    programs = batch * kv_heads * chunks * triton.cdiv(sizes["WIDTH"], sizes["DEPTH"])
    tiles.launch(_scatter, programs, grad, weights, pairs, ends, grad_f, *counts, **sizes)
    return grad_f, grad_weights


def _counts(states: Tensor, chosen: Tensor) -> tuple[int, int]:
    return states.shape[2], chosen.shape[1] // states.shape[1]


def _sizes(states: Tensor, chosen: Tensor) -> dict[str, int]:
    width = states.shape[3:].numel()
    tile = tuning.tile("gather", states, head_dim=states.shape[-1], chunk_size=1)
    return {
        "TOP_K": chosen.shape[3],
        "WIDTH": width,
        "DEPTH": min(tile.depth, tiles.padded(width)),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
