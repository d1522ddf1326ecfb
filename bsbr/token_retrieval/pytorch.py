"""Retrieval per token in torch operations: any device, any dtype, dropout, differentiable twice.

Each token chooses its candidates among the chunks before its own by their keys, reads their states, and weighs what it read. No
state is copied for each token: pairs of a token and a state are sorted by state and cut into tiles of one state each, and the
reads are one batched product of tiles. No tensor holds a number for each token and each chunk at once.
"""

import math
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bsbr.backends.pytorch import chunk_states, local_attention
from bsbr.backends.retrieval import zero_of
from bsbr.precision import without_autocast
from bsbr.token_retrieval.inputs import (
    EPSILON,
    ChunkTable,
    Memory,
    TokenRetrievalInputs,
    TokenRetrievalOptions,
    TokenSegment,
)

MAX_SCORES = 2**17
"""Scores that are sorted at once: of all tokens and chunks they would grow as n²/chunk_size."""

MAX_READ_NUMBERS = 2**22
"""Numbers that are read at once if tokens read all chunks; a backward pass reads them again."""

LARGEST_TILE = 64
"""Rows of a tile. Larger ones copy fewer states and have more rows of padding."""


class Readers(NamedTuple):
    """Tokens that retrieve, of whatever position.

    Attributes:
        selector: what is compared with the keys of chunks [batch, heads, time, d_r or head_dim].
        q_features: φ(q) [batch, heads, time, d_r].
        gain, exponent: see `TokenRetrievalInputs`.
        position: number of tokens before the first one.
    """

    selector: Tensor
    q_features: Tensor
    gain: Tensor
    exponent: Tensor | None
    position: int

    def tokens(self, start: int, stop: int) -> "Readers":
        """Some of the tokens."""
        rows = slice(start, stop)
        return self._replace(
            selector=self.selector[:, :, rows], q_features=self.q_features[:, :, rows], position=self.position + start
        )


def segment(inputs: TokenRetrievalInputs, options: TokenRetrievalOptions, chunks: int, past: Memory = ()) -> TokenSegment:
    """Attention of tokens that begin at a chunk boundary, with the chunks of `past` before them.

    Args:
        inputs: the tensors; k and v may hold up to `chunk_overlap` earlier tokens in front.
        options: see `TokenRetrievalOptions`.
        chunks: number of chunks from the first token on that get a state, all complete.
        past: all earlier chunks.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    sizes = {"chunk_size": options.chunk_size, "chunk_overlap": options.chunk_overlap}
    output = local_attention(q, k, v, dropout_p=options.dropout_p, **sizes)
    table, states = stored_chunks(inputs, options, chunks)
    first = sum(one.num_chunks for one in past)
    readers = Readers(inputs.selector, inputs.q_features, inputs.gain, inputs.exponent, first * options.chunk_size)
    # As they are read: rounded, with the gradient of what is not.
    exact = states if options.state_dtype is None else states + (table.exact(states.dtype) - states).detach()
    memory = (*past, ChunkTable(table.keys, exact))
    output = output + retrieve(readers, memory, options)
    return TokenSegment(output + zero_of(*(x for x in inputs[3:] if x is not None)), table)


def stored_chunks(inputs: TokenRetrievalInputs, options: TokenRetrievalOptions, chunks: int) -> tuple[ChunkTable, Tensor]:
    """The table of the first `chunks` chunks, and their states before rounding [batch, kv_heads, chunks, d_r, head_dim]."""
    v = inputs.v[:, :, inputs.k.shape[2] - inputs.q.shape[2] :]
    wide = torch.promote_types(v.dtype, torch.float32)
    with_ones = torch.cat([v.to(wide), torch.ones_like(v[..., :1], dtype=wide)], dim=-1)
    states = _wide_states(inputs.k_features.to(wide), with_ones, inputs.beta, options.chunk_size, chunks)
    keys = states[..., -1] if inputs.meta_key is None else inputs.meta_key.to(wide)
    states = states[..., :-1].to(v.dtype)
    return ChunkTable.rounded(keys, states, options.state_dtype), states


@without_autocast
def _wide_states(k_features: Tensor, values: Tensor, beta: Tensor | None, chunk_size: int, chunks: int) -> Tensor:
    return chunk_states(k_features, values, chunk_size, chunks, beta)


# --- reading ------------------------------------------------------------------------------------


@without_autocast
def retrieve(readers: Readers, memory: Memory, options: TokenRetrievalOptions) -> Tensor:
    """g Σ_s γ_is F_sᵀ φ(q_i) over the candidates of every token i: [batch, heads, time, head_dim], 0 in the first chunk."""
    batch, heads, time, features = readers.q_features.shape
    head_dim = memory[-1].states.shape[-1]
    bounds = _part_bounds(readers.position, time, options)
    if options.candidates is None:  # the reads of all tokens would grow as n²/chunk_size
        seen = max(1, (readers.position + time) // options.chunk_size)
        step = max(1, MAX_READ_NUMBERS // (batch * heads * seen * (head_dim + features)))
        bounds = sorted({*bounds, *range(0, time, step)})
    parts = [readers.tokens(start, stop) for start, stop in pairwise(bounds)]
    repeats = options.candidates is None and torch.is_grad_enabled() and len(parts) > 1  # in the backward pass
    compute = partial(checkpoint, _retrieve, use_reentrant=False) if repeats else _retrieve
    outputs = [compute(part, memory, options) for part in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _part_bounds(position: int, time: int, options: TokenRetrievalOptions) -> list[int]:
    """Positions where tokens are cut into parts of about as many candidates: at chunks 1, 2, 4, … up to `options.candidates`."""
    bounds, chunk = {0, time}, 1
    while (start := chunk * options.chunk_size - position) < time:
        if start > 0:
            bounds.add(start)
        if options.candidates is not None and chunk >= options.candidates:
            break
        chunk = 2 * chunk if options.candidates is None else min(2 * chunk, options.candidates)
    return sorted(bounds)


def _retrieve(readers: Readers, memory: Memory, options: TokenRetrievalOptions) -> Tensor:
    batch, heads, time, _ = readers.q_features.shape
    device, last = readers.q_features.device, (readers.position + time - 1) // options.chunk_size
    if not last:
        return readers.q_features.new_zeros(batch, heads, time, memory[-1].states.shape[-1])
    memory = _first_chunks(memory, last)
    seen = torch.arange(readers.position, readers.position + time, device=device) // options.chunk_size
    candidates = last if options.candidates is None else min(options.candidates, last)
    selected = select(readers.selector.detach(), [table.keys.detach() for table in memory], candidates, seen)
    reads = read(readers.q_features, selected, memory)
    weights = F.dropout(_weights(readers, selected, reads, memory, options, seen), options.dropout_p).to(reads.dtype)
    return (weights.unsqueeze(-2) @ reads).squeeze(-2) * readers.gain.view(-1, 1, 1)


def _first_chunks(memory: Memory, count: int) -> Memory:
    """The first `count` chunks of a memory, which has as many."""
    tables, left = [], count
    for table in memory:
        if left > 0:
            tables.append(table if table.num_chunks <= left else table.each(lambda x: x[:, :, :left]))  # noqa: B023  called at once
        left -= table.num_chunks
    return tables


def _weights(
    readers: Readers, selected: Tensor, reads: Tensor, memory: Memory, options: TokenRetrievalOptions, seen: Tensor
) -> Tensor:
    """γ of each candidate [batch, heads, time, candidates], in float32 or wider; 0 for chunks that a token does not see."""
    wide = torch.promote_types(reads.dtype, torch.float32)
    if options.router == "energy":
        fit = reads.to(wide).square().mean(dim=-1)
    else:
        fit = (readers.selector.to(wide).unsqueeze(-2) * _keys_of(selected, memory)).sum(dim=-1)
    if readers.exponent is None:
        logits = fit / math.sqrt(readers.selector.shape[-1])
    else:
        fit = fit.square() if options.router == "key" else fit
        logits = readers.exponent.to(wide).view(-1, 1, 1) * torch.log(fit + EPSILON)
    valid = torch.arange(selected.shape[-1], device=seen.device) < seen.unsqueeze(-1)
    weights = torch.softmax(logits.masked_fill(~valid, torch.finfo(wide).min), dim=-1)
    return weights * (seen > 0).unsqueeze(-1)


def select(selector: Tensor, keys: list[Tensor], candidates: int, seen: Tensor) -> Tensor:
    """Chunks whose keys fit each token's selector best, x·c_s, the best first and the earliest of equals.

    Args:
        selector: x [batch, heads, time, size].
        keys: pages of c [batch, kv_heads, chunks, size].
        candidates: number of chunks to select.
        seen: number of chunks that each token sees [time].

    Returns:
        [batch, heads, time, candidates]; chunk 0 in place of those that a token does not see.
    """
    batch, heads, time, _ = selector.shape
    chunks, kv_heads = sum(page.shape[2] for page in keys), keys[0].shape[1]
    if candidates >= chunks:
        every = torch.arange(chunks, device=seen.device).expand(time, chunks)
        return every.masked_fill(every >= seen.unsqueeze(-1), 0).expand(batch, heads, time, chunks)
    step = max(1, MAX_SCORES // (batch * heads * chunks))
    parts = []
    for start in range(0, time, step):
        rows = slice(start, start + step)
        x = selector[:, :, rows].to(keys[0].dtype).unflatten(1, (kv_heads, heads // kv_heads))
        scores = torch.cat([x @ page.mT.unsqueeze(2) for page in keys], dim=-1).flatten(1, 2)
        hidden = torch.arange(chunks, device=seen.device) >= seen[rows].unsqueeze(-1)
        # Not torch.topk: which of equal scores it selects depends on the number of columns, that is, on the future.
        best = scores.masked_fill(hidden, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[..., :candidates]
        parts.append(best.masked_fill(torch.arange(candidates, device=seen.device) >= seen[rows].unsqueeze(-1), 0))
    return torch.cat(parts, dim=2)


def _keys_of(selected: Tensor, memory: Memory) -> Tensor:
    """Keys of the selected chunks [batch, heads, time, candidates, size]."""
    keys = torch.cat([table.keys for table in memory], dim=2)
    rows = _sequences(selected, keys.shape[1]) * keys.shape[2] + selected
    return F.embedding(rows, keys.flatten(0, 2))


def _sequences(selected: Tensor, kv_heads: int) -> Tensor:
    """Number of the sequence, of all items and kv heads, that each head reads [batch, heads, 1, 1]."""
    batch, heads = selected.shape[:2]
    sequences = torch.arange(batch * kv_heads, device=selected.device).view(batch, kv_heads, 1)
    return sequences.expand(batch, kv_heads, heads // kv_heads).reshape(batch, heads, 1, 1)


def read(q_features: Tensor, selected: Tensor, memory: Memory) -> Tensor:
    """F_sᵀ φ(q_i) of every token i and each of its candidates s.

    Args:
        q_features: φ(q) [batch, heads, time, d_r].
        selected: s [batch, heads, time, candidates].
        memory: the chunks.

    Returns:
        [batch, heads, time, candidates, head_dim], in the dtype of q_features.
    """
    batch, kv_heads, _, features, head_dim = memory[0].states.shape
    rows = q_features.flatten(0, 2)
    pairs = torch.arange(selected.numel(), device=selected.device) // selected.shape[-1]
    if selected.numel() <= batch * kv_heads * sum(table.num_chunks for table in memory):
        states = _states_of_pairs(selected, memory, q_features.dtype)
        reads = (rows[pairs].unsqueeze(1) @ states).squeeze(1)
    else:
        tables = [table.exact(q_features.dtype) for table in memory]
        states = tables[0] if len(tables) == 1 else torch.cat(tables, dim=2)
        numbers = (_sequences(selected, kv_heads) * states.shape[2] + selected).flatten()
        tiles = _Tiles.of(numbers, batch * kv_heads * states.shape[2])
        tiled = F.embedding(pairs[tiles.pairs], rows).view(-1, tiles.size, features)
        of_tiles = F.embedding(tiles.states, states.flatten(0, 2).flatten(1)).view(-1, features, head_dim)
        reads = F.embedding(tiles.places, (tiled @ of_tiles).flatten(0, 1))
    return reads.view(*selected.shape, head_dim)


def _states_of_pairs(selected: Tensor, memory: Memory, dtype: torch.dtype) -> Tensor:
    """A copy of the state of every pair [pairs, d_r, head_dim], for few pairs; tables without any of them are not read."""
    kv_heads = memory[0].states.shape[1]
    sequences, chosen = (x.contiguous().view(-1) for x in torch.broadcast_tensors(_sequences(selected, kv_heads), selected))
    if len(memory) == 1:
        return _rows(memory[0], sequences * memory[0].num_chunks + chosen).exact(dtype)
    ends = [*accumulate(table.num_chunks for table in memory)]
    number = torch.bucketize(chosen, torch.tensor(ends, device=chosen.device), right=True)
    states = memory[0].states.new_zeros(len(chosen), *memory[0].states.shape[3:], dtype=dtype)
    for i in number.unique().tolist():
        table, pairs = memory[i], (number == i).nonzero().squeeze(1)
        places = sequences[pairs] * table.num_chunks + chosen[pairs] - (ends[i] - table.num_chunks)
        states = states.index_copy(0, pairs, _rows(table, places).exact(dtype))
    return states


def _rows(table: ChunkTable, numbers: Tensor) -> ChunkTable:
    """Some chunks of some sequences; numbers count the first three dimensions, flattened."""
    return table.each(lambda x: x.flatten(0, 2)[numbers])


class _Tiles(NamedTuple):
    """Pairs of a token and a state, sorted by state and cut into tiles of `size` rows, each of one state.

    Attributes:
        size: rows of a tile.
        pairs: the pair of each row [tiles · size]; pair 0 in rows of padding.
        states: the state of each tile [tiles].
        places: the row of each pair [pairs].
    """

    size: int
    pairs: Tensor
    states: Tensor
    places: Tensor

    @classmethod
    def of(cls, states: Tensor, num_states: int) -> "_Tiles":
        """Tiles of pairs whose states are given [pairs]. Their number depends on the sizes only, so nothing waits for a GPU."""
        pairs, device = len(states), states.device
        size = min(LARGEST_TILE, 2 ** max(0, (pairs // (2 * num_states)).bit_length() - 1))
        tiles = pairs // size + num_states  # at least: each state has at most one tile that is not full
        ordered, order = states.sort(stable=True)
        counts = torch.zeros(num_states, dtype=torch.int64, device=device).scatter_add_(0, states, torch.ones_like(states))
        of_state = (counts + size - 1) // size
        last_tile = of_state.cumsum(0)
        rank = torch.arange(pairs, device=device) - (counts.cumsum(0) - counts)[ordered]  # among the pairs of its state
        place = (last_tile - of_state)[ordered] * size + rank
        numbers = torch.arange(tiles, device=device)
        return cls(
            size,
            torch.zeros(tiles * size, dtype=torch.int64, device=device).scatter_(0, place, order),
            torch.bucketize(numbers, last_tile, right=True).clamp_max(num_states - 1),
            torch.empty_like(order).scatter_(0, order, place),
        )
