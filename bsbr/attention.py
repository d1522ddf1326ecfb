"""Block Sparse attention with Block Retrieval: softmax inside a chunk, retrieval of compressed states between chunks.

`bsbr_attention` is the attention as a function of tensors, `BSBRAttention` the module with projections around it.
`bsbr.reference` implements the same function slowly, from its definition, without shared code.
"""

import math
from importlib import import_module
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from bsbr import cost, reference, streaming
from bsbr.backends import dispatch
from bsbr.backends.cpp import decode
from bsbr.backends.triton import tuning
from bsbr.context_parallel import context_parallel_bsbr_attention
from bsbr.features import FeatureMap, QuadraticFeatures, build_feature_map
from bsbr.inputs import BSBRInputs, BSBROptions, ChunkRoom, TokenInputs
from bsbr.interface import (
    MultiHeadAttention,
    State,
    check_hidden_states,
    next_position,
    require_positive,
    rotate,
    split_heads,
)
from bsbr.precision import is_autocast
from bsbr.process_group import SequenceGroup
from bsbr.streaming import StreamingState
from bsbr.validation import check_inputs


def bsbr_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    meta_query: Tensor,
    meta_key: Tensor,
    *,
    chunk_size: int,
    q_features: Tensor | None = None,
    k_features: Tensor | None = None,
    beta: Tensor | None = None,
    gain: Tensor | None = None,
    chunk_overlap: int = 0,
    top_k: int | None = None,
    normalise: bool = False,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """O = softmax(QKᵀ/√d ⊙ M_in) V + g φ(Q) F̄,  F̄_t = Σ_s softmax_s(r_t·h_s/√d ⊙ M_out) F_s,  F_s = φ(K_s)ᵀ V_s.

    Time is cut into C = ⌈time / chunk_size⌉ chunks, the last of any length. M_in is causal inside a chunk, and each token also
    sees the `chunk_overlap` tokens before its chunk. M_out is strictly lower triangular over chunks: a chunk retrieves earlier
    chunks only, and the first chunk retrieves nothing. ⊙ M means that pairs outside the mask M get the score −∞.

    With β, F_s is the state that the delta rule makes of the chunk, S ← S + β_i φ(k_i) (v_i − Sᵀ φ(k_i))ᵀ from S = 0: a key that
    is stored again has its value replaced, and similar keys interfere less (arXiv:2406.06484).

    Args:
        q: queries [batch, heads, time, head_dim].
        k, v: keys and values [batch, kv_heads, time, head_dim]; kv_heads divides heads.
        meta_query: r [batch, heads, C, head_dim], one per chunk. To be causal it may depend on tokens up to the chunk's first.
        meta_key: h [batch, kv_heads, C − 1 or more, head_dim], one for each chunk that a later chunk can retrieve.
        chunk_size: tokens in a chunk.
        q_features, k_features: φ(q), φ(k) [batch, heads or kv_heads, time, d_r]; by default `unit_norm` of q and k.
        beta: β [batch, kv_heads, time], in [0, 1] where φ(k) has unit norm; by default F_s is the plain sum.
        gain: g [heads], the weight of the retrieved term; by default 1.
        chunk_overlap: number of tokens before its chunk that a token also sees.
        top_k: how many chunks each chunk retrieves, those with the highest scores, the earliest of equals; by default all.
        normalise: whether F̄_t is scaled to the Frobenius norm √head_dim before the gain.
        dropout_p: dropout probability of the weights of both softmaxes; it acts before `normalise`.
        impl: "torch", "cpp" (CPU) or "triton" (GPU); "auto" takes the fastest that supports the inputs.

    Returns:
        [batch, heads, time, head_dim]. Costs per head O(n·(chunk_size + chunk_overlap)·d) for local attention, O(n·d_r·d) for
        states and read-out, O(n·chunk_size·(d_r + d)) for the delta rule, and O(C²·d_r·d) for retrieval, or
        O(C²·d + C·top_k·d_r·d) with top_k. Memory is linear in n except for the C² retrieval scores.

    Raises:
        ValueError: if shapes do not fit, chunk_size or top_k is below 1, chunk_overlap is below 0, or `impl` is unknown.
        NotImplementedError: if the backend that `impl` names does not support the inputs.
    """
    inputs = BSBRInputs(q, k, v, meta_query, meta_key, q_features, k_features, beta, gain)
    return _attend(inputs, BSBROptions(chunk_size, chunk_overlap, top_k, normalise, dropout_p), impl)


def _attend(inputs: BSBRInputs, options: BSBROptions, impl: str) -> Tensor:
    check_inputs(inputs, options, retrievable=options.num_chunks(inputs.q.shape[-2]) - 1)
    return dispatch.attend(impl, inputs, options)


# --- the module ---------------------------------------------------------------------------------

GAIN_SCALE = 16
"""The gain divided by its parameter. The gain starts at 0 and must grow to about 1 before retrieval contributes. An optimizer
such as Adam changes a parameter by about the learning rate per step; with this factor the gain grows 16 times as fast."""

FORMS = {
    "chunk": ("bsbr.attention", "BSBRAttention"),
    "token": ("bsbr.token_retrieval.attention", "TokenRetrievalAttention"),
}
"""Module and class of each value of `retrieval`, whose module is loaded when the class is first made: it depends on this one."""

Pooling = Literal["mean", "last"]
ChunkStates = Literal["delta", "sum"]


class BSBRAttention(MultiHeadAttention):
    """`bsbr_attention` between learned projections: causal, for any length, streamable.

    By default the meta query r_t is the query of a chunk's first token and the meta key h_s is the mean key of a chunk, both
    before any rotation. φ is the `feature_map` (see `bsbr.features`). The write strength is β_t = σ(w·x_t + b), one per kv head,
    with w = 0 and b = 2 at initialisation. The gain is g = `GAIN_SCALE`·γ with one learned γ per head. It starts at 0, so a new
    model attends inside chunks only: before training, the retrieved term is noise and larger than the local term. With
    rotary=True, queries and keys of the local part are rotated; those of retrieval are not.

    Args:
        hidden_dim, num_heads, num_kv_heads, rotary, dropout: see `MultiHeadAttention`.
        chunk_size: B, tokens in a chunk.
        retrieval: "chunk" as above; "token" makes a `bsbr.token_retrieval.TokenRetrievalAttention`, which has options of its own.
        compression_factor, feature_expansion: d_r = head_dim / compression_factor · feature_expansion. The factor divides
            head_dim; None means 1.
        chunk_overlap: number of tokens before its chunk that a token also sees.
        retrieval_top_k: `top_k` of `bsbr_attention`.
        feature_map: "quadratic" or "linear", see `bsbr.features`.
        chunk_states: "delta" computes F_s by the delta rule with β, "sum" as the plain sum.
        retrieval_norm: `normalise` of `bsbr_attention`.
        initial_gain: g at initialisation.
        meta_projections: whether meta queries and meta keys have separate projections instead of sharing those of q and k.
        meta_pooling: which hidden state of a chunk is projected to its meta key: the "mean" or the "last".
        impl: see `bsbr_attention`.

    Raises:
        ValueError: if an option is out of range; the message names it.
    """

    backends = tuple(dispatch.BACKENDS)
    bounded_state = True

    def __new__(cls, *_: Any, retrieval: str = "chunk", **__: Any) -> Self:
        """Makes an object of the class that `retrieval` names."""
        if retrieval not in FORMS:
            raise ValueError(f"retrieval must be one of {', '.join(sorted(FORMS))}, got {retrieval!r}")
        if cls is not BSBRAttention:
            return super().__new__(cls)
        module, name = FORMS[retrieval]
        form: type[Self] = getattr(import_module(module), name)
        return super().__new__(form)

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        *,
        retrieval: str = "chunk",
        chunk_size: int = 128,
        compression_factor: int | None = None,
        feature_expansion: int = 1,
        chunk_overlap: int = 0,
        retrieval_top_k: int | None = None,
        feature_map: FeatureMap = "quadratic",
        chunk_states: ChunkStates = "delta",
        retrieval_norm: bool = True,
        initial_gain: float = 0.0,
        meta_projections: bool = False,
        meta_pooling: Pooling = "mean",
        num_kv_heads: int | None = None,
        rotary: bool = False,
        dropout: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__(hidden_dim, num_heads, num_kv_heads=num_kv_heads, rotary=rotary, dropout=dropout, impl=impl)
        BSBROptions(chunk_size, chunk_overlap, retrieval_top_k)  # raises for options out of range
        compression_factor = 1 if compression_factor is None else compression_factor
        require_positive(compression_factor=compression_factor, feature_expansion=feature_expansion)
        if self.head_dim % compression_factor:
            raise ValueError(
                f"compression_factor must divide head_dim = {self.head_dim} ({hidden_dim} / {num_heads}), got {compression_factor}"
            )
        for option, value, known in (
            ("meta_pooling", meta_pooling, get_args(Pooling)),
            ("chunk_states", chunk_states, get_args(ChunkStates)),
        ):
            if value not in known:
                raise ValueError(f"{option} must be one of {', '.join(known)}, got {value!r}")
        if isinstance(initial_gain, bool) or not isinstance(initial_gain, int | float) or not math.isfinite(initial_gain):
            raise ValueError(f"initial_gain must be a finite number, got {initial_gain!r}")
        self.chunk_size = chunk_size
        self.chunk_overlap = chunk_overlap
        self.retrieval_top_k = retrieval_top_k
        self.retrieval_norm = retrieval_norm
        self.meta_pooling: Pooling = meta_pooling
        self.feature_dim = self.head_dim // compression_factor * feature_expansion
        self.meta_q_proj = nn.Linear(hidden_dim, hidden_dim, bias=False) if meta_projections else None
        self.meta_k_proj = nn.Linear(hidden_dim, self.num_kv_heads * self.head_dim, bias=False) if meta_projections else None
        self.features = build_feature_map(feature_map, hidden_dim, num_heads, self.num_kv_heads, self.feature_dim, impl)
        self.beta_proj = nn.Linear(hidden_dim, self.num_kv_heads) if chunk_states == "delta" else None
        if self.beta_proj is not None:  # at first all tokens write with the same strength, and nearly in full
            nn.init.zeros_(self.beta_proj.weight)
            nn.init.constant_(self.beta_proj.bias, 2.0)
        self.retrieval_gain = nn.Parameter(torch.full((num_heads,), initial_gain / GAIN_SCALE))

    @property
    def gain(self) -> Tensor:
        """g [heads]."""
        return GAIN_SCALE * self.retrieval_gain

    @property
    def block_length(self) -> int:
        """The chunk size."""
        return self.chunk_size

    @property
    def options(self) -> BSBROptions:
        """The current settings of `bsbr_attention`; in eval mode without dropout."""
        return BSBROptions(self.chunk_size, self.chunk_overlap, self.retrieval_top_k, self.retrieval_norm, self.dropout_p)

    # --- whole sequences ---

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        """The tensors of `BSBRInputs` in order, without the gain, and with β only if `chunk_states` is "delta".

        Args:
            hidden_states: [batch, time, hidden_dim].
            start: position of the first token, a multiple of chunk_size.
        """
        first_chunk = start == 0 and hidden_states.shape[1] <= self.chunk_size
        if first_chunk and self.feature_dim <= self.head_dim and not torch.is_grad_enabled():
            return self._project_first_chunk(hidden_states).tensors()
        return self._project_chunks(hidden_states, start, (hidden_states.shape[1] - 1) // self.chunk_size).tensors()

    def attend(self, *tensors: Tensor) -> Tensor:
        """`bsbr_attention` of what `project` returns, with the module's gain and options."""
        return _attend(self._inputs(tensors), self.options, self.impl)

    def reference(self, *tensors: Tensor) -> Tensor:
        """`attend` by `bsbr.reference.bsbr_attention`."""
        options = self.options
        return reference.bsbr_attention(
            **self._inputs(tensors)._asdict(),
            chunk_size=options.chunk_size,
            chunk_overlap=options.chunk_overlap,
            top_k=options.top_k,
            normalise=options.normalise,
        )

    def unsupported(self, backend: str, *tensors: Tensor) -> str | None:
        """See `Attention.unsupported`."""
        return dispatch.BACKENDS[backend](self._inputs(tensors), self.options)

    def implementation(self, *tensors: Tensor) -> str:
        """The backend that `attend` runs for these tensors; for Triton, with the origin of its tile sizes."""
        backend = self.select_backend(*tensors)
        return f"triton, {tuning.used(tensors[0])}" if backend == "triton" else backend

    def context_parallel_forward(self, hidden_states: Tensor, group: SequenceGroup) -> Tensor:
        """See `Attention.context_parallel_forward` and `bsbr.context_parallel`."""
        lengths = group.shard_lengths(hidden_states.shape[1], hidden_states.device, self.chunk_size)
        check_hidden_states(hidden_states, self.hidden_dim)
        is_last = group.rank == group.size - 1
        complete_or_followed = (hidden_states.shape[1] - is_last) // self.chunk_size
        inputs = self._project_chunks(hidden_states, sum(lengths[: group.rank]), complete_or_followed)._replace(gain=self.gain)
        return self.output(context_parallel_bsbr_attention(inputs, self.options, group, lengths=lengths))

    def _inputs(self, tensors: tuple[Tensor, ...]) -> BSBRInputs:
        return BSBRInputs(*tensors)._replace(gain=self.gain)

    # --- projections ---

    def _project_tokens(self, hidden_states: Tensor, start: int) -> TokenInputs:
        """Tensors with one row per token, of hidden states that begin at position `start`."""
        q, k, v = self.project_heads(hidden_states)
        q_features, k_features = self.features(hidden_states, q, k)
        if self.rotary:
            q, k = rotate(q, start), rotate(k, start)
        beta = None if self.beta_proj is None else self.beta_proj(hidden_states).sigmoid().transpose(1, 2)
        return TokenInputs(q, k, v, q_features, k_features, beta)

    def _project_chunks(self, hidden_states: Tensor, start: int, meta_keys: int) -> BSBRInputs:
        """Inputs of tokens that begin at a chunk boundary, with the meta keys of the first `meta_keys` chunks."""
        tokens = self._project_tokens(hidden_states, start)
        pooled = self._pooled(hidden_states, meta_keys)
        return tokens.with_meta(self._meta_query(hidden_states[:, :: self.chunk_size]), self._meta_key(pooled))

    def _project_first_chunk(self, hidden_states: Tensor) -> BSBRInputs:
        """Inputs of a sequence of one chunk, which retrieves nothing: placeholders stand for features and β, which are not read.

        Not for training: the parameters of features and β would have gradients None instead of 0.
        """
        q, k, v = super().project(hidden_states)
        placeholders = q[..., : self.feature_dim], k[..., : self.feature_dim], None if self.beta_proj is None else k[..., 0]
        return TokenInputs(q, k, v, *placeholders).with_meta(q[:, :, :1], k[:, :, :0])

    def _meta_query(self, hidden_states: Tensor) -> Tensor:
        """[batch, chunks, hidden_dim] -> [batch, heads, chunks, head_dim]."""
        project = self.q_proj if self.meta_q_proj is None else self.meta_q_proj
        return split_heads(project(hidden_states), self.num_heads)

    def _meta_key(self, pooled: Tensor) -> Tensor:
        """[batch, chunks, hidden_dim] -> [batch, kv_heads, chunks, head_dim]."""
        project = self.k_proj if self.meta_k_proj is None else self.meta_k_proj
        return split_heads(project(pooled), self.num_kv_heads)

    def _pooled(self, hidden_states: Tensor, chunks: int) -> Tensor:
        """The hidden state that represents each of the first `chunks` chunks [batch, chunks, hidden_dim]."""
        tokens = chunks * self.chunk_size
        if self.meta_pooling == "last":
            return hidden_states[:, self.chunk_size - 1 : tokens : self.chunk_size]
        pooled: Tensor = hidden_states[:, :tokens].unflatten(1, (chunks, self.chunk_size)).mean(dim=2)
        return pooled

    # --- streaming ---

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `Attention.extend`; the state is a `bsbr.streaming.StreamingState`.

        A token costs O((chunk_size + chunk_overlap + d_r)·head_dim) per head; a chunk's first token also mixes the states of all
        earlier chunks.
        """
        check_hidden_states(hidden_states, self.hidden_dim)
        if state is not None and self._decodes_in_cpp(hidden_states, state):
            return self._decode(hidden_states, state)
        if state is None:
            current = StreamingState.empty(hidden_states, self._head_sizes)
        else:
            current = StreamingState.from_state(state)
            current.check(hidden_states, self._head_sizes, self.options)
        room = -current.position % self.chunk_size  # in the open chunk, if there is one
        attended = []
        if room:
            part, current = self._continue_chunk(hidden_states[:, :room], current)
            attended.append(part)
        if hidden_states.shape[1] > room:
            part, current = self._open_chunks(hidden_states[:, room:], current)
            attended.append(part)
        return self.output(attended[0] if len(attended) == 1 else torch.cat(attended, dim=2)), current.to_state()

    def extend_in_segments(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `Attention.extend_in_segments`. The segments of a new sequence share one `ChunkRoom`."""
        of_parameters = hidden_states.dtype == self.dtype and not is_autocast()
        if state is not None or not of_parameters or not self._takes_segments(hidden_states):
            return super().extend_in_segments(hidden_states, state)
        check_hidden_states(hidden_states, self.hidden_dim)
        room = streaming.new_room(hidden_states, self._head_sizes, self.options)
        current, output = StreamingState.empty(hidden_states, self._head_sizes), torch.empty_like(hidden_states)
        for segment in self._segments(hidden_states.shape[1]):
            attended, current = self._open_chunks(hidden_states[:, segment], current, room)
            output[:, segment] = self.output(attended)
        return output, streaming.leave_room(current, room).to_state()

    def _decodes_in_cpp(self, hidden_states: Tensor, state: State) -> bool:
        """Whether the input is one token of an open chunk, without gradients, that C++ can take."""
        tensors = hidden_states, *(state[name] for name in decode.OpenChunk._fields)
        return (
            hidden_states.shape[1] == 1
            and next_position(state) % self.chunk_size > 0
            and self.impl in ("auto", "cpp")
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")  # the projections may then have another dtype than the state
            and decode.KERNELS.unsupported(*tensors, dropout_p=self.dropout_p) is None
        )

    def _decode(self, hidden_states: Tensor, state: State) -> tuple[Tensor, State]:
        """`extend` by one token of an open chunk in C++. The pages of the memory are not read: there may be thousands."""
        position, (batch, _, hidden_dim) = next_position(state), hidden_states.shape
        q, k, v = self.project_heads(hidden_states)
        features = self.features
        quadratic = isinstance(features, QuadraticFeatures)
        factors = features.factors(hidden_states) if isinstance(features, QuadraticFeatures) else features(hidden_states, q, k)
        if self.rotary:
            q, k = rotate(q, position), rotate(k, position)
        beta = None if self.beta_proj is None else self.beta_proj(hidden_states).sigmoid().view(batch, self.num_kv_heads, 1, 1)
        chunk = decode.OpenChunk(state["keys"], state["values"], state["retrieved"], state["open_state"])
        attended, chunk = decode.continue_chunk(decode.Token(q, k, v, factors[0], factors[1], beta, quadratic), chunk)
        after = {
            **state,
            **chunk._asdict(),
            "open_hidden": state["open_hidden"] + hidden_states.view(batch, hidden_dim),
            "position": state["position"] + 1,
        }
        if (position + 1) % self.chunk_size == 0:
            after = self._close_chunk(hidden_states, StreamingState.from_state(after)).to_state()
        return self.output(attended), after

    def _open_chunks(
        self, hidden_states: Tensor, state: StreamingState, room: ChunkRoom | None = None
    ) -> tuple[Tensor, StreamingState]:
        inputs = self._project_chunks(hidden_states, state.position, hidden_states.shape[1] // self.chunk_size)
        return streaming.open_chunks(inputs._replace(gain=self.gain), hidden_states, state, self.options, self.impl, room)

    def _continue_chunk(self, hidden_states: Tensor, state: StreamingState) -> tuple[Tensor, StreamingState]:
        tokens = self._project_tokens(hidden_states, state.position)
        attended, state = streaming.continue_chunk(tokens, hidden_states, state, self.options)
        return attended, state if state.position % self.chunk_size else self._close_chunk(hidden_states, state)

    def _close_chunk(self, hidden_states: Tensor, state: StreamingState) -> StreamingState:
        """Moves the open chunk, which ends with the last of `hidden_states`, into the memory."""
        mean = (state.open_hidden / self.chunk_size).to(hidden_states.dtype).unsqueeze(1)
        meta_key = self._meta_key(hidden_states[:, -1:] if self.meta_pooling == "last" else mean)
        return streaming.close_chunk(state, meta_key, self.options)

    # --- cost ---

    @property
    def _head_sizes(self) -> cost.HeadSizes:
        return cost.HeadSizes(self.num_heads, self.num_kv_heads, self.head_dim, self.feature_dim)

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        """See `bsbr.cost.attention_flops`."""
        delta_rule = self.beta_proj is not None
        return batch_size * cost.attention_flops(seq_len, self._head_sizes, self.options, delta_rule=delta_rule)

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        """See `bsbr.cost.state_bytes`."""
        itemsize = self.dtype.itemsize
        return batch_size * cost.state_bytes(seq_len, self._head_sizes, self.options, hidden_dim=self.hidden_dim, itemsize=itemsize)
