"""BSBR on a CPU, in C++: a chunk of a head at a time, in the cache of one core, forward and backward.

Whole-tensor operations (`bsbr.backends.pytorch`) send every intermediate through memory, which is slower than the products between
them. `native.cpp` fuses what a chunk needs: its scores, softmax, values and what it retrieves, or all their gradients.
It is compiled on first use, for the machine at hand, by the compiler that torch.compile uses too (some seconds, kept for the
next time); between the chunks, retrieval itself is `bsbr.backends.pytorch.retrieve`.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bsbr.backends import pytorch
from bsbr.backends.cpp.build import TYPES, library
from bsbr.backends.pytorch import retrieve, unit_norm

STRETCH = 64
"""Chunks that are stored, mixed and read together where no gradients are kept: fewer would read all earlier states more often,
more would find less of what was stored in the cache."""

FEW = 24
"""Fewer rows than these are mixed by the BLAS, as when decoding: packing their states takes longer than what it saves."""


def unsupported(*tensors: Tensor, dropout_p: float = 0.0) -> str | None:
    """Why these tensors cannot be taken, or None."""
    types = {x.dtype for x in tensors}
    if any(x.device.type != "cpu" for x in tensors):
        return f"native code is for a CPU, got tensors on {tensors[0].device}"
    if len(types) > 1 or not types <= TYPES.keys():
        return f"native code takes float32 or float64, got {', '.join(sorted(map(str, types)))}"
    if dropout_p:
        return "native code has no dropout"
    built = _kernels()
    return built if isinstance(built, str) else None


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
    beta: Tensor | None = None,
    gain: Tensor | None = None,
    chunk_size: int,
    chunk_overlap: int = 0,
    top_k: int | None = None,
    normalise: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `bsbr.backends.pytorch.segment`; without dropout, differentiable once."""
    time, chunks = q.shape[2], h.shape[2]
    before = k.shape[2] - time
    first = sum(page.shape[2] for page in past[0])
    if beta is not None and k_features is None:
        k_features = unit_norm(k[:, :, before:])
    stored, values = k[:, :, before:] if k_features is None else k_features, v[:, :, before:]
    normed = k_features is None
    inputs = (q, k, v, r, h, q_features, k_features, beta, gain)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        if beta is not None:
            values = _Corrected.apply(stored, values, beta, chunk_size, chunks)  # type: ignore[no-untyped-call]
        states: Tensor = _States.apply(stored, values, chunk_size, chunks, normed)  # type: ignore[no-untyped-call]
        pieces = [*past[0], h], [*past[1], states]
        retrieved = retrieve(r, *pieces, first=first, top_k=top_k, gain=gain, normalise=normalise, choose=_choose)
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
        complete = slice(tokens.start, known * chunk_size)
        new = stored[:, :, complete], values[:, :, complete]
        if beta is not None:
            new = new[0], _corrected(*new, beta[:, :, complete], chunk_size)
        torch.ops.bsbr.store(*new, states[:, :, start:known], chunk_size, normed)
        retrieved = retrieve(
            r[:, :, start:stop],
            [*past[0], h[:, :, :known]],
            [*past[1], states],
            first=first + start,
            top_k=top_k,
            gain=gain,
            normalise=normalise,
            choose=_choose,
            mix=_mix,
        )
        features = None if q_features is None else q_features[:, :, tokens]
        part = q[:, :, tokens], k[:, :, seen], v[:, :, seen], features, retrieved, out[:, :, tokens]
        torch.ops.bsbr.attend(*part, chunk_size, chunk_overlap)
    return out, states, retrieved[:, :, -1]


def _choose(scores: Tensor, top_k: int, first: int) -> Tensor:
    """`bsbr.backends.pytorch.choose`, in one pass over the chunks that a row sees."""
    chosen = torch.empty(*scores.shape[:3], top_k, dtype=torch.int64)
    torch.ops.bsbr.choose(scores, chosen, first)
    return chosen


def _mix(weights: Tensor, sizes: Sequence[int], states: Sequence[Tensor], first: int) -> Tensor:
    """`bsbr.backends.pytorch.mix`, of the chunks alone that a row sees."""
    if weights.shape[2] < FEW:
        return pytorch.mix_states(weights, sizes, states, first)
    mixed = weights.new_empty(*weights.shape[:3], states[0].shape[3])
    start = 0
    for part, chunks, page in zip(weights.split(sizes, dim=-1), sizes, states, strict=True):
        torch.ops.bsbr.mix(part, page[:, :, :chunks], mixed, first - start, start > 0)
        start += chunks
    return mixed


class _States(torch.autograd.Function):
    """F_s = φ(K_s)ᵀ V_s of the first `chunks` chunks: [batch, kv_heads, chunks, d_r, head_dim]; φ is `unit_norm` if `normed`."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, v: Tensor, chunk_size: int, chunks: int, normed: bool) -> Tensor:
        ctx.save_for_backward(keys, v)
        ctx.options = chunk_size, normed
        states = v.new_empty(*v.shape[:2], chunks, keys.shape[3], v.shape[3])
        torch.ops.bsbr.store(keys, v, states, chunk_size, normed)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_states: Tensor) -> tuple[Tensor | None, ...]:
        keys, v = ctx.saved_tensors
        chunk_size, normed = ctx.options
        d_keys, d_v = _like_hidden(keys), _like_hidden(v)
        for x in (d_keys, d_v):
            x[:, :, d_states.shape[2] * chunk_size :] = 0  # of chunks that are not stored
        torch.ops.bsbr.store_backward(keys, v, d_states.contiguous(), d_keys, d_v, chunk_size, normed)
        return d_keys, d_v, None, None, None


def _corrected(keys: Tensor, v: Tensor, beta: Tensor, chunk_size: int) -> Tensor:
    """`bsbr.backends.pytorch.corrected` of whole chunks [batch, kv_heads, time, head_dim]."""
    corrected = _like_hidden(v)
    torch.ops.bsbr.correct(keys, v, beta.to(v.dtype).unsqueeze(3), corrected, chunk_size)
    return corrected


class _Corrected(torch.autograd.Function):
    """`_corrected` of the first `chunks` chunks."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, v: Tensor, beta: Tensor, chunk_size: int, chunks: int) -> Tensor:
        tokens = slice(0, chunks * chunk_size)
        corrected = _corrected(keys[:, :, tokens], v[:, :, tokens], beta[:, :, tokens], chunk_size)
        ctx.save_for_backward(keys, v, beta, corrected)
        ctx.chunk_size = chunk_size
        return corrected

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        keys, v, beta, corrected = ctx.saved_tensors
        rates = beta.to(v.dtype).unsqueeze(3)
        gradients = d_keys, d_v, d_rates = [_like_hidden(x) for x in (keys, v, rates)]
        for x in gradients:
            x[:, :, corrected.shape[2] :] = 0  # of chunks that are not stored
        torch.ops.bsbr.correct_backward(keys, v, rates, corrected, gradient, *gradients, ctx.chunk_size)
        return d_keys, d_v, d_rates.squeeze(3).to(beta.dtype), None, None


class _Output(torch.autograd.Function):
    """softmax(QKᵀ/√d ⊙ M_in) V + φ(Q) F̄, φ(Q) = `unit_norm` of Q where no features are given; k and v may begin earlier than q."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, features: Tensor | None, retrieved: Tensor, chunk_size: int, chunk_overlap: int
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, features, retrieved)
        ctx.options = chunk_size, chunk_overlap
        out = _like_hidden(q)
        torch.ops.bsbr.attend(q, k, v, features, retrieved.contiguous(), out, chunk_size, chunk_overlap)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, features, retrieved = ctx.saved_tensors
        chunk_size, chunk_overlap = ctx.options
        d_q, d_k, d_v = (_like_hidden(x) for x in (q, k, v))
        if chunk_overlap:  # several chunks add to a key's gradient
            d_k.zero_()
            d_v.zero_()
        d_features = None if features is None else _like_hidden(features)
        d_retrieved = torch.empty_like(retrieved, memory_format=torch.contiguous_format)
        gradients = d_q, d_k, d_v, d_features, d_retrieved
        torch.ops.bsbr.attend_backward(d_out, q, k, v, features, retrieved.contiguous(), *gradients, chunk_size, chunk_overlap)
        return *gradients, None, None


class _Quadratic(torch.autograd.Function):
    """See `bsbr.features.quadratic`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(x)
        return _products(x, size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_features: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        d_x = _like_hidden(x)
        torch.ops.bsbr.quadratic_backward(d_features, x, d_x)
        return d_x, None


def _products(x: Tensor, size: int) -> Tensor:
    features = x.new_empty(x.shape[0], x.shape[2], x.shape[1], size).transpose(1, 2)
    torch.ops.bsbr.quadratic(x, features)
    return features


def quadratic(x: Tensor, size: int) -> Tensor:
    """See `bsbr.features.quadratic`; differentiable once."""
    if not (torch.is_grad_enabled() and x.requires_grad):  # when decoding, autograd takes as long as the products
        return _products(x, size)
    features: Tensor = _Quadratic.apply(x, size)  # type: ignore[no-untyped-call]
    return features


# --- operations ---------------------------------------------------------------------------------

# Known to torch's dispatcher, so that its profiler shows them and its FLOP counter counts them: each returns the floating
# point operations of the products that it ran.
_OPERATIONS = torch.library.Library("bsbr", "DEF")


def _operation(signature: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Registers a function as torch.ops.bsbr.<name>."""

    def register(function: Callable[..., int]) -> Callable[..., int]:
        name = signature.partition("(")[0]
        _OPERATIONS.define(signature)
        _OPERATIONS.impl(name, function, "CPU")
        _OPERATIONS.impl(name, lambda *_: 0, "Meta")  # where there is no data nothing is computed
        return function

    return register


@functools.cache
@functools.cache
def _kernels() -> ctypes.CDLL | str:
    """The compiled library with its operators registered for FLOP counting; where there is none, the reason."""
    code = library()
    if not isinstance(code, str):
        _make_countable()
    return code


def _make_countable() -> None:
    from torch.utils.flop_counter import register_flop_formula  # which loads Triton, where there is one

    for name in ("store", "store_backward", "correct", "correct_backward", "choose", "mix", "attend", "attend_backward"):
        register_flop_formula(getattr(torch.ops.bsbr, name), get_raw=True)(lambda *_, out_val, **__: out_val)


@_operation("store(Tensor keys, Tensor v, Tensor(a!) states, int chunk_size, bool normed) -> int")
def _store(keys: Tensor, v: Tensor, states: Tensor, chunk_size: int, normed: bool) -> int:
    """Writes F_s of as many chunks as `states` [batch, kv_heads, chunks, d_r, head_dim] has."""
    return _call("store", _sizes(keys, v, states.shape[2], chunk_size, normed), keys, v, states)


@_operation(
    "store_backward(Tensor keys, Tensor v, Tensor d_states, Tensor(a!) d_keys, Tensor(b!) d_v, int chunk_size, bool normed) -> int"
)
def _store_backward(keys: Tensor, v: Tensor, d_states: Tensor, d_keys: Tensor, d_v: Tensor, chunk_size: int, normed: bool) -> int:
    """Writes `d_keys` and `d_v` of the tokens of the chunks that `d_states` has."""
    return _call("store_backward", _sizes(keys, v, d_states.shape[2], chunk_size, normed), keys, v, d_states, d_keys, d_v)


@_operation("correct(Tensor keys, Tensor v, Tensor beta, Tensor(a!) corrected, int chunk_size) -> int")
def _correct(keys: Tensor, v: Tensor, beta: Tensor, corrected: Tensor, chunk_size: int) -> int:
    """Writes `corrected` [batch, kv_heads, time, head_dim] of whole chunks. beta: [batch, kv_heads, time, 1]."""
    sizes = _sizes(keys, v, corrected.shape[2] // chunk_size, chunk_size, False)
    return _call("correct", sizes, keys, v, beta, corrected)


@_operation(
    "correct_backward(Tensor keys, Tensor v, Tensor beta, Tensor corrected, Tensor gradient, Tensor(a!) d_keys, Tensor(b!) d_v, "
    "Tensor(c!) d_beta, int chunk_size) -> int"
)
def _correct_backward(keys: Tensor, v: Tensor, beta: Tensor, corrected: Tensor, gradient: Tensor, *rest: Any) -> int:
    """Writes what is called d_, of as many tokens as `corrected` has."""
    *gradients, chunk_size = rest
    sizes = _sizes(keys, v, corrected.shape[2] // chunk_size, chunk_size, False)
    return _call("correct_backward", sizes, keys, v, beta, corrected, gradient, *gradients)


@_operation("choose(Tensor scores, Tensor(a!) chosen, int seen) -> int")
def _choose_seen(scores: Tensor, chosen: Tensor, seen: int) -> int:
    """Writes to `chosen` [batch, heads, rows, top_k] which of the first `seen` + i `scores` [batch, heads, rows, chunks] of row i
    are highest, the highest first; where it sees fewer, the next ones follow."""
    (batch, heads, rows, chunks), top_k = scores.shape, chosen.shape[3]
    return _call("choose", (batch, heads, heads, rows, chunks, seen, top_k, False), scores, chosen)


@_operation("mix(Tensor weights, Tensor states, Tensor(a!) mixed, int seen, bool add) -> int")
def _mix_piece(weights: Tensor, states: Tensor, mixed: Tensor, seen: int, add: bool) -> int:
    """Writes Σ_s weights[s] states[s] to `mixed` [batch, heads, rows, size], or adds it.

    weights: [batch, heads, rows, chunks]; states: [batch, kv_heads, chunks, size]. Row i sees the first `seen` + i chunks;
    behind them its weights are 0.
    """
    (batch, heads, rows, chunks), (_, kv_heads, _, size) = weights.shape, states.shape
    return _call("mix", (batch, heads, kv_heads, rows, chunks, seen, size, add), weights, states, mixed)


@_operation("quadratic(Tensor x, Tensor(a!) features) -> int")
def _quadratic(x: Tensor, features: Tensor) -> int:
    """Writes `features` [batch, heads, time, d_r]."""
    return _call("quadratic", (*x.shape, features.shape[3]), x, features)


@_operation("quadratic_backward(Tensor d_features, Tensor x, Tensor(a!) d_x) -> int")
def _quadratic_backward(d_features: Tensor, x: Tensor, d_x: Tensor) -> int:
    """Writes `d_x`."""
    return _call("quadratic_backward", (*x.shape, d_features.shape[3]), d_features, x, d_x)


@_operation(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? features, Tensor retrieved, Tensor(a!) out, int chunk_size, int overlap) -> int"
)
def _attend(
    q: Tensor, k: Tensor, v: Tensor, features: Tensor | None, retrieved: Tensor, out: Tensor, chunk_size: int, overlap: int
) -> int:
    """Writes `out` [batch, heads, time, head_dim]."""
    return _call("attend", _sizes_of_output(q, k, retrieved, chunk_size, overlap), q, k, v, features, retrieved, out)


@_operation(
    "attend_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor? features, Tensor retrieved, Tensor(a!) d_q, "
    "Tensor(b!) d_k, Tensor(c!) d_v, Tensor(d!)? d_features, Tensor(e!) d_retrieved, int chunk_size, int overlap) -> int"
)
def _attend_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, features: Tensor | None, retrieved: Tensor, *rest: Any) -> int:
    """Writes what is called d_; where chunks overlap, `d_k` and `d_v` are added to."""
    *gradients, chunk_size, overlap = rest
    sizes = _sizes_of_output(q, k, retrieved, chunk_size, overlap)
    return _call("attend_backward", sizes, d_out, q, k, v, features, retrieved, *gradients)


def _sizes(keys: Tensor, v: Tensor, chunks: int, chunk_size: int, normed: bool) -> tuple[int, ...]:
    """`Sizes` of native.cpp, as storing needs them: of key-value heads alone."""
    batch, kv_heads, time, features = keys.shape
    return batch, kv_heads, kv_heads, time, 0, chunk_size, 0, chunks, v.shape[3], features, normed


def _sizes_of_output(q: Tensor, k: Tensor, retrieved: Tensor, chunk_size: int, overlap: int) -> tuple[int, ...]:
    batch, heads, time, head_dim = q.shape
    chunks, features = retrieved.shape[2:4]
    return batch, heads, k.shape[1], time, k.shape[2] - time, chunk_size, overlap, chunks, head_dim, features, False


def _call(function: str, sizes: tuple[int, ...], *tensors: Tensor | None) -> int:
    """Calls a function of native.cpp, which writes to some of the tensors, with scratch memory for each thread."""
    present = [x for x in tensors if x is not None]
    if not all(x.numel() for x in present):
        return 0
    kind, threads = TYPES[present[0].dtype], torch.get_num_threads()
    settings = (ctypes.c_int64 * (len(sizes) + 1))(*sizes, threads)
    # Rows must be contiguous, as those of all that is written are.
    rows = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]
    described = [number for x in rows for number in ((0, 0, 0, 0) if x is None else (x.data_ptr(), *x.stride()[:3]))]
    scratch = present[0].new_empty(threads * _function(f"{function}_scratch_{kind}")(settings))
    arguments = settings, (ctypes.c_int64 * len(described))(*described), ctypes.c_void_p(scratch.data_ptr())
    return int(_function(f"{function}_{kind}")(*arguments))


@functools.cache
def _function(name: str) -> Any:
    code = _kernels()
    assert isinstance(code, ctypes.CDLL), code
    function = code[name]
    function.restype = ctypes.c_int64
    return function


def _like_hidden(x: Tensor) -> Tensor:
    """Room for [batch, heads, time, dim], laid out as [batch, time, heads · dim]: joined heads are then no copy."""
    batch, heads, time, dim = x.shape
    return x.new_empty(batch, time, heads, dim).transpose(1, 2)
