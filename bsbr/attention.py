"""Block Sparse attention with Block Retrieval: softmax inside a chunk, retrieval of compressed states between chunks.

`bsbr_attention` is the attention alone, `BSBRAttention` the module around it. `bsbr.reference` holds the
same function as the definition reads; the two share no code.
"""

import math
from typing import TypedDict

import torch
import torch.nn.functional as F
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
    chunk_overlap: int = 0,
    top_k: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """O = softmax(QKᵀ/√d ⊙ M_in) V + φ(Q) F̄,  F̄_t = Σ_s softmax_s(r_t·h_s/√d ⊙ M_out) F_s,  F_s = φ(K_s)ᵀ V_s.

    Time is cut into C = ⌈time / chunk_size⌉ chunks, the last of any length. M_in: causal inside a chunk, and
    each token also sees the `chunk_overlap` tokens before its chunk. M_out: strictly lower triangular over
    chunks, so the first chunk retrieves nothing.

    q: [batch, heads, time, head_dim]; k, v: [batch, kv_heads, time, head_dim], kv_heads a divisor of heads.
    r: [batch, heads, C, head_dim], the meta query of each chunk, which must be known at its first token.
    h: [batch, kv_heads, C - 1 or more, head_dim], the meta key of each chunk that a later one can retrieve.
    q_features, k_features: φ(q), φ(k) [batch, heads or kv_heads, time, d_r]; by default `unit_norm` of q and k.
    top_k keeps only the top_k best-scored chunks in each retrieval, the earliest of equals. dropout_p acts on the weights
    of both softmaxes.

    Returns [batch, heads, time, head_dim]. Cost per head: local O(n·chunk_size·d), states and read-out O(n·d_r·d),
    mixing O(C²·d_r·d), or O(C·top_k·d_r·d) with top_k; memory linear in n but for the C² retrieval weights.
    Raises ValueError if shapes do not fit or chunk_size or top_k is below 1 or chunk_overlap below 0.
    """
    check_heads(q, k, v)
    _check_options(chunk_size, chunk_overlap, top_k)
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
    if h.dim() != 4 or h.shape[:2] != k.shape[:2] or h.shape[2] < chunks - 1 or h.shape[3] != q.shape[3]:
        raise ValueError(
            f"h must be [batch, kv_heads, {chunks - 1} chunks or more, head_dim], got {list(h.shape)} beside k {list(k.shape)}"
        )
    q_features = unit_norm(q) if q_features is None else q_features
    k_features = unit_norm(k) if k_features is None else k_features
    if q_features.shape[:-1] != q.shape[:-1] or k_features.shape != (*k.shape[:-1], q_features.shape[-1]):
        raise ValueError(
            "q_features and k_features must be those of q and k in all but their common last size, d_r: "
            f"got {list(q_features.shape)} and {list(k_features.shape)} beside q {list(q.shape)} and k {list(k.shape)}"
        )

    local = local_attention(q, k, v, chunk_size=chunk_size, chunk_overlap=chunk_overlap, dropout_p=dropout_p)
    if chunks == 1:
        return local
    states = chunk_states(k_features, v, chunk_size, chunks - 1)
    retrieved = retrieve(r, h[:, :, : chunks - 1], states, top_k=top_k, dropout_p=dropout_p)
    return local + read(q_features, retrieved, chunk_size)


# --- the four steps -----------------------------------------------------------------------------


def local_attention(q: Tensor, k: Tensor, v: Tensor, *, chunk_size: int, chunk_overlap: int = 0, dropout_p: float = 0.0) -> Tensor:
    """softmax(QKᵀ/√d ⊙ M_in) V, M_in: a token sees its chunk up to itself and the `chunk_overlap` tokens before its chunk.

    q: [batch, heads, time, head_dim], its first row at a chunk's beginning; k and v may hold up to
    `chunk_overlap` earlier tokens in front. Returns the shape of q.
    """
    time = q.shape[2]
    before = k.shape[2] - time
    # Three kinds of chunk: those whose view back is cut off by the beginning of the sequence, those in full,
    # and an incomplete last one. Only the middle kind grows with the sequence, and it is one batched call.
    lead = min(time // chunk_size, -(-max(0, chunk_overlap - before) // chunk_size)) * chunk_size
    full = (time - lead) // chunk_size * chunk_size
    pieces: list[Tensor] = []
    for start, stop in ((0, lead), (lead + full, time)):
        if start < stop:
            first_key = max(0, before + start - chunk_overlap)
            visible = None
            if chunk_overlap:
                visible = _visible(
                    torch.arange(start, stop, device=q.device),
                    torch.arange(first_key - before, stop, device=q.device),
                    chunk_size,
                    chunk_overlap,
                )
            keys = slice(first_key, before + stop)
            pieces.append(_sdpa(q[:, :, start:stop], k[:, :, keys], v[:, :, keys], visible, dropout_p))
    if full:
        chunks = full // chunk_size
        window = slice(before + lead - chunk_overlap, before + lead + full)
        visible = None
        if chunk_overlap:
            own = torch.arange(chunk_size, device=q.device)
            visible = _visible(own, torch.arange(-chunk_overlap, chunk_size, device=q.device), chunk_size, chunk_overlap)
        attended = _sdpa(
            _windows(q[:, :, lead : lead + full], chunk_size, chunk_size),
            _windows(k[:, :, window], chunk_size, chunk_size + chunk_overlap),
            _windows(v[:, :, window], chunk_size, chunk_size + chunk_overlap),
            visible,
            dropout_p,
        )
        # The kernel writes [chunk, time, head, dim], so this is a view of [batch, time, heads, dim].
        attended = attended.unflatten(0, (-1, chunks)).transpose(1, 2).flatten(2, 3)
        pieces.insert(1 if lead else 0, attended)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def chunk_states(k_features: Tensor, v: Tensor, chunk_size: int, chunks: int) -> Tensor:
    """F_s = φ(K_s)ᵀ V_s for the first `chunks` chunks: [batch, kv_heads, chunks, d_r, head_dim]."""
    tokens = chunks * chunk_size
    keys: Tensor = k_features[:, :, :tokens].unflatten(2, (chunks, chunk_size))
    values: Tensor = v[:, :, :tokens].unflatten(2, (chunks, chunk_size))
    return keys.mT @ values


def retrieve(r: Tensor, h: Tensor, states: Tensor, *, first: int = 0, top_k: int | None = None, dropout_p: float = 0.0) -> Tensor:
    """F̄_t = Σ_s softmax_s(r_t·h_s/√d ⊙ M_out) F_s: [batch, heads, rows, d_r, head_dim].

    r: [batch, heads, rows, head_dim], row i the meta query of chunk `first` + i, which sees the chunks before it.
    h: [batch, kv_heads, chunks, head_dim] and states: [batch, kv_heads, chunks, d_r, head_dim], from chunk 0 on.
    A chunk that sees none retrieves zero.
    """
    batch, heads, rows, head_dim = r.shape
    kv_heads, chunks = h.shape[1:3]
    if chunks == 0:
        return states.new_zeros(batch, heads, rows, *states.shape[3:])
    # Query heads of one group stand side by side as rows against the states that they share.
    # Scores in float32: rounded to bfloat16, they would tie, and top_k would keep other chunks than the best.
    wide = torch.promote_types(r.dtype, torch.float32)
    grouped = r.reshape(batch, kv_heads, heads // kv_heads, rows, head_dim).to(wide)
    scores = grouped @ h.unsqueeze(2).mT.to(wide) / math.sqrt(head_dim)
    visible = torch.ones(rows, chunks, dtype=torch.bool, device=r.device).tril(first - 1)
    # Not -inf: a chunk that sees nothing would be 0/0, and its gradient too.
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    if top_k is None or top_k >= chunks:
        weights = torch.softmax(scores, dim=-1).where(visible, 0).to(states.dtype)
        weights = F.dropout(weights, dropout_p)
        mixed = weights.flatten(2, 3) @ states.flatten(3)
    else:
        # Not topk: which of equal scores it takes depends on how many columns there are, that is, on the future.
        ranked, order = scores.sort(dim=-1, descending=True, stable=True)
        kept, chosen = ranked[..., :top_k], order[..., :top_k]
        weights = torch.softmax(kept, dim=-1).where(visible.expand_as(scores).gather(-1, chosen), 0)
        weights = F.dropout(weights.to(states.dtype), dropout_p)
        # embedding_bag is a weighted sum of gathered rows that never holds the gathered rows.
        owner = torch.arange(batch * kv_heads, device=r.device).view(batch, kv_heads, 1, 1, 1) * chunks
        mixed = F.embedding_bag(
            (chosen + owner).flatten(0, -2),
            states.reshape(batch * kv_heads * chunks, -1),
            per_sample_weights=weights.flatten(0, -2),
            mode="sum",
        )
    return mixed.view(batch, heads, rows, *states.shape[3:])


def read(q_features: Tensor, retrieved: Tensor, chunk_size: int) -> Tensor:
    """φ(q_i)ᵀ F̄_t for every token i of chunk t: [batch, heads, time, head_dim]."""
    full, rest = divmod(q_features.shape[2], chunk_size)
    pieces = []
    if full:
        chunked = q_features[:, :, : full * chunk_size].unflatten(2, (full, chunk_size))
        pieces.append((chunked @ retrieved[:, :, :full]).flatten(2, 3))
    if rest:
        pieces.append(q_features[:, :, full * chunk_size :] @ retrieved[:, :, full])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def unit_norm(x: Tensor) -> Tensor:
    """φ's normalisation, x / sqrt(|x|² + 1e-6): a key asked for exactly returns its value at its own size.

    Unit length bounds a retrieved term by the sum of |v| over a chunk whatever the inputs, which the plain
    product does not, and leaves how much retrieval weighs to one gain per head. 1e-6 keeps zero inputs finite.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)


def _visible(queries: Tensor, keys: Tensor, chunk_size: int, chunk_overlap: int) -> Tensor:
    """M_in as booleans [queries, keys], for positions counted from any chunk's beginning."""
    earliest = queries // chunk_size * chunk_size - chunk_overlap
    return (keys >= earliest[:, None]) & (keys <= queries[:, None])


def _windows(x: Tensor, step: int, length: int) -> Tensor:
    """[batch, heads, time, dim] -> [batch * windows, heads, length, dim], one window every `step` tokens, a view where possible."""
    return x.unfold(2, length, step).permute(0, 2, 1, 4, 3).flatten(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, dropout_p: float) -> Tensor:
    """softmax(qkᵀ/√d) v over what is visible; causal of equal lengths where `visible` is None."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=visible is None, dropout_p=dropout_p, enable_gqa=q.shape[1] != k.shape[1]
    )


def _check_options(chunk_size: int, chunk_overlap: int, top_k: int | None) -> None:
    require_positive(chunk_size=chunk_size)
    if top_k is not None:
        require_positive(retrieval_top_k=top_k)
    if isinstance(chunk_overlap, bool) or not isinstance(chunk_overlap, int) or chunk_overlap < 0:
        raise ValueError(f"chunk_overlap must be an integer of at least 0, got {chunk_overlap!r}")


# --- the module ---------------------------------------------------------------------------------


class _Options(TypedDict):
    chunk_size: int
    chunk_overlap: int
    top_k: int | None


class BSBRAttention(MultiHeadAttention):
    """`bsbr_attention` between learned projections; causal, any length, streamable.

    r_t is projected from the hidden state of a chunk's first token, h_s from the mean of a chunk's hidden states.
    φ(x) = unit_norm(P x), P learned and shared by queries and keys where there is compression and absent
    otherwise; φ(q) carries one learned gain per head, which sets how much retrieval weighs. Under rotary=True
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
        _check_options(chunk_size, chunk_overlap, retrieval_top_k)
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

    def project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        """q, k, v, r, h, φ(q), φ(k), as `bsbr_attention` takes them; `start` must be a chunk's beginning."""
        q, k, v, q_features, k_features = self._project_tokens(hidden_states, start)
        retrievable = (hidden_states.shape[1] - 1) // self.chunk_size
        pooled = hidden_states[:, : retrievable * self.chunk_size].unflatten(1, (retrievable, self.chunk_size)).mean(dim=2)
        return q, k, v, self._meta_query(hidden_states[:, :: self.chunk_size]), self._meta_key(pooled), q_features, k_features

    def attend(self, *tensors: Tensor) -> Tensor:
        q, k, v, r, h, q_features, k_features = tensors
        return bsbr_attention(
            q, k, v, r, h, q_features=q_features, k_features=k_features, **self._options, dropout_p=self.dropout_p
        )

    def reference(self, *tensors: Tensor) -> Tensor:
        """`attend` by `bsbr.reference.bsbr_attention`."""
        q, k, v, r, h, q_features, k_features = tensors
        return reference.bsbr_attention(q, k, v, r, h, q_features=q_features, k_features=k_features, **self._options)

    @property
    def _options(self) -> _Options:
        return {"chunk_size": self.chunk_size, "chunk_overlap": self.chunk_overlap, "top_k": self.retrieval_top_k}

    def _project_tokens(self, hidden_states: Tensor, start: int) -> tuple[Tensor, ...]:
        q, k, v = self.project_heads(hidden_states)
        q_features = unit_norm(self.feature_proj(q)) * self.retrieval_gain[:, None, None]
        k_features = unit_norm(self.feature_proj(k))
        if self.rotary:
            q, k = rotate(q, start), rotate(k, start)
        return q, k, v, q_features, k_features

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
        q, k, v, q_features, k_features = self._project_tokens(hidden_states, position)
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
        ) + read(q_features, retrieved, size)
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
        q, k, v, q_features, k_features = self._project_tokens(hidden_states, position)
        keys, values = torch.cat([state["keys"], k], dim=2), torch.cat([state["values"], v], dim=2)
        tokens = q.shape[2]
        # Everything kept is visible: it is the open chunk and its overlap.
        visible = torch.ones(tokens, keys.shape[2], dtype=torch.bool, device=q.device).tril(keys.shape[2] - tokens)
        attended = _sdpa(q, keys, values, visible, self.dropout_p) + q_features @ state["retrieved"]
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
