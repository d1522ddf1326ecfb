"""Block Sparse attention with Block Retrieval: softmax inside a chunk, retrieval of compressed states between chunks.

`bsbr_attention` is the attention alone, `BSBRAttention` the module around it. `bsbr.reference` holds the
same function as the definition reads; the two share no code.
"""

from typing import TypedDict

import torch
from torch import Tensor, nn

from bsbr import reference
from bsbr.interface import (
    MultiHeadAttention,
    State,
    check_heads,
    check_hidden_states,
    count,
    next_position,
    require_positive,
    rotate,
    split_heads,
)
from bsbr.plain import chunk_states, local_attention, read, retrieve, sdpa, unit_norm
from bsbr.ranks import Ranks


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
    gain: Tensor | None = None,
    chunk_overlap: int = 0,
    top_k: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """O = softmax(QKᵀ/√d ⊙ M_in) V + g φ(Q) F̄,  F̄_t = Σ_s softmax_s(r_t·h_s/√d ⊙ M_out) F_s,  F_s = φ(K_s)ᵀ V_s.

    Time is cut into C = ⌈time / chunk_size⌉ chunks, the last of any length. M_in: causal inside a chunk, and
    each token also sees the `chunk_overlap` tokens before its chunk. M_out: strictly lower triangular over
    chunks, so the first chunk retrieves nothing.

    q: [batch, heads, time, head_dim]; k, v: [batch, kv_heads, time, head_dim], kv_heads a divisor of heads.
    r: [batch, heads, C, head_dim], the meta query of each chunk, which must be known at its first token.
    h: [batch, kv_heads, C - 1 or more, head_dim], the meta key of each chunk that a later one can retrieve.
    q_features, k_features: φ(q), φ(k) [batch, heads or kv_heads, time, d_r]; by default `unit_norm` of q and k.
    gain: g, one factor a head [heads], how much retrieval weighs; by default 1.
    top_k keeps only the top_k best-scored chunks in each retrieval, the earliest of equals. dropout_p acts on the weights
    of both softmaxes.

    Returns [batch, heads, time, head_dim]. Cost per head: local O(n·chunk_size·d), states and read-out O(n·d_r·d),
    mixing O(C²·d_r·d), or O(C·top_k·d_r·d) with top_k; memory linear in n but for the C² retrieval weights.
    Raises ValueError if shapes do not fit or chunk_size or top_k is below 1 or chunk_overlap below 0.
    """
    check_heads(q, k, v)
    check_options(chunk_size, chunk_overlap, top_k)
    chunks = -(-q.shape[2] // chunk_size)
    check_inputs(q, k, v, r, h, q_features, k_features, gain, chunk_size=chunk_size, retrievable=chunks - 1)
    q_features = unit_norm(q) if q_features is None else q_features
    k_features = unit_norm(k) if k_features is None else k_features

    local = local_attention(q, k, v, chunk_size=chunk_size, chunk_overlap=chunk_overlap, dropout_p=dropout_p)
    if chunks == 1:
        return local
    states = chunk_states(k_features, v, chunk_size, chunks - 1)
    retrieved = retrieve(r, h[:, :, : chunks - 1], states, top_k=top_k, dropout_p=dropout_p)
    return local + read(q_features, retrieved, chunk_size, gain)


def check_options(chunk_size: int, chunk_overlap: int, top_k: int | None) -> None:
    require_positive(chunk_size=chunk_size)
    if top_k is not None:
        require_positive(retrieval_top_k=top_k)
    if isinstance(chunk_overlap, bool) or not isinstance(chunk_overlap, int) or chunk_overlap < 0:
        raise ValueError(f"chunk_overlap must be an integer of at least 0, got {chunk_overlap!r}")


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    h: Tensor,
    q_features: Tensor | None,
    k_features: Tensor | None,
    gain: Tensor | None,
    *,
    chunk_size: int,
    retrievable: int,
) -> None:
    """Raises ValueError unless k and v have q's time and the rest its shape; q, k and v are checked heads.

    retrievable: how many meta keys h must hold at least.
    """
    time = q.shape[2]
    if k.shape[2] != time:
        raise ValueError(
            f"q and k must have the same time, got {time} and {k.shape[2]}; to continue a sequence use BSBRAttention.extend"
        )
    chunks = -(-time // chunk_size)
    if r.shape != (*q.shape[:2], chunks, q.shape[3]):
        raise ValueError(
            f"r must be [batch, heads, {chunks} chunks, head_dim] = {[*q.shape[:2], chunks, q.shape[3]]}, got {list(r.shape)}"
        )
    if h.dim() != 4 or h.shape[:2] != k.shape[:2] or h.shape[2] < retrievable or h.shape[3] != q.shape[3]:
        raise ValueError(
            f"h must be [batch, kv_heads, {retrievable} chunks or more, head_dim], got {list(h.shape)} beside k {list(k.shape)}"
        )
    features = q if q_features is None else q_features, k if k_features is None else k_features
    if features[0].shape[:-1] != q.shape[:-1] or features[1].shape != (*k.shape[:-1], features[0].shape[-1]):
        raise ValueError(
            "q_features and k_features must be those of q and k in all but their common last size, d_r: "
            f"got {list(features[0].shape)} and {list(features[1].shape)} beside q {list(q.shape)} and k {list(k.shape)}"
        )
    if gain is not None and gain.shape != q.shape[1:2]:
        raise ValueError(f"gain must be [heads = {q.shape[1]}], got {list(gain.shape)}")


# --- the module ---------------------------------------------------------------------------------


class _Options(TypedDict):
    chunk_size: int
    q_features: Tensor | None
    k_features: Tensor | None
    gain: Tensor
    chunk_overlap: int
    top_k: int | None


class BSBRAttention(MultiHeadAttention):
    """`bsbr_attention` between learned projections; causal, any length, streamable.

    r_t is projected from the hidden state of a chunk's first token, h_s from the mean of a chunk's hidden states.
    φ(x) = unit_norm(P x), P learned and shared by queries and keys where there is compression and absent
    otherwise; One learned gain per head sets how much retrieval weighs. Under rotary=True
    the local part is rotated; retrieval is by content and is not.

    chunk_size: B. compression_factor: d_r = head_dim / compression_factor, which must divide; None is 1.
    chunk_overlap: tokens before its chunk that a token also sees. retrieval_top_k: see `bsbr_attention`.
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
        num_kv_heads: int | None = None,
        rotary: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(hidden_dim, num_heads, num_kv_heads=num_kv_heads, rotary=rotary, dropout=dropout)
        check_options(chunk_size, chunk_overlap, retrieval_top_k)
        compression_factor = 1 if compression_factor is None else compression_factor
        require_positive(compression_factor=compression_factor)
        if self.head_dim % compression_factor:
            raise ValueError(
                f"compression_factor must divide head_dim = {self.head_dim} ({hidden_dim} / {num_heads}), got {compression_factor}"
            )
        self.chunk_size = chunk_size
        self.chunk_overlap = chunk_overlap
        self.retrieval_top_k = retrieval_top_k
        self.feature_dim = self.head_dim // compression_factor
        self.meta_q_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.meta_k_proj = nn.Linear(hidden_dim, self.num_kv_heads * self.head_dim, bias=False)
        self.feature_proj = nn.Identity() if compression_factor == 1 else nn.Linear(self.head_dim, self.feature_dim, bias=False)
        self.retrieval_gain = nn.Parameter(torch.ones(num_heads))

    @property
    def block_length(self) -> int:
        return self.chunk_size

    def project(self, hidden_states: Tensor, start: int = 0, *, followed: bool = False) -> tuple[Tensor, ...]:
        """q, k, v, r, h as `bsbr_attention` takes them, and φ(q), φ(k) unless they are `unit_norm` of q and k.

        `start` must be a chunk's beginning. followed: more tokens come after these, which can retrieve the last chunk too.
        """
        q, k, v, *features = self._project_tokens(hidden_states, start)
        retrievable = (hidden_states.shape[1] - (not followed)) // self.chunk_size
        pooled = hidden_states[:, : retrievable * self.chunk_size].unflatten(1, (retrievable, self.chunk_size)).mean(dim=2)
        return q, k, v, self._meta_query(hidden_states[:, :: self.chunk_size]), self._meta_key(pooled), *features

    def attend(self, *tensors: Tensor) -> Tensor:
        return bsbr_attention(*tensors[:5], **self._options(tensors), dropout_p=self.dropout_p)

    def reference(self, *tensors: Tensor) -> Tensor:
        """`attend` by `bsbr.reference.bsbr_attention`."""
        return reference.bsbr_attention(*tensors[:5], **self._options(tensors))

    def across(self, hidden_states: Tensor, ranks: Ranks) -> Tensor:
        """See `Attention.across` and `bsbr.parallel`."""
        from bsbr.parallel import bsbr_attention_parallel  # which is made of this file

        lengths = ranks.stretches(hidden_states.shape[1], hidden_states.device, self.chunk_size)
        check_hidden_states(hidden_states, self.hidden_dim)
        tensors = self.project(hidden_states, sum(lengths[: ranks.rank]), followed=ranks.rank < ranks.size - 1)
        options = self._options(tensors)
        return self.output(bsbr_attention_parallel(*tensors[:5], **options, group=ranks, lengths=lengths, dropout_p=self.dropout_p))

    def _options(self, tensors: tuple[Tensor, ...]) -> _Options:
        q_features, k_features = tensors[5:] or (None, None)
        return {
            "chunk_size": self.chunk_size,
            "q_features": q_features,
            "k_features": k_features,
            "gain": self.retrieval_gain,
            "chunk_overlap": self.chunk_overlap,
            "top_k": self.retrieval_top_k,
        }

    def _project_tokens(self, hidden_states: Tensor, start: int) -> tuple[Tensor, ...]:
        """q, k, v of tokens from position `start` on, and φ(q), φ(k) unless they are `unit_norm` of q and k."""
        q, k, v = self.project_heads(hidden_states)
        if self.feature_dim == self.head_dim and not self.rotary:
            return q, k, v
        features = unit_norm(self.feature_proj(q)), unit_norm(self.feature_proj(k))
        if self.rotary:
            q, k = rotate(q, start), rotate(k, start)
        return q, k, v, *features

    def _with_features(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        q, k, v, *features = tensors
        return q, k, v, *(features or (unit_norm(q), unit_norm(k)))

    def _meta_query(self, hidden_states: Tensor) -> Tensor:
        return split_heads(self.meta_q_proj(hidden_states), self.num_heads)

    def _meta_key(self, pooled: Tensor) -> Tensor:
        return split_heads(self.meta_k_proj(pooled), self.num_kv_heads)

    # --- streaming ---

    def extend(self, hidden_states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `Attention.extend`. A token costs O((chunk_size + d_r)·head_dim) a head, and each chunk's first one the mixing.

        The state: `keys` and `values` of the open chunk and of the overlap before it; `meta_keys` h and `states` F of
        all complete chunks; `retrieved`, the open chunk's F̄; and its sums so far, `open_state` and `open_hidden`.
        """
        check_hidden_states(hidden_states, self.hidden_dim)
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
            "meta_keys": new(batch, kv_heads, 0, self.head_dim),
            "states": new(batch, kv_heads, 0, self.feature_dim, self.head_dim),
            "retrieved": new(batch, heads, self.feature_dim, self.head_dim),
            "open_state": new(batch, kv_heads, self.feature_dim, self.head_dim, dtype=wide),
            "open_hidden": new(batch, self.hidden_dim, dtype=wide),
            "position": count(0),
        }

    def _open_chunks(self, hidden_states: Tensor, state: State, position: int) -> tuple[Tensor, State]:
        """Tokens that begin at a chunk's beginning: the parallel form, with the chunks before them in the retrieval."""
        tokens, size = hidden_states.shape[1], self.chunk_size
        q, k, v, q_features, k_features = self._with_features(self._project_tokens(hidden_states, position))
        keys, values = torch.cat([state["keys"], k], dim=2), torch.cat([state["values"], v], dim=2)
        complete = tokens // size
        pooled = hidden_states[:, : complete * size].unflatten(1, (complete, size)).mean(dim=2)
        meta_keys = torch.cat([state["meta_keys"], self._meta_key(pooled)], dim=2)
        states = torch.cat([state["states"], chunk_states(k_features, v, size, complete)], dim=2)
        retrieved = retrieve(
            self._meta_query(hidden_states[:, ::size]),
            meta_keys,
            states,
            first=position // size,
            top_k=self.retrieval_top_k,
            dropout_p=self.dropout_p,
        )
        attended = local_attention(
            q, keys, values, chunk_size=size, chunk_overlap=self.chunk_overlap, dropout_p=self.dropout_p
        ) + read(q_features, retrieved, size, self.retrieval_gain)
        rest = complete * size
        wide = state["open_hidden"].dtype
        after = self._keep(keys, values, position + tokens)
        after |= {
            "meta_keys": meta_keys,
            "states": states,
            "retrieved": retrieved[:, :, -1].clone(),  # a view would keep every chunk's alive
            "open_state": k_features[:, :, rest:].to(wide).mT @ v[:, :, rest:].to(wide),
            "open_hidden": hidden_states[:, rest:].to(wide).sum(dim=1),
        }
        return attended, after

    def _continue_chunk(self, hidden_states: Tensor, state: State, position: int) -> tuple[Tensor, State]:
        """Tokens that all fall into the open chunk, its last one perhaps included: no chunk but this one is touched."""
        q, k, v, q_features, k_features = self._with_features(self._project_tokens(hidden_states, position))
        keys, values = torch.cat([state["keys"], k], dim=2), torch.cat([state["values"], v], dim=2)
        tokens = q.shape[2]
        # Everything kept is visible: it is the open chunk and its overlap.
        visible = torch.ones(tokens, keys.shape[2], dtype=torch.bool, device=q.device).tril(keys.shape[2] - tokens)
        gained = self.retrieval_gain.view(-1, 1, 1) * state["retrieved"]
        attended = sdpa(q, keys, values, visible, self.dropout_p) + q_features @ gained
        wide = state["open_hidden"].dtype
        open_state = state["open_state"] + k_features.to(wide).mT @ v.to(wide)
        open_hidden = state["open_hidden"] + hidden_states.to(wide).sum(dim=1)
        meta_keys, states = state["meta_keys"], state["states"]
        if (position + tokens) % self.chunk_size == 0:
            pooled = (open_hidden / self.chunk_size).to(hidden_states.dtype).unsqueeze(1)
            meta_keys = torch.cat([meta_keys, self._meta_key(pooled)], dim=2)
            states = torch.cat([states, open_state.to(states.dtype).unsqueeze(2)], dim=2)
            open_state, open_hidden = torch.zeros_like(open_state), torch.zeros_like(open_hidden)
        after = self._keep(keys, values, position + tokens)
        after |= {
            "meta_keys": meta_keys,
            "states": states,
            "retrieved": state["retrieved"],
            "open_state": open_state,
            "open_hidden": open_hidden,
        }
        return attended, after

    def _keep(self, keys: Tensor, values: Tensor, position: int) -> State:
        """The keys and values that the next token may see: the open chunk and the overlap before it."""
        kept = self._kept(position)
        start = keys.shape[2] - kept
        if start:  # a view would keep the whole alive, and would not save
            keys, values = keys[:, :, start:].clone(), values[:, :, start:].clone()
        return {"keys": keys, "values": values, "position": count(position)}

    def _kept(self, position: int) -> int:
        opened = position % self.chunk_size
        return opened + min(self.chunk_overlap, position - opened)

    # --- cost ---

    def flops(self, seq_len: int, batch_size: int = 1) -> int:
        """4·d·H per visible pair, 2·d_r·d per token stored or read and per chunk mixed, 2·d per chunk scored."""
        size, overlap = self.chunk_size, self.chunk_overlap
        full, rest = divmod(seq_len, size)
        chunks = -(-seq_len // size)
        pairs = full * size * (size + 1) // 2 + rest * (rest + 1) // 2
        pairs += sum(min(overlap, start) * min(size, seq_len - start) for start in range(0, min(seq_len, overlap + size), size))
        whole_overlap_from = -(-min(seq_len, overlap + size) // size) * size
        pairs += overlap * max(0, seq_len - whole_overlap_from)
        scored = chunks * (chunks - 1) // 2
        mixed = scored
        if self.retrieval_top_k is not None:
            mixed = sum(min(chunk, self.retrieval_top_k) for chunk in range(chunks))
        state = self.feature_dim * self.head_dim
        stored = (chunks - 1) * size
        read_out = seq_len - min(seq_len, size)
        per_item = self.num_heads * (4 * self.head_dim * pairs + 2 * self.head_dim * scored + 2 * state * (mixed + read_out))
        return batch_size * (per_item + self.num_kv_heads * 2 * state * stored)

    def state_bytes(self, seq_len: int, batch_size: int = 1) -> int:
        state = self.feature_dim * self.head_dim
        cached = 2 * self.num_kv_heads * self._kept(seq_len) * self.head_dim
        remembered = seq_len // self.chunk_size * self.num_kv_heads * (self.head_dim + state) + self.num_heads * state
        sums = self.num_kv_heads * state + self.hidden_dim
        return batch_size * (self.dtype.itemsize * (cached + remembered) + max(4, self.dtype.itemsize) * sums)
