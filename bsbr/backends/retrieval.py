"""Retrieval between chunks in torch operations: scores, softmax or top-k selection, and the weighted sum of chunk states.

The torch backend uses it, and the C++ backend with top_k and for segments that follow earlier ones; without gradients, it replaces
the top-k selection and the sum by functions in C++.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from bsbr.inputs import ChunkMemory
from bsbr.precision import without_autocast

SelectTopK = Callable[[Tensor, int, int], Tensor]
"""Type of `select_top_k` and its replacements."""

MixStates = Callable[[Tensor, Sequence[int], Sequence[Tensor], int], Tensor]
"""Type of `mix_states` and its replacements."""


def select_top_k(scores: Tensor, top_k: int, first: int) -> Tensor:
    """Indices of the `top_k` highest scores of each row, the highest first and the earliest of equals.

    Args:
        scores: [batch, heads, rows, chunks].
        top_k: number of scores to select.
        first: number of chunks that row 0 sees; row i sees `first` + i. Not read here: the other chunks have the lowest scores.
    """
    # Not torch.topk: which of equal scores it selects depends on the number of columns, that is, on the future.
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]


def mix_states(weights: Tensor, sizes: Sequence[int], states: Sequence[Tensor], first: int) -> Tensor:
    """Weighted sum of all states, Σ_s weights[s] states[s].

    Args:
        weights: [batch, heads, rows, chunks].
        sizes: number of chunks in each page of `states`; a page may have room for more.
        states: pages [batch, kv_heads, chunks, d_r · head_dim].
        first: as in `select_top_k`. Not read here: the weights of the other chunks are 0.

    Returns:
        [batch · kv_heads, heads / kv_heads · rows, d_r · head_dim].
    """
    parts = weights.reshape(-1, weights.shape[1] // states[0].shape[1] * weights.shape[2], weights.shape[3]).split(sizes, dim=-1)
    mixed = None
    for part, chunks, page in zip(parts, sizes, states, strict=True):
        table = page[:, :, :chunks].flatten(0, 1)
        mixed = torch.bmm(part, table) if mixed is None else mixed.baddbmm_(part, table)
    assert mixed is not None
    return mixed


@without_autocast
def retrieve(
    meta_query: Tensor,
    memory: ChunkMemory,
    *,
    first: int = 0,
    top_k: int | None = None,
    gain: Tensor | None = None,
    normalise: bool = False,
    dropout_p: float = 0.0,
    select: SelectTopK = select_top_k,
    mix: MixStates = mix_states,
) -> Tensor:
    """g F̄_t with F̄_t = Σ_s softmax_s(r_t·h_s/√d ⊙ M_out) F_s for the chunks t ≥ `first`. Chunk 0 retrieves zero.

    Args:
        meta_query: r [batch, heads, rows, head_dim]; row i is that of chunk `first` + i, which sees all chunks before it.
        memory: h and F of all chunks from chunk 0 on.
        first: number of chunks before those of `meta_query`.
        top_k, normalise, dropout_p: see `BSBROptions`; dropout acts before the normalisation.
        gain: g [heads]; None means 1.
        select: selects the `top_k` best chunks of each row.
        mix: sums the states if all chunks are mixed.

    Returns:
        [batch, heads, rows, d_r, head_dim].
    """
    batch, heads, rows, _ = meta_query.shape
    kv_heads, *state_shape = (memory.states[0].shape[dim] for dim in (1, 3, 4))
    if memory.num_chunks == 0:
        unused = (meta_query, *memory.meta_keys, *memory.states, *([] if gain is None else [gain]))
        return memory.states[0].new_zeros(batch, heads, rows, *state_shape) + zero_of(*unused)
    scores = _scores(meta_query, memory.meta_keys, first)
    selected = None
    if top_k is not None and top_k < memory.num_chunks:
        selected = select(scores.detach().flatten(1, 2), top_k, first).view(*scores.shape[:4], top_k)
        scores = scores.gather(-1, selected)
    # The softmax gives chunks that a row does not see the weight 0, except in a row that sees none: that row is set to 0.
    # The gain joins this factor: as a separate factor of all weights it would make autograd store one more product.
    factor = (torch.arange(first, first + rows, device=scores.device) > 0).to(scores.dtype).view(rows, 1)
    if gain is not None and not normalise:
        factor = factor * gain.view(kv_heads, heads // kv_heads, 1, 1)
    weights = torch.softmax(scores, dim=-1) * factor
    weights = F.dropout(weights.to(memory.states[0].dtype), dropout_p)
    sizes = [page.shape[2] for page in memory.meta_keys]
    pages = [page.flatten(3) for page in memory.states]
    mixed = mix(weights.flatten(1, 2), sizes, pages, first) if selected is None else _mix_selected(weights, selected, sizes, pages)
    mixed = mixed.view(batch, heads, rows, *state_shape)
    if not normalise:
        return mixed
    scale = norm_factors(mixed)
    return (mixed * (scale if gain is None else scale * gain.view(heads, 1, 1, 1))).to(mixed.dtype)


def zero_of(*tensors: Tensor) -> Tensor | float:
    """0, with a gradient of 0 to each tensor: parameters that a short sequence does not use have gradient 0 and not None, which
    data-parallel training would wait for."""
    return sum(x[..., :0].sum() for x in tensors) if torch.is_grad_enabled() else 0.0


def norm_factors(mixed: Tensor) -> Tensor:
    """Factors that scale each F̄ [batch, heads, rows, d_r, head_dim] to the norm √head_dim: [batch, heads, rows, 1, 1].

    A state that stores one value with entries of about ±1 under a key of unit norm has this norm. In the mean of C unrelated
    states, the share of any one state is 1/C: without normalisation the retrieved term would shrink as the sequence grows, also
    beyond the lengths of training. The factor of a zero state is 0: the 1e-12 alone would give it a gradient of a million, which
    float16 does not hold.
    """
    wide = mixed.to(torch.promote_types(mixed.dtype, torch.float32))
    squares = wide.square().sum(dim=(-2, -1), keepdim=True)
    return math.sqrt(mixed.shape[-1]) * torch.rsqrt(squares + 1e-12) * (squares > 0)


def _scores(meta_query: Tensor, meta_keys: Sequence[Tensor], first: int) -> Tensor:
    """r_t·h_s/√d ⊙ M_out in float32 or wider: [batch, kv_heads, heads / kv_heads, rows, chunks]."""
    batch, heads, rows, head_dim = meta_query.shape
    kv_heads = meta_keys[0].shape[1]
    # In float32, because scores rounded to bfloat16 would tie, and top_k would select other chunks than the best.
    wide = torch.promote_types(meta_query.dtype, torch.float32)
    # Query heads of a group are stacked as rows against the meta keys that they share.
    grouped = meta_query.reshape(batch, kv_heads, heads // kv_heads * rows, head_dim).to(wide) / math.sqrt(head_dim)
    scores: Tensor = torch.cat([grouped @ page.mT.to(wide) for page in meta_keys], dim=-1).unflatten(2, (heads // kv_heads, rows))
    chunks = scores.shape[-1]
    if first < chunks:
        visible = torch.ones(rows, chunks, dtype=torch.bool, device=scores.device).tril(first - 1)
        # Not -inf: a row that sees no chunk would be 0/0, and so would its gradient.
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return scores


def _mix_selected(weights: Tensor, selected: Tensor, sizes: Sequence[int], states: Sequence[Tensor]) -> Tensor:
    """Σ_i weights[…, i] states[selected[…, i]], without copies of the states: [batch · heads · rows, d_r · head_dim].

    weights, selected: [batch, kv_heads, group, rows, top_k]; sizes, states: as in `mix_states`.
    """
    # embedding_bag sums rows of a table under weights. The rows of a page's table are its states, of all items and heads.
    weights = weights.flatten(0, 3)
    if len(states) == 1:
        return F.embedding_bag(_table_rows(selected, states[0]), states[0].flatten(0, 2), per_sample_weights=weights, mode="sum")
    mixed = states[0].new_zeros(len(weights), states[0].shape[3])
    for start, chunks, page in zip(accumulate(sizes, initial=0), sizes, states, strict=False):
        in_page = ((selected >= start) & (selected < start + chunks)).flatten(0, 3)
        counts = in_page.sum(dim=1)
        table_rows = _table_rows(selected - start, page)[in_page]
        bag_starts = counts.cumsum(dim=0) - counts
        mixed = mixed + F.embedding_bag(table_rows, page.flatten(0, 2), bag_starts, per_sample_weights=weights[in_page], mode="sum")
    return mixed


def _table_rows(selected: Tensor, page: Tensor) -> Tensor:
    """Rows of page.flatten(0, 2) with the selected chunks [batch, kv_heads, group, rows, top_k]: [batch · heads · rows, top_k]."""
    batch, kv_heads, chunks = page.shape[:3]
    sequences = torch.arange(batch * kv_heads, device=selected.device).view(batch, kv_heads, 1, 1, 1)
    return (selected + sequences * chunks).flatten(0, 3)
