"""Streaming BSBR: the state after the tokens so far, and the output of tokens that follow them.

The open chunk is the one that is not complete yet. A state holds the keys and values of the open chunk and of the overlap
before it, the meta keys and states of all complete chunks, the retrieved state of the open chunk, and running sums over it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bsbr.backends.dispatch import attend_segment, attend_segment_in_room
from bsbr.backends.pytorch import pseudo_values
from bsbr.backends.sdpa import sdpa
from bsbr.cost import HeadSizes
from bsbr.inputs import BSBRInputs, BSBROptions, ChunkMemory, ChunkRoom, TokenInputs
from bsbr.interface import State, next_position, position_counter
from bsbr.paging import state_pages
from bsbr.precision import without_autocast

PAGE = 64
"""Number of chunks per page, a tensor of meta keys or states. A new chunk copies the last page; states share full pages."""


class StreamingState(NamedTuple):
    """Decoding state of one attention. Sums are in float32 or wider, the rest in the dtype of the parameters.

    Attributes:
        keys, values: those of the open chunk and the overlap before it [batch, kv_heads, tokens, head_dim].
        retrieved: g F̄ of the open chunk [batch, heads, d_r, head_dim].
        open_state: F of the open chunk so far [batch, kv_heads, d_r, head_dim].
        open_hidden: sum of the hidden states of the open chunk so far [batch, hidden_dim].
        memory: meta keys and states of the complete chunks, in pages of `PAGE` chunks.
        position: number of tokens so far.
    """

    keys: Tensor
    values: Tensor
    retrieved: Tensor
    open_state: Tensor
    open_hidden: Tensor
    memory: ChunkMemory
    position: int

    @classmethod
    def empty(cls, hidden_states: Tensor, sizes: HeadSizes) -> "StreamingState":
        """The state before the first token of hidden_states [batch, time, hidden_dim]."""
        batch, _, hidden_dim = hidden_states.shape
        zeros, wide = hidden_states.new_zeros, torch.promote_types(hidden_states.dtype, torch.float32)
        return cls(
            keys=zeros(batch, sizes.num_kv_heads, 0, sizes.head_dim),
            values=zeros(batch, sizes.num_kv_heads, 0, sizes.head_dim),
            retrieved=zeros(batch, sizes.num_heads, sizes.feature_dim, sizes.head_dim),
            open_state=zeros(batch, sizes.num_kv_heads, sizes.feature_dim, sizes.head_dim, dtype=wide),
            open_hidden=zeros(batch, hidden_dim, dtype=wide),
            memory=ChunkMemory(),
            position=0,
        )

    @classmethod
    def from_state(cls, state: State) -> "StreamingState":
        """Reads the dictionary that `to_state` makes."""
        memory = ChunkMemory(state_pages(state, "meta_keys"), state_pages(state, "states"))
        tensors = {name: state[name] for name in ("keys", "values", "retrieved", "open_state", "open_hidden")}
        return cls(**tensors, memory=memory, position=next_position(state))

    def check(self, hidden_states: Tensor, sizes: HeadSizes, options: BSBROptions) -> None:
        """Raises ValueError unless the state fits these inputs, sizes and options: C++ functions trust sizes."""
        batch, kv_heads, dim = hidden_states.shape[0], sizes.num_kv_heads, sizes.head_dim
        cached, chunks = options.cached_tokens(self.position), self.position // options.chunk_size
        empty = StreamingState.empty(hidden_states, sizes)
        pairs = [(name, getattr(self, name), getattr(empty, name).shape) for name in ("retrieved", "open_state", "open_hidden")]
        pairs += [(name, getattr(self, name), (batch, kv_heads, cached, dim)) for name in ("keys", "values")]
        left = chunks
        for i, (meta_key, state) in enumerate(zip(self.memory.meta_keys, self.memory.states, strict=False)):
            stored = min(left, PAGE)
            pairs += [(f"meta_keys.{i}", meta_key, (batch, kv_heads, stored, dim))]
            pairs += [(f"states.{i}", state, (batch, kv_heads, stored, sizes.feature_dim, dim))]
            left -= stored
        check_shapes(pairs)
        if left or len(self.memory.meta_keys) != len(self.memory.states):
            raise ValueError(f"a state after {self.position} tokens has {chunks} chunks in its pages, got {chunks - left}")

    def to_state(self) -> State:
        """The state as `Attention.extend` returns it: a flat dictionary of tensors, one entry a page."""
        return {
            "keys": self.keys,
            "values": self.values,
            "retrieved": self.retrieved,
            "open_state": self.open_state,
            "open_hidden": self.open_hidden,
            **{f"meta_keys.{index}": page for index, page in enumerate(self.memory.meta_keys)},
            **{f"states.{index}": page for index, page in enumerate(self.memory.states)},
            "position": position_counter(self.position),
        }


def check_shapes(expected: Iterable[tuple[str, Tensor, tuple[int, ...]]]) -> None:
    """Raises ValueError for the first tensor of a state, given with its name and expected shape, that has another shape."""
    for name, tensor, shape in expected:
        if tensor.shape != shape:
            raise ValueError(f"a state of this attention and batch has {name} {list(shape)}, got {list(tensor.shape)}")


def open_chunks(
    inputs: BSBRInputs,
    hidden_states: Tensor,
    state: StreamingState,
    options: BSBROptions,
    impl: str,
    room: ChunkRoom | None = None,
) -> tuple[Tensor, StreamingState]:
    """Computes, in parallel, the output of tokens that begin at a chunk boundary.

    Args:
        inputs: those of the new tokens, with a meta query for each of their chunks and a meta key for each complete one.
        hidden_states: those of the new tokens [batch, time, hidden_dim].
        state: the state before them, without an open chunk.
        options, impl: see `bsbr_attention`.
        room: if given, holds all earlier chunks instead of the memory of `state`, and receives those of the new tokens.

    Returns:
        [batch, heads, time, head_dim], and the state after the tokens.
    """
    tokens = inputs.q.shape[2]
    keys, values = joined(state.keys, inputs.k), joined(state.values, inputs.v)
    with_cached = inputs._replace(k=keys, v=values)
    if room is None:
        segment = attend_segment(impl, with_cached, options, state.memory)
        memory = _with_chunks(state.memory, inputs.meta_key, segment.states)
    else:
        segment, memory = attend_segment_in_room(impl, with_cached, options, room), state.memory
    assert inputs.k_features is not None  # a module always gives the features
    rest = tokens // options.chunk_size * options.chunk_size  # the first token of the incomplete last chunk
    beta = None if inputs.beta is None else inputs.beta[:, :, rest:]
    empty = torch.zeros_like(state.open_state)
    after = StreamingState(
        keys=keys,
        values=values,
        retrieved=segment.retrieved.clone(),  # a view would keep the retrieved states of all chunks in memory
        open_state=updated_state(empty, inputs.k_features[:, :, rest:], inputs.v[:, :, rest:], beta),
        open_hidden=hidden_states[:, rest:].to(state.open_hidden.dtype).sum(dim=1),
        memory=memory,
        position=state.position + tokens,
    )
    return segment.output, _with_visible_tokens(after, options)


def continue_chunk(
    tokens: TokenInputs, hidden_states: Tensor, state: StreamingState, options: BSBROptions
) -> tuple[Tensor, StreamingState]:
    """Computes the output of tokens that continue the open chunk. If they complete it, call `close_chunk` next.

    A token costs O((chunk_size + chunk_overlap + d_r)·head_dim) per head; states of other chunks are not read.

    Args:
        tokens: those of the new tokens.
        hidden_states: those of the new tokens [batch, time, hidden_dim].
        state: the state before them, whose open chunk has room for all of them.
        options: see `BSBROptions`.

    Returns:
        [batch, heads, time, head_dim], and the state after the tokens.
    """
    local, keys, values = attend_open_chunk(tokens, state.keys, state.values, options.dropout_p)
    after = state._replace(
        keys=keys,
        values=values,
        open_state=updated_state(state.open_state, tokens.k_features, tokens.v, tokens.beta),
        open_hidden=state.open_hidden + hidden_states.to(state.open_hidden.dtype).sum(dim=1),
        position=state.position + tokens.q.shape[2],
    )
    return local + tokens.q_features @ state.retrieved, after


def attend_open_chunk(
    tokens: TokenInputs, cached_keys: Tensor, cached_values: Tensor, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of tokens inside the open chunk, of which all cached keys are visible: they are its own and its overlap's.

    Returns:
        [batch, heads, time, head_dim], and the keys and values with those of the tokens behind the cached ones.
    """
    keys, values = torch.cat([cached_keys, tokens.k], dim=2), torch.cat([cached_values, tokens.v], dim=2)
    time, visible = tokens.q.shape[2], None
    if time > 1:
        visible = torch.ones(time, keys.shape[2], dtype=torch.bool, device=keys.device).tril(keys.shape[2] - time)
    return sdpa(tokens.q, keys, values, visible, dropout_p), keys, values


def close_chunk(state: StreamingState, meta_key: Tensor, options: BSBROptions) -> StreamingState:
    """Moves the open chunk, now complete, into the memory with its meta key [batch, kv_heads, 1, head_dim]."""
    closed = state._replace(
        memory=_with_chunks(state.memory, meta_key, state.open_state.to(state.values.dtype).unsqueeze(2)),
        open_state=torch.zeros_like(state.open_state),
        open_hidden=torch.zeros_like(state.open_hidden),
    )
    return _with_visible_tokens(closed, options)


@without_autocast
def updated_state(state: Tensor, k_features: Tensor, v: Tensor, beta: Tensor | None) -> Tensor:
    """The state of an open chunk after more of its tokens, in the dtype of `state`."""
    k_features, v = k_features.to(state.dtype), v.to(state.dtype)
    return state + k_features.mT @ (v if beta is None else pseudo_values(k_features, v, beta, state))


def _with_visible_tokens(state: StreamingState, options: BSBROptions) -> StreamingState:
    """Drops the keys and values that the next token does not attend to."""
    cached = options.cached_tokens(state.position)
    return state._replace(keys=last_tokens(state.keys, cached), values=last_tokens(state.values, cached))


def last_tokens(x: Tensor, count: int) -> Tensor:
    """The last `count` rows of [batch, kv_heads, tokens, dim]; a copy if it drops any, so that the others are freed."""
    start = x.shape[2] - count
    return (x[:, :, start:].clone(memory_format=torch.contiguous_format) if start else x).contiguous()


def new_room(hidden_states: Tensor, sizes: HeadSizes, options: BSBROptions) -> ChunkRoom:
    """Room for all complete chunks of hidden states [batch, time, hidden_dim] that begin a sequence."""
    batch, time, _ = hidden_states.shape
    shape = batch, sizes.num_kv_heads, time // options.chunk_size
    states = hidden_states.new_empty(*shape, sizes.feature_dim, sizes.head_dim)
    return ChunkRoom(hidden_states.new_empty(*shape, sizes.head_dim), states)


def leave_room(state: StreamingState, room: ChunkRoom) -> StreamingState:
    """The state with the chunks of `room` as its memory, in pages."""
    return state._replace(memory=_with_chunks(state.memory, room.meta_keys, room.states))


def _with_chunks(memory: ChunkMemory, meta_key: Tensor, states: Tensor) -> ChunkMemory:
    """Appends the meta keys and states of more chunks to the memory."""
    return ChunkMemory(append_rows(memory.meta_keys, meta_key), append_rows(memory.states, states))


def append_rows(pages: Sequence[Tensor], new: Tensor) -> list[Tensor]:
    """Appends `new` to pages of at most `PAGE` rows along dimension 2."""
    if not new.shape[2]:
        return [*pages]
    if pages and pages[-1].shape[2] < PAGE:
        *pages, open_page = pages
        new = torch.cat([open_page, new], dim=2)
    if new.shape[2] <= PAGE:
        return [*pages, new.contiguous()]
    # Cloned: a page that is a view would keep all of `new` alive.
    return [*pages, *(page.clone(memory_format=torch.contiguous_format) for page in new.split(PAGE, dim=2))]


def joined(before: Tensor, after: Tensor) -> Tensor:
    """Concatenates along time; returns `after` itself, not a copy, if `before` is empty."""
    return torch.cat([before, after], dim=2) if before.shape[2] else after
