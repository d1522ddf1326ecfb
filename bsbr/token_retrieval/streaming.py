"""Streaming of retrieval per token: the state after the tokens so far, and the output of tokens that follow them.

The open chunk is the one that is not complete yet. A token reads the states of its candidates and no others, so a long memory may
lie in files.
"""

import os
import tempfile
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bsbr.cost import HeadSizes
from bsbr.inputs import TokenInputs
from bsbr.interface import State, next_position, position_counter
from bsbr.paging import state_pages
from bsbr.streaming import PAGE, append_rows, attend_open_chunk, check_shapes, joined, last_tokens, updated_state
from bsbr.token_retrieval import cpp
from bsbr.token_retrieval.inputs import ChunkTable, Memory, TokenRetrievalInputs, TokenRetrievalOptions
from bsbr.token_retrieval.pytorch import Readers, retrieve

Store = Literal["memory", "file"]


class TokenStreamingState(NamedTuple):
    """Decoding state of one attention. Sums and keys of chunks are in float32 or wider.

    Attributes:
        keys, values: those of the open chunk and the overlap before it [batch, kv_heads, tokens, head_dim].
        open_state: F of the open chunk so far, and z as its last column [batch, kv_heads, d_r, head_dim + 1].
        open_hidden: sum of the hidden states of the open chunk so far [batch, hidden_dim]; [batch, 0] unless the router is "meta".
        memory: the complete chunks, in tables of `PAGE` chunks.
        position: number of tokens so far.
    """

    keys: Tensor
    values: Tensor
    open_state: Tensor
    open_hidden: Tensor
    memory: Memory
    position: int

    @classmethod
    def empty(cls, hidden_states: Tensor, sizes: HeadSizes, options: TokenRetrievalOptions) -> "TokenStreamingState":
        """The state before the first token of hidden_states [batch, time, hidden_dim]."""
        batch, _, hidden_dim = hidden_states.shape
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        cached = hidden_states.new_zeros(batch, sizes.num_kv_heads, 0, sizes.head_dim)
        open_state = hidden_states.new_zeros(batch, sizes.num_kv_heads, sizes.feature_dim, sizes.head_dim + 1, dtype=wide)
        open_hidden = hidden_states.new_zeros(batch, hidden_dim if options.router == "meta" else 0, dtype=wide)
        return cls(cached, cached.clone(), open_state, open_hidden, (), 0)

    @classmethod
    def from_state(cls, state: State) -> "TokenStreamingState":
        """Reads the dictionary that `to_state` makes."""
        keys, states, scales = (state_pages(state, f"chunk_{name}") for name in ChunkTable._fields)
        memory = _tables(keys, states, scales)
        tensors = {name: state[name] for name in ("keys", "values", "open_state", "open_hidden")}
        return cls(**tensors, memory=memory, position=next_position(state))

    def to_state(self) -> State:
        """The state as `Attention.extend` returns it: a flat dictionary of tensors."""
        pages = {
            f"chunk_{name}.{index}": page
            for index, table in enumerate(self.memory)
            for name, page in table._asdict().items()
            if page is not None
        }
        tensors = {name: getattr(self, name) for name in ("keys", "values", "open_state", "open_hidden")}
        return {**tensors, **pages, "position": position_counter(self.position)}

    def check(self, hidden_states: Tensor, sizes: HeadSizes, options: TokenRetrievalOptions) -> None:
        """Raises ValueError unless the state fits these inputs, sizes and options."""
        batch, kv_heads, dim = hidden_states.shape[0], sizes.num_kv_heads, sizes.head_dim
        empty = TokenStreamingState.empty(hidden_states, sizes, options)
        cached = (batch, kv_heads, options.cached_tokens(self.position), dim)
        expected: list[tuple[str, Tensor, tuple[int, ...]]] = [("keys", self.keys, cached), ("values", self.values, cached)]
        expected += [(name, getattr(self, name), getattr(empty, name).shape) for name in ("open_state", "open_hidden")]
        left = self.position // options.chunk_size
        for index, table in enumerate(self.memory):
            stored, size = min(left, PAGE), dim if options.router == "meta" else sizes.feature_dim
            expected += [(f"chunk_keys.{index}", table.keys, (batch, kv_heads, stored, size))]
            expected += [(f"chunk_states.{index}", table.states, (batch, kv_heads, stored, sizes.feature_dim, dim))]
            stored_as = {None: hidden_states.dtype, "bfloat16": torch.bfloat16, "int8": torch.int8}[options.state_dtype]
            if table.states.dtype != stored_as or (table.scales is None) != (options.state_dtype != "int8"):
                raise ValueError(f"chunk_states.{index} must be {stored_as}, got {table.states.dtype}: another state_dtype?")
            if table.keys.dtype != empty.open_state.dtype:
                raise ValueError(f"chunk_keys.{index} must be {empty.open_state.dtype}, got {table.keys.dtype}")
            if table.scales is not None:
                expected += [(f"chunk_scales.{index}", table.scales, (batch, kv_heads, stored, 1, dim))]
            left -= stored
        check_shapes(expected)
        if left:
            chunks = self.position // options.chunk_size
            raise ValueError(f"a state after {self.position} tokens has {chunks} chunks in its tables, got {chunks - left}")


def after_segment(
    inputs: TokenRetrievalInputs, hidden_states: Tensor, state: TokenStreamingState, options: TokenRetrievalOptions,
    table: ChunkTable, store: Store,
) -> TokenStreamingState:  # fmt: skip
    """The state after tokens that begin at a chunk boundary.

    Args:
        inputs: those of the new tokens; k and v begin with the cached ones.
        hidden_states: those of the new tokens [batch, time, hidden_dim].
        state: the state before them, without an open chunk.
        options: see `TokenRetrievalOptions`.
        table: the complete chunks among the new tokens.
        store: see `with_chunks`.
    """
    tokens, position = inputs.q.shape[2], state.position + inputs.q.shape[2]
    rest = tokens // options.chunk_size * options.chunk_size  # the first token of the incomplete last chunk
    cached = options.cached_tokens(position)
    values = inputs.v[:, :, inputs.v.shape[2] - tokens + rest :]
    beta = None if inputs.beta is None else inputs.beta[:, :, rest:]
    return TokenStreamingState(
        keys=last_tokens(inputs.k, cached),
        values=last_tokens(inputs.v, cached),
        open_state=_updated(torch.zeros_like(state.open_state), inputs.k_features[:, :, rest:], values, beta),
        open_hidden=_summed(torch.zeros_like(state.open_hidden), hidden_states[:, rest:]),
        memory=with_chunks(state.memory, table, store),
        position=position,
    )


def continue_chunk(
    tokens: TokenInputs,
    readers: Readers,
    hidden_states: Tensor,
    state: TokenStreamingState,
    options: TokenRetrievalOptions,
    impl: str,
) -> tuple[Tensor, TokenStreamingState]:
    """Computes the output of tokens that continue the open chunk. If they complete it, call `close_chunk` next.

    Args:
        tokens: those of the new tokens.
        readers: the same tokens as readers.
        hidden_states: those of the new tokens [batch, time, hidden_dim].
        state: the state before them, whose open chunk has room for all of them.
        options: see `TokenRetrievalOptions`.
        impl: backend of the retrieval by a single token: "torch", "cpp" or "auto".

    Returns:
        [batch, heads, time, head_dim], and the state after the tokens.
    """
    output, keys, values = attend_open_chunk(tokens, state.keys, state.values, options.dropout_p)
    time = tokens.q.shape[2]
    if state.memory and time == 1 and impl != "torch" and cpp.decodes(readers, options):
        output = output.contiguous()
        cpp.retrieve_token(readers, state.memory, options, output)
    elif state.memory:
        output = output + retrieve(readers, state.memory, options)
    return output, state._replace(
        keys=keys,
        values=values,
        open_state=_updated(state.open_state, tokens.k_features, tokens.v, tokens.beta),
        open_hidden=_summed(state.open_hidden, hidden_states),
        position=state.position + time,
    )


def close_chunk(
    state: TokenStreamingState, meta_key: Tensor | None, options: TokenRetrievalOptions, store: Store
) -> TokenStreamingState:
    """Moves the open chunk, now complete, into the memory; meta_key [batch, kv_heads, 1, head_dim] is read if given."""
    states = state.open_state[..., :-1].to(state.values.dtype).unsqueeze(2)
    keys = state.open_state[..., -1].unsqueeze(2) if meta_key is None else meta_key.to(state.open_state.dtype)
    cached = options.cached_tokens(state.position)
    return state._replace(
        keys=last_tokens(state.keys, cached),
        values=last_tokens(state.values, cached),
        open_state=torch.zeros_like(state.open_state),
        open_hidden=torch.zeros_like(state.open_hidden),
        memory=with_chunks(state.memory, ChunkTable.rounded(keys, states, options.state_dtype), store),
    )


def with_chunks(memory: Memory, new: ChunkTable, store: Store) -> list[ChunkTable]:
    """Appends chunks to tables of at most `PAGE` chunks.

    Args:
        memory: the tables before.
        new: the new chunks.
        store: "file" moves the states of each full table to a file, of which the system keeps in memory what is read.
    """
    if not new.num_chunks:
        return [*memory]
    kept = len(memory) - bool(memory and memory[-1].num_chunks < PAGE)  # these tables stay as they are
    open_tables = memory[kept:]
    keys = append_rows([table.keys for table in open_tables], new.keys)
    states = append_rows([table.states for table in open_tables], new.states)
    scales = [] if new.scales is None else append_rows([x.scales for x in open_tables if x.scales is not None], new.scales)
    if store == "file":
        states = [in_file(page) if page.shape[2] == PAGE and not page.requires_grad else page for page in states]
    return [*memory[:kept], *_tables(keys, states, scales)]


def _tables(keys: list[Tensor], states: list[Tensor], scales: list[Tensor]) -> list[ChunkTable]:
    """Tables of pages that fit each other; `scales` is empty unless states are in int8."""
    if not scales:
        return [ChunkTable(*pages) for pages in zip(keys, states, strict=True)]
    return [ChunkTable(*pages) for pages in zip(keys, states, scales, strict=True)]


def in_file(x: Tensor) -> Tensor:
    """A copy in a file of the temporary folder. The file has no name any more: the system removes it with the last tensor of it.

    Raises:
        NotImplementedError: if x is not on a CPU.
    """
    if x.device.type != "cpu":
        raise NotImplementedError(
            f'state_store="file" needs states on a CPU, got {x.device}; state_store="memory" takes any device'
        )
    handle, path = tempfile.mkstemp(prefix="bsbr-states-")
    try:
        os.truncate(handle, x.numel() * x.itemsize)
        torch.from_file(path, shared=True, size=x.numel(), dtype=x.dtype).copy_(x.flatten())
        mapped: Tensor = torch.from_file(path, shared=True, size=x.numel(), dtype=x.dtype)  # anew: nothing of it is in memory
    finally:
        os.close(handle)
        os.unlink(path)  # noqa: PTH108  mkstemp returns a string
    return mapped.view(x.shape)


def _updated(state: Tensor, k_features: Tensor, v: Tensor, beta: Tensor | None) -> Tensor:
    """The state and z of an open chunk after more of its tokens."""
    return updated_state(state, k_features, torch.cat([v, torch.ones_like(v[..., :1])], dim=-1), beta)


def _summed(open_hidden: Tensor, hidden_states: Tensor) -> Tensor:
    return open_hidden + hidden_states.to(open_hidden.dtype).sum(dim=1) if open_hidden.shape[1] else open_hidden


def joined_inputs(inputs: TokenRetrievalInputs, state: TokenStreamingState) -> TokenRetrievalInputs:
    """Inputs whose k and v begin with the cached ones."""
    return inputs._replace(k=joined(state.keys, inputs.k), v=joined(state.values, inputs.v))
