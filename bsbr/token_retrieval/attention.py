"""The module of BSBR with retrieval per token: `BSBRAttention(…, retrieval="token")`."""

from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

from bsbr.attention import BSBRAttention, ChunkStates
from bsbr.backends.selection import select
from bsbr.features import FeatureMap
from bsbr.inputs import TokenInputs
from bsbr.interface import Attention, State, check_hidden_states
from bsbr.process_group import SequenceGroup
from bsbr.token_retrieval import cost, cpp, pytorch, reference, streaming
from bsbr.token_retrieval.inputs import (
    Memory,
    Router,
    StateDtype,
    TokenRetrievalInputs,
    TokenRetrievalOptions,
    TokenSegment,
)
from bsbr.token_retrieval.streaming import TokenStreamingState


class TokenRetrievalAttention(BSBRAttention):
    """o_i = Σ_j softmax_j(q_i·k_j/√d ⊙ M_in) v_j + g Σ_s γ_is F_sᵀ φ(q_i),  γ_is ∝ (e_is + ε)^p,  e_is = |F_sᵀ φ(q_i)|²/d.

    Every token i retrieves for itself. s runs over its candidates: the k complete chunks before its own whose keys z_s have the
    greatest φ(q_i)·z_s. F_s is the state of chunk s, as in `BSBRAttention`, and z_s is what the same rule makes of values of 1. A
    stored key reads its value, so its chunk has a great energy e_is; another chunk has about (keys of a chunk)/d_r of that, so d_r
    should be greater than the number of keys that a chunk holds. The exponent p is learned, one per head, from 2.

    A token costs O((chunk_size + chunk_overlap + k·d_r)·d + C·d_r) per head, in prefill and in decoding alike.

    Args:
        hidden_dim, num_heads, num_kv_heads, rotary, dropout: see `MultiHeadAttention`.
        chunk_size, chunk_overlap, compression_factor, feature_expansion: see `BSBRAttention`.
        feature_map, chunk_states, initial_gain: see `BSBRAttention`.
        router: what γ is made of. "energy": as above. "key": e_is = (φ(q_i)·z_s)². "meta": γ_is = softmax_s(x_i·h_s/√d) with a meta
            query x_i per token and the meta keys h_s of `BSBRAttention`, which also choose the candidates.
        candidates: k; None means all chunks before the token's own.
        state_dtype: what the states of complete chunks are rounded to, "bfloat16" or "int8" with one scale per column; None leaves
            them in the dtype of the parameters. Gradients ignore the rounding.
        state_store: where decoding keeps the states of complete chunks: in "memory", or in a "file" of the temporary folder.
        meta_projections: as in `BSBRAttention`, for the router "meta".
        impl: "torch" or "cpp" (CPU, the router "energy", without gradients); "auto" takes the fastest that supports the inputs.

    Raises:
        ValueError: if an option is out of range; the message names it.
    """

    backends = ("cpp",)

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        *,
        retrieval: str = "token",
        chunk_size: int = 128,
        compression_factor: int | None = None,
        feature_expansion: int = 1,
        chunk_overlap: int = 0,
        router: Router = "energy",
        candidates: int | None = 4,
        state_dtype: StateDtype | None = None,
        state_store: streaming.Store = "memory",
        feature_map: FeatureMap = "quadratic",
        chunk_states: ChunkStates = "delta",
        initial_gain: float = 0.0,
        meta_projections: bool = False,
        num_kv_heads: int | None = None,
        rotary: bool = False,
        dropout: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__(
            hidden_dim,
            num_heads,
            retrieval=retrieval,
            chunk_size=chunk_size,
            compression_factor=compression_factor,
            feature_expansion=feature_expansion,
            chunk_overlap=chunk_overlap,
            feature_map=feature_map,
            chunk_states=chunk_states,
            initial_gain=initial_gain,
            meta_projections=meta_projections,
            num_kv_heads=num_kv_heads,
            rotary=rotary,
            dropout=dropout,
            impl=impl,
        )
        TokenRetrievalOptions(chunk_size, chunk_overlap, router, candidates, state_dtype)  # raises for options out of range
        if state_store not in get_args(streaming.Store):
            raise ValueError(f"state_store must be one of {', '.join(get_args(streaming.Store))}, got {state_store!r}")
        if meta_projections and router != "meta":
            raise ValueError(f'meta_projections are those of router="meta", got router={router!r}')
        self.router: Router = router
        self.candidates = candidates
        self.state_dtype: StateDtype | None = state_dtype
        self.state_store: streaming.Store = state_store
        self.computes_in = None if state_dtype is None else torch.bfloat16
        self.exponent = None if router == "meta" else nn.Parameter(torch.full((num_heads,), 2.0))

    @property
    def token_options(self) -> TokenRetrievalOptions:
        """The current settings; in eval mode without dropout."""
        return TokenRetrievalOptions(
            self.chunk_size, self.chunk_overlap, self.router, self.candidates, self.state_dtype, self.dropout_p
        )

    # --- whole sequences ---

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        """The tensors of `TokenRetrievalInputs` in order, without gain and exponent, and without those that are None.

        Args:
            hidden_states: [batch, time, hidden_dim].
            start: position of the first token, a multiple of chunk_size.
        """
        inputs = self._project(hidden_states, start, hidden_states.shape[1] // self.chunk_size)
        return tuple(x for x in inputs[:-2] if x is not None)

    def attend(self, *tensors: Tensor) -> Tensor:
        """The attention of what `project` returns, with the module's gain, exponent and options."""
        inputs = self._named(tensors)
        return self._segment(inputs, chunks=(inputs.q.shape[2] - 1) // self.chunk_size).output

    def reference(self, *tensors: Tensor) -> Tensor:
        """`attend` by `bsbr.token_retrieval.reference`, with states that are not rounded."""
        options = self.token_options
        return reference.token_retrieval_attention(
            **self._named(tensors)._asdict(),
            chunk_size=options.chunk_size,
            chunk_overlap=options.chunk_overlap,
            router=options.router,
            candidates=options.candidates,
        )

    def unsupported(self, backend: str, *tensors: Tensor) -> str | None:
        """See `Attention.unsupported`."""
        return cpp.unsupported(self._named(tensors), self.token_options)

    def implementation(self, *tensors: Tensor) -> str:
        """See `Attention.implementation`."""
        return self.select_backend(*tensors)

    def context_parallel_forward(self, hidden_states: Tensor, group: SequenceGroup) -> Tensor:
        """Raises NotImplementedError."""
        return Attention.context_parallel_forward(self, hidden_states, group)

    def _segment(self, inputs: TokenRetrievalInputs, chunks: int, past: Memory = ()) -> TokenSegment:
        backend = select(self.impl, {"cpp": partial(cpp.unsupported, inputs, self.token_options)})
        run = cpp.segment if backend == "cpp" else pytorch.segment
        return run(inputs, self.token_options, chunks, past)

    # --- projections ---

    def _project(self, hidden_states: Tensor, start: int, meta_keys: int) -> TokenRetrievalInputs:
        tokens = self._project_tokens(hidden_states, start)
        meta_key = None if self.router != "meta" else self._meta_key(self._pooled(hidden_states, meta_keys))
        return self._with_parameters(tokens, self._meta_query_of_tokens(hidden_states), meta_key)

    def _meta_query_of_tokens(self, hidden_states: Tensor) -> Tensor | None:
        return self._meta_query(hidden_states) if self.router == "meta" else None

    def _with_parameters(self, tokens: TokenInputs, meta_query: Tensor | None, meta_key: Tensor | None) -> TokenRetrievalInputs:
        return TokenRetrievalInputs(*tokens, meta_query, meta_key, self.gain, self.exponent)

    def _named(self, tensors: tuple[Tensor, ...]) -> TokenRetrievalInputs:
        """What `project` returns, by name."""
        has_beta = self.beta_proj is not None
        tokens = TokenInputs(*tensors[: 5 + has_beta])
        meta_query, meta_key = tensors[5 + has_beta :] if self.router == "meta" else (None, None)
        return self._with_parameters(tokens, meta_query, meta_key)

    # --- streaming ---

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `Attention.extend`; the state is a `TokenStreamingState`."""
        check_hidden_states(hidden_states, self.hidden_dim)
        if state is None:
            current = TokenStreamingState.empty(hidden_states, self._head_sizes, self.token_options)
        else:
            current = TokenStreamingState.from_state(state)
            current.check(hidden_states, self._head_sizes, self.token_options)
        room = -current.position % self.chunk_size  # in the open chunk, if there is one
        if room == 0 and current.memory and hidden_states.shape[1] < self.chunk_size:
            room = self.chunk_size  # a new chunk that stays open: a few tokens read few states
        attended = []
        if room:
            part, current = self._continue(hidden_states[:, :room], current)
            attended.append(part)
        if hidden_states.shape[1] > room:
            part, current = self._open(hidden_states[:, room:], current)
            attended.append(part)
        return self.output(attended[0] if len(attended) == 1 else torch.cat(attended, dim=2)), current.to_state()

    def extend_in_segments(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `Attention.extend_in_segments`."""
        return Attention.extend_in_segments(self, hidden_states, state)

    def _open(self, hidden_states: Tensor, state: TokenStreamingState) -> tuple[Tensor, TokenStreamingState]:
        """Tokens that begin at a chunk boundary."""
        chunks = hidden_states.shape[1] // self.chunk_size
        inputs = streaming.joined_inputs(self._project(hidden_states, state.position, chunks), state)
        segment = self._segment(inputs, chunks, state.memory)
        after = streaming.after_segment(inputs, hidden_states, state, self.token_options, segment.table, self.state_store)
        return segment.output, after

    def _continue(self, hidden_states: Tensor, state: TokenStreamingState) -> tuple[Tensor, TokenStreamingState]:
        """Tokens of the open chunk."""
        tokens = self._project_tokens(hidden_states, state.position)
        selector = self._meta_query_of_tokens(hidden_states)
        readers = pytorch.Readers(
            tokens.q_features if selector is None else selector, tokens.q_features, self.gain, self.exponent, state.position
        )
        attended, state = streaming.continue_chunk(tokens, readers, hidden_states, state, self.token_options, self.impl)
        if state.position % self.chunk_size:
            return attended, state
        meta_key = None
        if self.router == "meta":
            meta_key = self._meta_key((state.open_hidden / self.chunk_size).to(hidden_states.dtype).unsqueeze(1))
        return attended, streaming.close_chunk(state, meta_key, self.token_options, self.state_store)

    # --- cost ---

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        """See `bsbr.token_retrieval.cost.attention_flops_per_token`."""
        count = partial(cost.attention_flops_per_token, delta_rule=self.beta_proj is not None)
        return batch_size * count(seq_len, self._head_sizes, self.token_options)

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        """See `bsbr.token_retrieval.cost.decoding_bytes`."""
        sizes = {"hidden_dim": self.hidden_dim, "itemsize": self.dtype.itemsize}
        return batch_size * cost.decoding_bytes(seq_len, self._head_sizes, self.token_options, **sizes)
