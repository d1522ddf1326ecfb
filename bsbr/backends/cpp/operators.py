"""The torch operators torch.ops.bsbr.* over the functions of bsbr.cpp.

Tensors are [batch, heads or
kv_heads, time, dim] unless a docstring says otherwise. The caller allocates the tensors that an operator writes.
"""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bsbr.backends.cpp.calls import Kernels

KERNELS = Kernels(Path(__file__).with_name("bsbr.cpp"), "bsbr")
"""The functions of bsbr.cpp."""


class SequenceSizes(NamedTuple):
    """`SequenceSizes` of bsbr.cpp: sizes of a whole sequence, or of a segment of it."""

    batch: int
    heads: int
    kv_heads: int
    time: int
    before: int
    chunk_size: int
    overlap: int
    first: int
    chunks: int
    stored: int
    group: int
    head_dim: int
    features: int
    normalise: int


class ChunkSizes(NamedTuple):
    """`ChunkSizes` of bsbr/sizes.h: sizes of a function that works on tokens, chunk by chunk."""

    batch: int
    heads: int
    kv_heads: int
    time: int
    before: int
    chunk_size: int
    overlap: int
    chunks: int
    seen: int
    head_dim: int
    features: int
    unit_norm: int
    normalise: int
    add: int


class RetrievalSizes(NamedTuple):
    """`RetrievalSizes` of bsbr/sizes.h: sizes of a function that works on scores and states of chunks."""

    batch: int
    heads: int
    kv_heads: int
    rows: int
    chunks: int
    seen: int
    size: int
    add: int


class WeightSizes(NamedTuple):
    """`WeightSizes` of bsbr/sizes.h: sizes of a function that works on the weights of retrieval."""

    batch: int
    heads: int
    kv_heads: int
    rows: int
    chunks: int
    seen: int
    head_dim: int


class FeatureSizes(NamedTuple):
    """`FeatureSizes` of bsbr/sizes.h: sizes of a function that makes features of tokens."""

    batch: int
    heads: int
    time: int
    factors: int
    size: int


# --- whole sequences ----------------------------------------------------------------------------


@KERNELS.operator(
    "forward(Tensor q, Tensor k, Tensor v, Tensor meta_query, Tensor meta_key, Tensor? q_features, Tensor? k_features, "
    "Tensor? beta, Tensor? gain, Tensor(a!) states, Tensor(b!) weights, Tensor(c!) mixed, Tensor(d!) out, int chunk_size, "
    "int overlap, bool normalise, int first) -> int"
)
def _forward(q: Tensor, k: Tensor, v: Tensor, meta_query: Tensor, meta_key: Tensor, *rest: Any) -> int:
    """Writes BSBR of a sequence to `out`, and its states to `states` [batch, kv_heads, stored chunks, d_r, head_dim].

    The tokens may be a segment that begins with chunk `first`: `states` and meta_key then have those of all chunks of the sequence,
    and k and v may begin before q.

    weights [batch, heads, group, chunks rounded up to 32] and mixed [batch, heads, group, d_r, head_dim] receive the weights of
    retrieval and the retrieved states of the last group of chunks, before gain and normalisation. gain: [1, 1, heads, 1]; beta:
    [batch, kv_heads, time, 1].
    """
    q_features, k_features, beta, gain, states, weights, mixed, out, chunk_size, overlap, normalise, first = rest
    batch, heads, time, head_dim = q.shape
    stored, group, features = states.shape[2], mixed.shape[2], mixed.shape[3]
    sizes = SequenceSizes(
        batch, heads, k.shape[1], time, k.shape[2] - time, chunk_size, overlap, first, first + meta_query.shape[2], stored, group,
        head_dim, features, normalise,
    )  # fmt: skip
    # An empty tensor would end the call: without stored chunks, those that have a row for each are left out.
    memory = (meta_key, q_features, k_features, beta) if stored else (None, q_features, None, None)
    return KERNELS.call("forward", sizes, q, k, v, meta_query, *memory, gain, states if stored else None, weights, mixed, out)


# --- states of chunks ---------------------------------------------------------------------------


@KERNELS.operator("chunk_states(Tensor keys, Tensor v, Tensor? beta, Tensor(a!) states, int chunk_size, bool unit_norm) -> int")
def _chunk_states(keys: Tensor, v: Tensor, beta: Tensor | None, states: Tensor, chunk_size: int, unit_norm: bool) -> int:
    """Writes the states of as many chunks as `states` [batch, kv_heads, chunks, d_r, head_dim] has.

    φ(k) is `keys` or its unit norm. With beta [batch, kv_heads, time, 1] the delta rule makes the states, else they are sums.
    """
    return KERNELS.call("chunk_states", _state_sizes(keys, v, states, chunk_size, unit_norm), keys, v, beta, states)


@KERNELS.operator(
    "chunk_states_backward(Tensor keys, Tensor v, Tensor? beta, Tensor d_states, Tensor(a!) d_keys, Tensor(b!) d_v, "
    "Tensor(c!)? d_beta, int chunk_size, bool unit_norm, bool add) -> int"
)
def _chunk_states_backward(keys: Tensor, v: Tensor, beta: Tensor | None, d_states: Tensor, *rest: Any) -> int:
    """Writes `d_keys`, `d_v` and `d_beta` of the tokens of the chunks that `d_states` has.

    add: adds to `d_v` instead, and to `d_keys` if `unit_norm`: the attention inside chunks has gradients of the same tensors.
    """
    *gradients, chunk_size, unit_norm, add = rest
    sizes = _state_sizes(keys, v, d_states, chunk_size, unit_norm)._replace(add=add)
    return KERNELS.call("chunk_states_backward", sizes, keys, v, beta, d_states, *gradients)


def _state_sizes(keys: Tensor, v: Tensor, states: Tensor, chunk_size: int, unit_norm: bool) -> ChunkSizes:
    batch, kv_heads, time, features = keys.shape
    chunks = states.shape[2]
    return ChunkSizes(batch, kv_heads, kv_heads, time, 0, chunk_size, 0, chunks, 0, v.shape[3], features, unit_norm, False, False)


# --- retrieval ----------------------------------------------------------------------------------


@KERNELS.operator("select_top_k(Tensor scores, Tensor(a!) selected, int seen) -> int")
def _select_top_k(scores: Tensor, selected: Tensor, seen: int) -> int:
    """Writes the indices of each row's highest scores, the highest first, to `selected` [batch, heads, rows, top_k].

    Row i of `scores` [batch, heads, rows, chunks] sees the first `seen` + i chunks. If these are fewer than top_k, the indices of
    the next chunks follow.
    """
    (batch, heads, rows, chunks), top_k = scores.shape, selected.shape[3]
    return KERNELS.call("select_top_k", RetrievalSizes(batch, heads, heads, rows, chunks, seen, top_k, False), scores, selected)


@KERNELS.operator("mix_states(Tensor weights, Tensor states, Tensor(a!) mixed, int seen, bool add) -> int")
def _mix_states(weights: Tensor, states: Tensor, mixed: Tensor, seen: int, add: bool) -> int:
    """Writes Σ_s weights[s] states[s] to `mixed` [batch, heads, rows, size], or adds it if `add`.

    weights: [batch, heads, rows, chunks]; states: [batch, kv_heads, chunks, size]. Row i sees the first `seen` + i chunks;
    the weights of later chunks are 0.
    """
    (batch, heads, rows, chunks), (_, kv_heads, _, size) = weights.shape, states.shape
    sizes = RetrievalSizes(batch, heads, kv_heads, rows, chunks, seen, size, add)
    return KERNELS.call("mix_states", sizes, weights, states, mixed)


@KERNELS.operator(
    "mix_states_backward(Tensor weights, Tensor d_mixed, Tensor states, Tensor(a!) d_weights, Tensor(b!) d_states) -> int"
)
def _mix_states_backward(weights: Tensor, d_mixed: Tensor, states: Tensor, d_weights: Tensor, d_states: Tensor) -> int:
    """Writes the gradients of `mix_states` where row i sees the first i chunks, [batch, heads or kv_heads, rows or chunks, size].

    weights and d_weights: [batch, heads, rows, chunks rounded up to 32]; of `d_weights` only what a row sees is written.
    """
    (batch, heads, rows, size), (_, kv_heads, chunks, _) = d_mixed.shape, states.shape
    sizes = RetrievalSizes(batch, heads, kv_heads, rows, chunks, 0, size, False)
    return KERNELS.call("mix_states_backward", sizes, weights, d_mixed, states, d_weights, d_states)


@KERNELS.operator(
    "retrieval_weights_backward(Tensor weights, Tensor(a!) d_weights, Tensor meta_query, Tensor meta_key, Tensor(b!) d_meta_query, "
    "Tensor(c!) d_meta_key) -> int"
)
def _retrieval_weights_backward(weights: Tensor, d_weights: Tensor, meta_query: Tensor, meta_key: Tensor, *written: Tensor) -> int:
    """Writes `d_meta_query` and `d_meta_key`; overwrites `d_weights` by the gradient of the scores. See `mix_states_backward`."""
    (batch, heads, rows, head_dim), (_, kv_heads, chunks, _) = meta_query.shape, meta_key.shape
    sizes = WeightSizes(batch, heads, kv_heads, rows, chunks, 0, head_dim)
    return KERNELS.call("retrieval_weights_backward", sizes, weights, d_weights, meta_query, meta_key, *written)


# --- output -------------------------------------------------------------------------------------


@KERNELS.operator(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? features, Tensor retrieved, Tensor? gain, Tensor(a!) out, int chunk_size, "
    "int overlap, int seen, bool normalise) -> int"
)
def _attend(q: Tensor, k: Tensor, v: Tensor, features: Tensor | None, retrieved: Tensor, *rest: Any) -> int:
    """Writes softmax(QKᵀ/√d ⊙ M_in) V + g φ(Q) F̄ to `out`; φ(Q) is `features`, or the unit norm of q if that is None.

    gain: [1, 1, heads, 1]. normalise: whether each F̄ of `retrieved` is scaled to the norm √head_dim. seen: number of chunks before
    the first one; if 0, the first chunk retrieves nothing.
    """
    gain, out, chunk_size, overlap, seen, normalise = rest
    sizes = _output_sizes(q, k, retrieved, chunk_size, overlap, seen)._replace(normalise=normalise)
    return KERNELS.call("attend", sizes, q, k, v, features, retrieved, gain, out)


@KERNELS.operator(
    "attend_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor? features, Tensor retrieved, Tensor? gain, Tensor(a!) d_q, "
    "Tensor(b!) d_k, Tensor(c!) d_v, Tensor(d!)? d_features, Tensor(e!) d_retrieved, Tensor(f!)? d_gain, int chunk_size, "
    "int overlap, int seen, bool normalise) -> int"
)
def _attend_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, features: Tensor | None, retrieved: Tensor, *rest: Any) -> int:
    """Writes the gradients of `attend`; with an overlap, adds to `d_k` and `d_v` instead.

    d_gain: [batch, heads, chunks, 1], the share of each chunk in the gradient of the gain.
    """
    *tensors, chunk_size, overlap, seen, normalise = rest
    sizes = _output_sizes(q, k, retrieved, chunk_size, overlap, seen)._replace(normalise=normalise)
    return KERNELS.call("attend_backward", sizes, d_out, q, k, v, features, retrieved, *tensors)


def _output_sizes(q: Tensor, k: Tensor, retrieved: Tensor, chunk_size: int, overlap: int, seen: int) -> ChunkSizes:
    batch, heads, time, head_dim = q.shape
    chunks, features = retrieved.shape[2:4]
    before = k.shape[2] - time
    sizes = chunk_size, overlap, chunks, seen, head_dim, features
    return ChunkSizes(batch, heads, k.shape[1], time, before, *sizes, False, False, False)


# --- features -----------------------------------------------------------------------------------


@KERNELS.operator("quadratic_features(Tensor x, Tensor(a!) features) -> int")
def _quadratic_features(x: Tensor, features: Tensor) -> int:
    """Writes `features` [batch, heads, time, d_r] of x [batch, heads, time, factors]."""
    return KERNELS.call("quadratic_features", _feature_sizes(x, features), x, features)


@KERNELS.operator("quadratic_features_backward(Tensor d_features, Tensor x, Tensor(a!) d_x) -> int")
def _quadratic_features_backward(d_features: Tensor, x: Tensor, d_x: Tensor) -> int:
    """Writes `d_x`."""
    return KERNELS.call("quadratic_features_backward", _feature_sizes(x, d_features), d_features, x, d_x)


def _feature_sizes(x: Tensor, features: Tensor) -> FeatureSizes:
    batch, heads, time, factors = x.shape
    return FeatureSizes(batch, heads, time, factors, features.shape[3])
