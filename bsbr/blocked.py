"""BSBR on a CPU, in blocks that stay in its cache, forward and backward.

Whole-tensor operations (`bsbr.plain`) send every intermediate through memory, which is several times slower than the
matrix products between them. Here a *room* of some thousand tokens, as many whole chunks of as many heads, is copied into
scratch memory that is used again for the next, goes through all products there, and only its result leaves. Inside a
chunk the rows of scores go in strips, so that most of what the causal mask would throw away is never computed.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bsbr.plain import retrieve

ROOM = 4096
"""Tokens of a room, over all its heads: scratch of a few MiB, and products long enough to pay for their calls."""

STRETCH = 64
"""Chunks that are stored, mixed and read together where no gradients are kept: what follows finds their keys in the cache."""

STRIP = 64
"""Rows of scores that are computed together. Shorter ones would skip more of the future, in products too small to be fast."""


def segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    h: Tensor,
    *,
    past: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ()),
    q_features: Tensor | None = None,
    k_features: Tensor | None = None,
    gain: Tensor | None = None,
    chunk_size: int,
    chunk_overlap: int = 0,
    top_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `bsbr.plain.segment`; without dropout, differentiable once."""
    time, chunks = q.shape[2], h.shape[2]
    before = k.shape[2] - time
    first = sum(page.shape[2] for page in past[0])
    stored, values = k[:, :, before:] if k_features is None else k_features, v[:, :, before:]
    normed = k_features is None
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, r, h, q_features, k_features, gain)):
        states: Tensor = _States.apply(stored, values, chunk_size, chunks, normed)  # type: ignore[no-untyped-call]
        retrieved = retrieve(r, [*past[0], h], [*past[1], states], first=first, top_k=top_k, gain=gain)
        out: Tensor = _Output.apply(q, k, v, q_features, retrieved, chunk_size, chunk_overlap)  # type: ignore[no-untyped-call]
        return out, states, retrieved[:, :, -1]

    # Stretch by stretch: what is stored is mixed, and what is retrieved is read, before the next one begins.
    rows = r.shape[2]
    states = v.new_empty(*v.shape[:2], chunks, stored.shape[3], v.shape[3])
    out = _like_hidden(q)
    for start in range(0, rows, STRETCH):
        stop = min(rows, start + STRETCH)
        known = min(stop, chunks)
        tokens = slice(start * chunk_size, min(time, stop * chunk_size))
        seen = slice(max(0, before + tokens.start - chunk_overlap), before + tokens.stop)
        _store(stored[:, :, tokens], values[:, :, tokens], states[:, :, start:known], chunk_size, normed)
        retrieved = retrieve(
            r[:, :, start:stop], [*past[0], h[:, :, :known]], [*past[1], states], first=first + start, top_k=top_k, gain=gain
        )
        features = None if q_features is None else q_features[:, :, tokens]
        _attend(q[:, :, tokens], k[:, :, seen], v[:, :, seen], features, retrieved, out[:, :, tokens], chunk_size, chunk_overlap)
    return out, states, retrieved[:, :, -1]


class _States(torch.autograd.Function):
    """F_s = φ(K_s)ᵀ V_s of the first `chunks` chunks: [batch, kv_heads, chunks, d_r, head_dim]; φ is `unit_norm` if `normed`."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, v: Tensor, chunk_size: int, chunks: int, normed: bool) -> Tensor:
        ctx.save_for_backward(keys, v)
        ctx.options = chunk_size, normed
        states = v.new_empty(*v.shape[:2], chunks, keys.shape[3], v.shape[3])
        _store(keys, v, states, chunk_size, normed)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_states: Tensor) -> tuple[Tensor | None, ...]:
        keys, v = ctx.saved_tensors
        d_keys, d_v = _like_hidden(keys), _like_hidden(v)
        _store_backward(keys, v, d_states, d_keys, d_v, *ctx.options)
        return d_keys, d_v, None, None, None


class _Output(torch.autograd.Function):
    """softmax(QKᵀ/√d ⊙ M_in) V + φ(Q) F̄, φ(Q) = `unit_norm` of Q where no features are given; k and v may begin earlier than q."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, features: Tensor | None, retrieved: Tensor, chunk_size: int, chunk_overlap: int
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, features, retrieved)
        ctx.options = chunk_size, chunk_overlap
        out = _like_hidden(q)
        _attend(q, k, v, features, retrieved, out, chunk_size, chunk_overlap)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, features, retrieved = ctx.saved_tensors
        d_q, d_k, d_v = (_like_hidden(x) for x in (q, k, v))
        d_features = None if features is None else _like_hidden(features)
        d_retrieved = torch.empty_like(retrieved)
        _attend_backward(d_out, q, k, v, features, retrieved, d_q, d_k, d_v, d_features, d_retrieved, *ctx.options)
        return d_q, d_k, d_v, d_features, d_retrieved, None, None


# --- storing ------------------------------------------------------------------------------------


def _store(keys: Tensor, v: Tensor, states: Tensor, chunk_size: int, normed: bool) -> None:
    """Writes F_s of as many chunks as `states` [batch, kv_heads, chunks, d_r, head_dim] has."""
    batch, kv_heads, chunks, features, head_dim = states.shape
    if not chunks:
        return
    key_chunks, value_chunks = (_windows(x, chunks, chunk_size, chunk_size) for x in (keys, v))
    scratch = _Scratch(v)
    for room in _rooms(batch, kv_heads, 1, chunks, ROOM // chunk_size):
        key, value = scratch.copy("k", key_chunks[room]), scratch.copy("v", value_chunks[room])
        if normed:
            key *= _inverse_norm(key)
        state = torch.bmm(key.mT, value, out=scratch.take("s", len(key), features, head_dim))
        states[room] = state.view(states[room].shape)


def _store_backward(keys: Tensor, v: Tensor, d_states: Tensor, d_keys: Tensor, d_v: Tensor, chunk_size: int, normed: bool) -> None:
    """Writes the gradients by all of `keys` and `v`: zero behind the last stored chunk."""
    batch, kv_heads, chunks = d_states.shape[:3]
    for x in (d_keys, d_v):
        x[:, :, chunks * chunk_size :] = 0
    if not chunks:
        return
    key_chunks, value_chunks, d_key_chunks, d_value_chunks = (
        _windows(x, chunks, chunk_size, chunk_size) for x in (keys, v, d_keys, d_v)
    )
    scratch = _Scratch(v)
    for room in _rooms(batch, kv_heads, 1, chunks, ROOM // chunk_size):
        key, value = scratch.copy("k", key_chunks[room]), scratch.copy("v", value_chunks[room])
        d_state = d_states[room].flatten(0, 2)
        d_key, d_value = scratch.take("dk", *key.shape), scratch.take("dv", *value.shape)
        inverse = _inverse_norm(key) if normed else None
        if inverse is not None:
            key *= inverse
        torch.bmm(key, d_state, out=d_value)
        torch.bmm(value, d_state.mT, out=d_key)
        if inverse is not None:
            _unit_norm_backward(d_key, key, inverse)
        d_key_chunks[room] = d_key.view(d_key_chunks[room].shape)
        d_value_chunks[room] = d_value.view(d_value_chunks[room].shape)


# --- attending ----------------------------------------------------------------------------------


class _Span(NamedTuple):
    """`chunks` chunks of `length` tokens, the first from token `start` on, which all see `before` tokens in front of them."""

    start: int
    chunks: int
    length: int
    before: int


def _spans(time: int, before: int, chunk_size: int, chunk_overlap: int) -> Iterator[_Span]:
    """The chunks of `time` tokens behind `before` others: those whose view back is cut off, those in full, an incomplete last."""
    full = time // chunk_size
    cut_off = min(full, -(-max(0, chunk_overlap - before) // chunk_size))
    for chunk in range(cut_off):
        yield _Span(chunk * chunk_size, 1, chunk_size, before + chunk * chunk_size)
    if full > cut_off:
        yield _Span(cut_off * chunk_size, full - cut_off, chunk_size, chunk_overlap)
    if rest := time % chunk_size:
        yield _Span(time - rest, 1, rest, min(chunk_overlap, before + time - rest))


def _strips(span: _Span) -> Iterator[tuple[slice, slice]]:
    """Rows of a chunk, and the keys that these rows see or, in the square that ends the slice, see in part."""
    height = -(-span.length // max(1, round(span.length / STRIP)))
    for start in range(0, span.length, height):
        stop = min(span.length, start + height)
        yield slice(start, stop), slice(0, span.before + stop)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, features: Tensor | None, retrieved: Tensor, out: Tensor, chunk_size: int, chunk_overlap: int
) -> None:
    """Writes `out` [batch, heads, time, head_dim]."""
    scratch, scale = _Scratch(q), 1 / math.sqrt(q.shape[3])
    for span in _spans(q.shape[2], k.shape[2] - q.shape[2], chunk_size, chunk_overlap):
        queries, keys, values, reads, states, outs = _of_span(span, chunk_size, q, k, v, features, retrieved, out)
        most = _most(q, span)
        for room in _rooms_of(queries, span):
            query, key, value = (scratch.copy(*named) for named in (("q", queries[room]), ("k", keys[room]), ("v", values[room])))
            if features is None:
                read = torch.mul(query, _inverse_norm(query), out=scratch.take("f", *query.shape))
            else:
                read = scratch.copy("f", reads[room])
            state, target = states[room].flatten(0, 3), outs[room]
            for rows, seen in _strips(span):
                weights = _weights(scratch, query[:, rows], key[:, seen], most, scale)
                result = scratch.take("o", *query[:, rows].shape)
                _product(read[:, rows], state, out=result)
                _product(weights, value[:, seen], out=result, beta=1)
                part = target[..., rows, :]
                part.copy_(result.view(part.shape))


def _attend_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Tensor | None,
    retrieved: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_features: Tensor | None,
    d_retrieved: Tensor,
    chunk_size: int,
    chunk_overlap: int,
) -> None:
    """Writes all that is called d_, from weights that are computed again."""
    scratch, scale = _Scratch(q), 1 / math.sqrt(q.shape[3])
    before = k.shape[2] - q.shape[2]
    shared = chunk_overlap > 0  # by several chunks: then their gradients are added up
    if shared:
        d_k.zero_()
        d_v.zero_()
    for span in _spans(q.shape[2], before, chunk_size, chunk_overlap):
        queries, keys, values, reads, states, d_outs = _of_span(span, chunk_size, q, k, v, features, retrieved, d_out)
        d_queries, d_keys, d_values, d_reads, d_states, _ = _of_span(
            span, chunk_size, d_q, d_k, d_v, d_features, d_retrieved, d_out
        )
        most = _most(q, span)
        for room in _rooms_of(queries, span):
            query, key, value = (scratch.copy(*named) for named in (("q", queries[room]), ("k", keys[room]), ("v", values[room])))
            d_result = scratch.copy("o", d_outs[room])
            d_query, d_key, d_value = (
                scratch.take(name, *like.shape) for name, like in (("dq", query), ("dk", key), ("dv", value))
            )
            state = states[room].flatten(0, 3)

            # φ(Q) F̄
            if features is None:
                inverse = _inverse_norm(query)
                read = torch.mul(query, inverse, out=scratch.take("f", *query.shape))
                torch.bmm(d_result, state.mT, out=d_query)
                _unit_norm_backward(d_query, read, inverse)
            else:
                read = scratch.copy("f", reads[room])
                d_query.zero_()
                d_reads[room] = torch.bmm(d_result, state.mT).view(d_reads[room].shape)
            d_states[room] = torch.bmm(read.mT, d_result).view(d_states[room].shape)

            # softmax(QKᵀ/√d) V; the last strip sees all keys, so it comes first and writes where the others add.
            for rows, seen in reversed(list(_strips(span))):
                weights = _weights(scratch, query[:, rows], key[:, seen], most, scale)
                d_rows = d_result[:, rows]
                d_weights = _product(d_rows, value[:, seen].mT, out=scratch.take("dw", *weights.shape))
                own = scratch.take("own", *d_rows.shape)
                by_key, by_value = d_key, d_value
                if rows.stop < span.length:
                    by_key, by_value = (scratch.take(name, *key[:, seen].shape) for name in ("by key", "by value"))
                _product(weights.mT, d_rows, out=by_value)
                torch._softmax_backward_data(d_weights, weights, -1, weights.dtype, grad_input=d_weights)
                _product(d_weights.mT, query[:, rows], out=by_key, alpha=scale)
                d_query[:, rows] += _product(d_weights, key[:, seen], out=own, alpha=scale)
                if rows.stop < span.length:
                    d_key[:, seen] += by_key
                    d_value[:, seen] += by_value
            d_queries[room] = d_query.view(d_queries[room].shape)
            for x, total in ((d_key, d_keys), (d_value, d_values)):
                grouped = x.view(*queries[room].shape[:-2], *x.shape[1:])
                _add_windows(grouped, total, room, add=shared, apart=-(-x.shape[1] // chunk_size))


def _weights(scratch: "_Scratch", query: Tensor, key: Tensor, most: Tensor, scale: float) -> Tensor:
    """softmax(scale · query keyᵀ) where the last keys are those of the queries' own positions."""
    size = query.shape[1]
    weights = _product(query, key.mT, out=scratch.take("w", len(query), size, key.shape[1]), alpha=scale)
    corner = weights[:, :, -size:]
    torch.minimum(corner, most[:size, :size], out=corner)  # five times as fast as masked_fill
    return torch.softmax(weights, dim=-1, out=weights)


def _most(like: Tensor, span: _Span) -> Tensor:
    """The most that a score may be in the square that ends a strip: -inf where its row must not see, no bound elsewhere."""
    size = next(rows.stop for rows, _ in _strips(span))
    unseen = torch.ones(size, size, dtype=torch.bool, device=like.device).triu(1)
    return like.new_full((size, size), torch.inf).masked_fill(unseen, -torch.inf)


def _add_windows(x: Tensor, windows: Tensor, room: tuple[slice, ...], *, add: bool, apart: int) -> None:
    """Writes x [items, kv_heads, group, chunks, length, dim], summed over the group, to the room's windows, or adds it there.

    Windows overlap where chunks do. Every `apart`-th do not, and are added at once.
    """
    x = x.sum(dim=2) if x.shape[2] > 1 else x[:, :, 0]
    target = windows[room][:, :, 0]
    if not add:
        target.copy_(x)
        return
    for start in range(min(apart, x.shape[2])):
        target[:, :, start::apart] += x[:, :, start::apart]


# --- rooms --------------------------------------------------------------------------------------

Room = tuple[slice, ...]


def _rooms(batch: int, kv_heads: int, group: int, chunks: int, most: int) -> Iterator[Room]:
    """Cuts batch × kv_heads × chunks into boxes of at most `most` chunks of query heads: (items, key-value heads, chunks).

    Heads first: they lie side by side in memory, and a box of all of them is read in one go, page by page. One head
    alone would touch as many pages for an eighth of what is in them, and take three times as long to copy.
    """
    wide = max(1, min(kv_heads, most // group))
    long = max(1, min(chunks, most // (group * wide)))
    deep = max(1, min(batch, most // (group * wide * long)))
    for item in range(0, batch, deep):
        for chunk in range(0, chunks, long):
            for head in range(0, kv_heads, wide):
                yield (
                    slice(item, min(batch, item + deep)),
                    slice(head, min(kv_heads, head + wide)),
                    slice(chunk, min(chunks, chunk + long)),
                )


def _of_span(
    span: _Span, chunk_size: int, q: Tensor, k: Tensor, v: Tensor, features: Tensor | None, states: Tensor, out: Tensor
) -> tuple[Tensor, ...]:
    """Views of a span's part of each, [batch, kv_heads, group, chunks, ...]; keys and values stand for every head of a group."""
    kv_heads = k.shape[1]
    group = q.shape[1] // kv_heads
    first = k.shape[2] - q.shape[2] + span.start - span.before

    def own(x: Tensor) -> Tensor:
        windows = _windows(x[:, :, span.start :], span.chunks, chunk_size, span.length)
        return cast(Tensor, windows.unflatten(1, (kv_heads, group)))

    def seen(x: Tensor) -> Tensor:
        windows = _windows(x[:, :, first:], span.chunks, chunk_size, span.before + span.length)
        return windows.unsqueeze(2).expand(-1, -1, group, -1, -1, -1)

    chunk = span.start // chunk_size
    return (
        own(q),
        seen(k),
        seen(v),
        own(q if features is None else features),
        states[:, :, chunk : chunk + span.chunks].unflatten(1, (kv_heads, group)),
        own(out),
    )


def _rooms_of(queries: Tensor, span: _Span) -> Iterator[Room]:
    batch, kv_heads, group, chunks = queries.shape[:4]
    for items, kvs, own in _rooms(batch, kv_heads, group, chunks, ROOM // span.length):
        yield items, kvs, slice(None), own


def _windows(x: Tensor, count: int, step: int, length: int) -> Tensor:
    """[batch, heads, time, dim] -> [batch, heads, count, length, dim], a window every `step` tokens: a view."""
    return x[:, :, : (count - 1) * step + length].unfold(2, length, step).transpose(3, 4)


class _Scratch:
    """Memory that is used again: what is taken under a name is what was taken under it before, overwritten."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self._held or self._held[name].numel() < size:
            self._held[name] = self._like.new_empty(size)
        return self._held[name][:size].view(shape)

    def copy(self, name: str, x: Tensor) -> Tensor:
        """A copy of x [..., length, dim] as [all that stands in front, length, dim]."""
        copy = self.take(name, *x.shape).copy_(x)
        return copy.view(-1, *x.shape[-2:])


def _product(left: Tensor, right: Tensor, *, out: Tensor, alpha: float = 1, beta: float = 0) -> Tensor:
    """out ← beta · out + alpha · left @ right. `out` is contiguous: a slice would be one call of the BLAS for every matrix."""
    return torch.baddbmm(out, left, right, beta=beta, alpha=alpha, out=out)


def _inverse_norm(x: Tensor) -> Tensor:
    """What `unit_norm` multiplies each row with."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().add_(1e-6).rsqrt_()


def _unit_norm_backward(gradient: Tensor, normed: Tensor, inverse: Tensor) -> None:
    """Turns the gradient by y = x · inverse(x) into that by x, in place: (g − y (y·g)) · inverse."""
    along = torch.linalg.vecdot(gradient, normed).unsqueeze(-1)
    gradient.addcmul_(normed, along, value=-1).mul_(inverse)


def _like_hidden(x: Tensor) -> Tensor:
    """Room for [batch, heads, time, dim], laid out as [batch, time, heads · dim]: joined heads are then no copy."""
    batch, heads, time, dim = x.shape
    return x.new_empty(batch, time, heads, dim).transpose(1, 2)
