"""Block Sparse attention with Block Retrieval: softmax inside a chunk, retrieval of compressed states between chunks.

`bsbr_attention` is the attention alone, `BSBRAttention` the module around it. `bsbr.reference` holds the
same function as the definition reads; the two share no code.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor, nn

from bsbr import reference
from bsbr.backends import dispatch, pytorch, triton
from bsbr.backends.cpp import operators
from bsbr.backends.pytorch import pseudo_values, sdpa
from bsbr.backends.triton import tuning
from bsbr.cost import attention_flops
from bsbr.features import FeatureMap, build_feature_map
from bsbr.interface import (
    MultiHeadAttention,
    State,
    check_heads,
    check_hidden_states,
    next_position,
    position_counter,
    require_positive,
    rotate,
    split_heads,
    state_pages,
)
from bsbr.process_group import SequenceGroup
from bsbr.validation import check_inputs, check_options


def bsbr_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    h: Tensor,
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
    impl: dispatch.Impl = "auto",
) -> Tensor:
    """O = softmax(QKᵀ/√d ⊙ M_in) V + g φ(Q) F̄,  F̄_t = Σ_s softmax_s(r_t·h_s/√d ⊙ M_out) F_s,  F_s = φ(K_s)ᵀ V_s.

    With β, F_s is what the delta rule makes of a chunk, S ← S + β_i φ(k_i) (v_i − Sᵀ φ(k_i))ᵀ from S = 0: a key that is stored
    a second time has its value replaced, and keys that are alike disturb each other less (Yang 2024, arXiv:2406.06484).
    Time is cut into C = ⌈time / chunk_size⌉ chunks, the last of any length. M_in: causal inside a chunk, and
    each token also sees the `chunk_overlap` tokens before its chunk. M_out: strictly lower triangular over
    chunks, so the first chunk retrieves nothing.

    q: [batch, heads, time, head_dim]; k, v: [batch, kv_heads, time, head_dim], kv_heads a divisor of heads.
    r: [batch, heads, C, head_dim], the meta query of each chunk, which must be known at its first token.
    h: [batch, kv_heads, C - 1 or more, head_dim], the meta key of each chunk that a later one can retrieve.
    q_features, k_features: φ(q), φ(k) [batch, heads or kv_heads, time, d_r]; by default `unit_norm` of q and k.
    beta: β [batch, kv_heads, time], in [0, 1] where φ(k) is of unit norm; by default F_s is the sum.
    gain: g, one factor a head [heads], how much retrieval weighs; by default 1.
    top_k keeps only the top_k best-scored chunks in each retrieval, the earliest of equals. normalise: F̄_t is taken to the
    norm √head_dim, however many states it is a mean of. dropout_p acts on the weights of both softmaxes, before that.
    impl: torch, native (CPU, compiled C++), triton (GPU); auto takes the fastest that can.

    Returns [batch, heads, time, head_dim]. Cost per head: local O(n·chunk_size·d), states and read-out O(n·d_r·d),
    the delta rule O(n·chunk_size·(d_r + d)), mixing O(C²·d_r·d), or O(C·top_k·d_r·d) with top_k; memory linear in n but
    for the C² retrieval weights.
    Raises ValueError if shapes do not fit or chunk_size or top_k is below 1 or chunk_overlap below 0, NotImplementedError
    if the implementation that was asked for cannot take such input.
    """
    check_heads(q, k, v)
    check_options(chunk_size, chunk_overlap, top_k)
    chunks = -(-q.shape[2] // chunk_size)
    check_inputs(q, k, v, r, h, q_features, k_features, beta, gain, chunk_size=chunk_size, retrievable=chunks - 1)
    options: dict[str, Any] = {
        "q_features": q_features,
        "k_features": k_features,
        "beta": beta,
        "gain": gain,
        "chunk_size": chunk_size,
        "chunk_overlap": chunk_overlap,
        "top_k": top_k,
        "normalise": normalise,
    }
    features = () if q_features is None or k_features is None else (q_features, k_features)
    chosen = dispatch.select_backend(impl, q, k, v, r, h, *features, gain=gain, dropout_p=dropout_p)
    if chosen == "triton":
        return triton.bsbr_attention(q, k, v, r, h, **options)
    h = h[:, :, : chunks - 1]
    if chosen == "cpp":
        return operators.segment(q, k, v, r, h, **options)[0]
    return pytorch.segment(q, k, v, r, h, **options, dropout_p=dropout_p)[0]


# --- the module ---------------------------------------------------------------------------------

GAIN = 16
"""What the learned gain of retrieval is taken times: so far it has to come from 0 in the steps that a training has, each as large
as the learning rate, if among all chunks one is to be heard."""

PAGE = 64
"""Chunks whose meta keys and states lie in one tensor of a state: the last page is copied when a chunk is added, no other."""


Pooling = Literal["mean", "last"]
ChunkStates = Literal["delta", "sum"]


class _Options(TypedDict):
    chunk_size: int
    q_features: Tensor
    k_features: Tensor
    beta: Tensor | None
    gain: Tensor
    chunk_overlap: int
    top_k: int | None
    normalise: bool


class BSBRAttention(MultiHeadAttention):
    """`bsbr_attention` between learned projections; causal, any length, streamable.

    r_t is the query of a chunk's first token, h_s the mean key of a chunk, both before any rotation.
    φ is `feature_map` (see `bsbr.features`). β_t = σ(w·x_t + b), one a kv head, σ(2) at first. g = `GAIN` · γ, one learned γ
    per head, sets how much retrieval weighs, and begins at 0: a model begins as its own chunks alone, since what is retrieved
    before anything was learned is noise, larger than the rest. Under rotary=True the local part is rotated; retrieval is by
    content and is not. Where no gradients are wanted, `forward` and `extend` go through a long sequence in segments, so
    that what they need beside input, output and chunk states does not grow with the length.

    chunk_size: B. compression_factor: d_r = head_dim / compression_factor, which must divide; None is 1.
    chunk_overlap: tokens before its chunk that a token also sees. retrieval_top_k, impl: see `bsbr_attention`.
    chunk_states: F_s by the "delta" rule, with β, or the "sum". retrieval_norm: whether F̄_t is normalised, see `bsbr_attention`.
    initial_gain: g at first. meta_projections: r and h have projections of their own, in place of those of q and k.
    meta_pooling: h is of the mean of a chunk's tokens, or of the "last" alone.
    num_kv_heads, rotary, dropout: see `MultiHeadAttention`.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        *,
        chunk_size: int = 128,
        compression_factor: int | None = None,
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
        impl: dispatch.Impl = "auto",
    ) -> None:
        super().__init__(hidden_dim, num_heads, num_kv_heads=num_kv_heads, rotary=rotary, dropout=dropout)
        dispatch.check_impl(impl)
        check_options(chunk_size, chunk_overlap, retrieval_top_k)
        compression_factor = 1 if compression_factor is None else compression_factor
        require_positive(compression_factor=compression_factor)
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
        self.impl: dispatch.Impl = impl
        self.feature_dim = self.head_dim // compression_factor
        self.meta_q_proj = nn.Linear(hidden_dim, hidden_dim, bias=False) if meta_projections else None
        self.meta_k_proj = nn.Linear(hidden_dim, self.num_kv_heads * self.head_dim, bias=False) if meta_projections else None
        self.features = build_feature_map(feature_map, hidden_dim, num_heads, self.num_kv_heads, self.feature_dim, impl)
        self.beta_proj = nn.Linear(hidden_dim, self.num_kv_heads) if chunk_states == "delta" else None
        if self.beta_proj is not None:  # at first, all tokens write alike, and most of what they have
            nn.init.zeros_(self.beta_proj.weight)
            nn.init.constant_(self.beta_proj.bias, 2.0)
        self.retrieval_gain = nn.Parameter(torch.full((num_heads,), initial_gain / GAIN))

    @property
    def gain(self) -> Tensor:
        """g, one factor a head."""
        return GAIN * self.retrieval_gain

    @property
    def block_length(self) -> int:
        return self.chunk_size

    def project(self, hidden_states: Tensor, start: int = 0, *, followed: bool = False) -> tuple[Tensor, ...]:
        """q, k, v, r, h, φ(q), φ(k) as `bsbr_attention` takes them, and β where `chunk_states` is "delta".

        `start` must be a chunk's beginning. followed: more tokens come after these, which can retrieve the last chunk too.
        """
        if start == 0 and not followed and hidden_states.shape[1] <= self.chunk_size and not torch.is_grad_enabled():
            # Nothing is retrieved, so what is for that alone is not read, and not made; under gradients it has zero ones.
            q, k, v = super().project(hidden_states)
            unread = q[..., : self.feature_dim], k[..., : self.feature_dim], k[..., 0]
            return q, k, v, q[:, :, :1], k[:, :, :0], *unread[: 2 if self.beta_proj is None else 3]
        q, k, v, *stored = self._project_tokens(hidden_states, start)
        pooled = self._pooled(hidden_states, (hidden_states.shape[1] - (not followed)) // self.chunk_size)
        return q, k, v, self._meta_query(hidden_states[:, :: self.chunk_size]), self._meta_key(pooled), *stored

    def attend(self, *tensors: Tensor) -> Tensor:
        return bsbr_attention(*tensors[:5], **self._options(tensors), dropout_p=self.dropout_p, impl=self.impl)

    def reference(self, *tensors: Tensor) -> Tensor:
        """`attend` by `bsbr.reference.bsbr_attention`."""
        return reference.bsbr_attention(*tensors[:5], **self._options(tensors))

    def context_parallel_forward(self, hidden_states: Tensor, group: SequenceGroup) -> Tensor:
        """See `Attention.context_parallel_forward` and `bsbr.context_parallel`."""
        from bsbr.context_parallel import context_parallel_bsbr_attention  # which is made of this file

        lengths = group.shard_lengths(hidden_states.shape[1], hidden_states.device, self.chunk_size)
        check_hidden_states(hidden_states, self.hidden_dim)
        tensors = self.project(hidden_states, sum(lengths[: group.rank]), followed=group.rank < group.size - 1)
        options = self._options(tensors)
        return self.output(
            context_parallel_bsbr_attention(*tensors[:5], **options, group=group, lengths=lengths, dropout_p=self.dropout_p)
        )

    def _options(self, tensors: tuple[Tensor, ...]) -> _Options:
        q_features, k_features, *beta = tensors[5:]
        return {
            "chunk_size": self.chunk_size,
            "q_features": q_features,
            "k_features": k_features,
            "beta": beta[0] if beta else None,
            "gain": self.gain,
            "chunk_overlap": self.chunk_overlap,
            "top_k": self.retrieval_top_k,
            "normalise": self.retrieval_norm,
        }

    def _project_tokens(self, hidden_states: Tensor, start: int) -> tuple[Tensor, ...]:
        """q, k, v, φ(q), φ(k) and, where there is one, β of tokens from position `start` on."""
        q, k, v = self.project_heads(hidden_states)
        q_features, k_features = self.features(hidden_states, q, k)
        if self.rotary:
            q, k = rotate(q, start), rotate(k, start)
        beta = () if self.beta_proj is None else (self.beta_proj(hidden_states).sigmoid().transpose(1, 2),)
        return q, k, v, q_features, k_features, *beta

    def _stored(self, k_features: Tensor, v: Tensor, beta: Sequence[Tensor], state: Tensor) -> Tensor:
        """The state of an open chunk after more of its tokens, in the type of `state`, that before them."""
        k_features, v = k_features.to(state.dtype), v.to(state.dtype)
        return state + k_features.mT @ (pseudo_values(k_features, v, beta[0], state) if beta else v)

    def _meta_query(self, hidden_states: Tensor) -> Tensor:
        project = self.q_proj if self.meta_q_proj is None else self.meta_q_proj
        return split_heads(project(hidden_states), self.num_heads)

    def _pooled(self, hidden_states: Tensor, chunks: int) -> Tensor:
        """What stands for each of the first `chunks` chunks [batch, chunks, hidden_dim]."""
        tokens = chunks * self.chunk_size
        if self.meta_pooling == "last":
            return hidden_states[:, self.chunk_size - 1 : tokens : self.chunk_size]
        pooled: Tensor = hidden_states[:, :tokens].unflatten(1, (chunks, self.chunk_size)).mean(dim=2)
        return pooled

    def _meta_key(self, pooled: Tensor) -> Tensor:
        project = self.k_proj if self.meta_k_proj is None else self.meta_k_proj
        return split_heads(project(pooled), self.num_kv_heads)

    def implementation(self, *tensors: Tensor) -> str:
        chosen = dispatch.select_backend(self.impl, *tensors[:7], gain=self.gain, dropout_p=self.dropout_p)
        return f"triton, {tuning.used(tensors[0])}" if chosen == "triton" else chosen

    # --- streaming ---

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        short = hidden_states.dim() != 3 or hidden_states.shape[1] <= self._segment
        if short or attention_mask is not None or torch.is_grad_enabled():
            return super().forward(hidden_states, attention_mask)
        return self.extend(hidden_states)[0]

    @property
    def _segment(self) -> int:
        """Tokens that are taken at a time where no gradients are wanted."""
        return PAGE * self.chunk_size

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `Attention.extend`. A token costs O((chunk_size + d_r)·head_dim) a head, and each chunk's first one the mixing.

        The state: `keys` and `values` of the open chunk and of the overlap before it; `meta_keys.<i>` h and `states.<i>` F of
        the complete chunks, `PAGE` of them in each but the last; `retrieved`, the open chunk's g F̄; and its sums so far,
        `open_state` and `open_hidden`. Pages that are full are never copied again.
        """
        check_hidden_states(hidden_states, self.hidden_dim)
        tokens, segment = hidden_states.shape[1], self._segment
        if torch.is_grad_enabled() or tokens <= segment:
            return self._extend(hidden_states, state)
        output = torch.empty_like(hidden_states)
        stop = segment - (0 if state is None else next_position(state) % self.chunk_size)  # segments end where chunks do
        output[:, :stop], state = self._extend(hidden_states[:, :stop], state)
        for start in range(stop, tokens, segment):
            part = slice(start, start + segment)
            output[:, part], state = self._extend(hidden_states[:, part], state)
        return output, state

    def _extend(self, hidden_states: Tensor, state: State | None) -> tuple[Tensor, State]:
        state = self._empty_state(hidden_states) if state is None else state
        position = next_position(state)
        opened = position % self.chunk_size
        room = self.chunk_size - opened
        if opened == 0:
            attended, state = self._open_chunks(hidden_states, state, position)
        elif hidden_states.shape[1] <= room:
            attended, state = self._continue_chunk(hidden_states, state, position)
        else:
            finished, state = self._continue_chunk(hidden_states[:, :room], state, position)
            rest, state = self._open_chunks(hidden_states[:, room:], state, position + room)
            attended = torch.cat([finished, rest], dim=2)
        return self.output(attended), state

    def _empty_state(self, hidden_states: Tensor) -> State:
        batch, heads, kv_heads = hidden_states.shape[0], self.num_heads, self.num_kv_heads
        new, wide = hidden_states.new_zeros, torch.promote_types(hidden_states.dtype, torch.float32)
        return {
            "keys": new(batch, kv_heads, 0, self.head_dim),
            "values": new(batch, kv_heads, 0, self.head_dim),
            "retrieved": new(batch, heads, self.feature_dim, self.head_dim),
            "open_state": new(batch, kv_heads, self.feature_dim, self.head_dim, dtype=wide),
            "open_hidden": new(batch, self.hidden_dim, dtype=wide),
            "position": position_counter(0),
        }

    def _open_chunks(self, hidden_states: Tensor, state: State, position: int) -> tuple[Tensor, State]:
        """Tokens that begin at a chunk's beginning: the parallel form, with the chunks before them in the retrieval."""
        tokens, size = hidden_states.shape[1], self.chunk_size
        q, k, v, q_features, k_features, *beta = self._project_tokens(hidden_states, position)
        keys, values = _joined(state["keys"], k), _joined(state["values"], v)
        complete = tokens // size
        meta_keys = self._meta_key(self._pooled(hidden_states, complete))
        known = state_pages(state, "meta_keys"), state_pages(state, "states")
        tensors = q, keys, values, self._meta_query(hidden_states[:, ::size]), meta_keys, q_features, k_features, *beta
        options = self._options(tensors)
        if self.implementation(*tensors) == "cpp":
            attended, states, retrieved = operators.segment(*tensors[:5], past=known, **options)
        else:  # the kernels know of no past
            attended, states, retrieved = pytorch.segment(*tensors[:5], past=known, **options, dropout_p=self.dropout_p)
        rest = complete * size
        opened = k_features[:, :, rest:], v[:, :, rest:], [one[:, :, rest:] for one in beta]
        wide = state["open_hidden"].dtype
        after = self._keep(keys, values, position + tokens)
        after |= _paged("meta_keys", known[0], meta_keys) | _paged("states", known[1], states)
        after |= {
            "retrieved": retrieved.clone(),  # a view would keep every chunk's alive
            "open_state": self._stored(*opened, torch.zeros_like(state["open_state"])),
            "open_hidden": hidden_states[:, rest:].to(wide).sum(dim=1),
        }
        return attended, after

    def _continue_chunk(self, hidden_states: Tensor, state: State, position: int) -> tuple[Tensor, State]:
        """Tokens that all fall into the open chunk, its last one perhaps included: no chunk but this one is touched."""
        q, k, v, q_features, k_features, *beta = self._project_tokens(hidden_states, position)
        keys, values = torch.cat([state["keys"], k], dim=2), torch.cat([state["values"], v], dim=2)
        tokens = q.shape[2]
        visible = None
        if tokens > 1:  # everything kept is visible: it is the open chunk and its overlap
            visible = torch.ones(tokens, keys.shape[2], dtype=torch.bool, device=q.device).tril(keys.shape[2] - tokens)
        attended = sdpa(q, keys, values, visible, self.dropout_p, is_causal=False) + q_features @ state["retrieved"]
        wide = state["open_hidden"].dtype
        after = {name: state[name] for name in state if name == "retrieved" or "." in name}  # the pages
        after |= self._keep(keys, values, position + tokens)
        after["open_state"] = self._stored(k_features, v, beta, state["open_state"])
        after["open_hidden"] = state["open_hidden"] + hidden_states.to(wide).sum(dim=1)
        if (position + tokens) % self.chunk_size == 0:
            mean = (after["open_hidden"] / self.chunk_size).to(hidden_states.dtype).unsqueeze(1)
            pooled = hidden_states[:, -1:] if self.meta_pooling == "last" else mean
            new = {"meta_keys": self._meta_key(pooled), "states": after["open_state"].to(v.dtype).unsqueeze(2)}
            for name, chunk in new.items():
                after |= _paged(name, state_pages(state, name), chunk)
            after["open_state"], after["open_hidden"] = (torch.zeros_like(after[name]) for name in ("open_state", "open_hidden"))
        return attended, after

    def _keep(self, keys: Tensor, values: Tensor, position: int) -> State:
        """The keys and values that the next token may see: the open chunk and the overlap before it."""
        kept = self._kept(position)
        start = keys.shape[2] - kept
        if start:  # a view would keep the whole alive, and would not save
            keys, values = (x[:, :, start:].clone(memory_format=torch.contiguous_format) for x in (keys, values))
        return {"keys": keys.contiguous(), "values": values.contiguous(), "position": position_counter(position)}

    def _kept(self, position: int) -> int:
        opened = position % self.chunk_size
        return opened + min(self.chunk_overlap, position - opened)

    # --- cost ---

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        sizes = (self.num_heads, self.num_kv_heads, self.head_dim, self.feature_dim)
        options = self.chunk_size, self.chunk_overlap, self.retrieval_top_k, self.beta_proj is not None
        return batch_size * attention_flops(seq_len, *sizes, *options)

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        state = self.feature_dim * self.head_dim
        cached = 2 * self.num_kv_heads * self._kept(seq_len) * self.head_dim
        remembered = seq_len // self.chunk_size * self.num_kv_heads * (self.head_dim + state) + self.num_heads * state
        sums = self.num_kv_heads * state + self.hidden_dim
        return batch_size * (self.dtype.itemsize * (cached + remembered) + max(4, self.dtype.itemsize) * sums)


# --- pages --------------------------------------------------------------------------------------


def _paged(name: str, pages: list[Tensor], new: Tensor) -> State:
    """The pages, `new` appended along dimension 2, as a state holds them."""
    if not new.shape[2]:
        return {f"{name}.{index}": page for index, page in enumerate(pages)}
    if pages and pages[-1].shape[2] < PAGE:
        *pages, open_page = pages
        new = torch.cat([open_page, new], dim=2)
    # Clones: a piece that is a view of the whole would keep it alive.
    cut = (
        [new.contiguous()]
        if new.shape[2] <= PAGE
        else [piece.clone(memory_format=torch.contiguous_format) for piece in new.split(PAGE, dim=2)]
    )
    return {f"{name}.{index}": page for index, page in enumerate([*pages, *cut])}


def _joined(before: Tensor, after: Tensor) -> Tensor:
    """Along time; no copy where nothing stands before."""
    return torch.cat([before, after], dim=2) if before.shape[2] else after
