"""BSBR's C++ operators as functions that autograd differentiates: whole sequences, states of chunks, the output, features."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsbr.backends import pytorch
from bsbr.backends.cpp.differentiable import Differentiable
from bsbr.inputs import BSBRInputs, BSBROptions

Gradients = tuple[Tensor | None, ...]


def empty_like_heads(x: Tensor) -> Tensor:
    """Uninitialised [batch, heads, time, dim], stored as [batch, time, heads · dim]: joining the heads is then no copy."""
    batch, heads, time, dim = x.shape
    return x.new_empty(batch, time, heads, dim).transpose(1, 2)


# --- whole sequences ----------------------------------------------------------------------------


class SequenceResult(NamedTuple):
    """Results of the operator `forward`.

    Attributes:
        output: [batch, heads, time, head_dim].
        states: of all chunks, [batch, kv_heads, chunks, d_r, head_dim].
        weights: of retrieval, for the last group of chunks: [batch, heads, group, chunks rounded up to 32].
        mixed: what the last group retrieved, before gain and normalisation: [batch, heads, group, d_r, head_dim].
    """

    output: Tensor
    states: Tensor
    weights: Tensor
    mixed: Tensor


def run_sequence(
    inputs: BSBRInputs, options: BSBROptions, group: int, memory: tuple[Tensor, Tensor] | None = None, first: int = 0
) -> SequenceResult:
    """BSBR of a sequence, or of its tokens from chunk `first` on, in one call. Not differentiable.

    Args:
        inputs, options: see `bsbr.backends.pytorch.segment`.
        group: number of chunks that are stored, mixed and read out together.
        memory: meta keys and states of all chunks of the sequence; the states of the tokens' own chunks are written.
        first: number of chunks before the tokens.
    """
    q, k, v, meta_query, meta_key, q_features, k_features, beta, gain = inputs
    batch, heads, _, head_dim = q.shape
    rows, chunks, features = meta_query.shape[2], meta_key.shape[2], head_dim if q_features is None else q_features.shape[3]
    meta_key, states = memory or (meta_key, v.new_empty(batch, k.shape[1], chunks, features, head_dim))
    group = min(rows, group)
    result = SequenceResult(
        output=empty_like_heads(q),
        states=states,
        weights=v.new_empty(batch, heads, group, -(-(first + rows) // 32) * 32),
        mixed=v.new_empty(batch, heads, group, features, head_dim),
    )
    torch.ops.bsbr.forward(
        q, k, v, meta_query, meta_key, q_features, k_features, _rates(beta, v), gain_column(gain),
        result.states, result.weights, result.mixed, result.output,
        options.chunk_size, options.chunk_overlap, options.normalise, first,
    )  # fmt: skip
    return result


def gain_column(gain: Tensor | None) -> Tensor | None:
    """The gain [heads] as the operators take it."""
    return None if gain is None else gain.view(1, 1, -1, 1)


def _sequence(*arguments: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    *tensors, options = arguments
    inputs = BSBRInputs(*tensors)
    output, *saved = run_sequence(inputs, options, group=inputs.meta_query.shape[2])
    return output, tuple(saved)


def _sequence_backward(arguments: tuple[Any, ...], saved: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> Gradients:
    *tensors, options = arguments
    q, k, v, meta_query, meta_key, q_features, k_features, beta, gain = tensors
    states, weights, mixed = saved
    size = options.chunk_size
    d_q, d_k, d_v, d_q_features, d_mixed = _output_gradients(q, k, v, q_features, mixed, options.chunk_overlap)
    d_gain = None if gain is None else mixed.new_empty(*mixed.shape[:3], 1)
    torch.ops.bsbr.attend_backward(
        gradients[0], q, k, v, q_features, mixed, gain_column(gain), d_q, d_k, d_v, d_q_features, d_mixed, d_gain,
        size, options.chunk_overlap, 0, options.normalise,
    )  # fmt: skip
    stored = states.shape[2]
    d_meta_query, d_meta_key = meta_query.new_zeros(meta_query.shape), meta_key.new_zeros(meta_key.shape)
    d_k_features = None if k_features is None else _zero_from(stored * size, k_features)
    d_rates = None if beta is None else _zero_from(stored * size, beta.unsqueeze(3).to(v.dtype))
    if stored:
        d_weights, d_states = torch.empty_like(weights), torch.empty_like(states)
        torch.ops.bsbr.mix_states_backward(weights, d_mixed.flatten(3), states.flatten(3), d_weights, d_states.flatten(3))
        torch.ops.bsbr.retrieval_weights_backward(weights, d_weights, meta_query, meta_key, d_meta_query, d_meta_key)
        keys, d_keys = (k, d_k) if k_features is None else (k_features, d_k_features)
        torch.ops.bsbr.chunk_states_backward(
            keys, v, _rates(beta, v), d_states, d_keys, d_v, d_rates, size, k_features is None, True
        )
    d_beta = None if d_rates is None else d_rates.squeeze(3).to(beta.dtype)
    total_d_gain = None if d_gain is None else d_gain.sum(dim=(0, 2, 3))
    return d_q, d_k, d_v, d_meta_query, d_meta_key, d_q_features, d_k_features, d_beta, total_d_gain, None


def _sequence_in_torch(*arguments: Any) -> Tensor:
    *tensors, options = arguments
    return pytorch.segment(BSBRInputs(*tensors), options).output


whole_sequence = Differentiable(_sequence, _sequence_backward, _sequence_in_torch)
"""whole_sequence(*inputs, options): BSBR of a sequence from its first token on, without top_k. `inputs` are the fields of
`BSBRInputs`, with a meta key for each chunk but the last."""


# --- states of chunks ---------------------------------------------------------------------------


def _states(
    keys: Tensor, v: Tensor, beta: Tensor | None, chunk_size: int, chunks: int, unit_norm: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    states = v.new_empty(*v.shape[:2], chunks, keys.shape[3], v.shape[3])
    torch.ops.bsbr.chunk_states(keys, v, _rates(beta, v), states, chunk_size, unit_norm)
    return states, ()


def _states_backward(arguments: tuple[Any, ...], saved: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> Gradients:
    keys, v, beta, chunk_size, _, unit_norm = arguments
    (d_states,) = gradients
    stored, rates = d_states.shape[2] * chunk_size, _rates(beta, v)
    d_keys, d_v = _zero_from(stored, keys), _zero_from(stored, v)
    d_rates = None if rates is None else _zero_from(stored, rates)
    torch.ops.bsbr.chunk_states_backward(keys, v, rates, d_states.contiguous(), d_keys, d_v, d_rates, chunk_size, unit_norm, False)
    d_beta = None if d_rates is None else d_rates.squeeze(3).to(beta.dtype)
    return d_keys, d_v, d_beta, None, None, None


def _states_in_torch(keys: Tensor, v: Tensor, beta: Tensor | None, chunk_size: int, chunks: int, unit_norm: bool) -> Tensor:
    return pytorch.chunk_states(pytorch.unit_norm(keys) if unit_norm else keys, v, chunk_size, chunks, beta)


def _rates(beta: Tensor | None, v: Tensor) -> Tensor | None:
    """β as the operators take it: [batch, kv_heads, time, 1] in the dtype of v."""
    return None if beta is None else beta.to(v.dtype).unsqueeze(3)


def _zero_from(token: int, x: Tensor) -> Tensor:
    """`empty_like_heads` with zeros from `token` on: tokens outside the states have gradient 0."""
    gradient = empty_like_heads(x)
    gradient[:, :, token:] = 0
    return gradient


chunk_states = Differentiable(_states, _states_backward, _states_in_torch)
"""chunk_states(keys, v, beta, chunk_size, chunks, unit_norm): states of the first `chunks` chunks, see `pytorch.chunk_states`:
[batch, kv_heads, chunks, d_r, head_dim]. φ(k) is `keys`, or its unit norm if `unit_norm`; beta may be None."""


# --- output -------------------------------------------------------------------------------------


def _output(
    q: Tensor, k: Tensor, v: Tensor, features: Tensor | None, retrieved: Tensor, chunk_size: int, chunk_overlap: int, seen: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = empty_like_heads(q)
    torch.ops.bsbr.attend(q, k, v, features, retrieved.contiguous(), None, out, chunk_size, chunk_overlap, seen, False)
    return out, ()


def _output_backward(arguments: tuple[Any, ...], saved: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> Gradients:
    q, k, v, features, retrieved, chunk_size, chunk_overlap, seen = arguments
    written = _output_gradients(q, k, v, features, retrieved, chunk_overlap)
    sizes = chunk_size, chunk_overlap, seen, False
    torch.ops.bsbr.attend_backward(gradients[0], q, k, v, features, retrieved.contiguous(), None, *written, None, *sizes)
    return *written, None, None, None


def _output_gradients(
    q: Tensor, k: Tensor, v: Tensor, features: Tensor | None, retrieved: Tensor, chunk_overlap: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Tensors for the gradients of `attend`, in its order."""
    d_q, d_k, d_v = (empty_like_heads(x) for x in (q, k, v))
    if chunk_overlap:  # several chunks add to a key's gradient
        d_k.zero_()
        d_v.zero_()
    d_features = None if features is None else empty_like_heads(features)
    return d_q, d_k, d_v, d_features, torch.empty_like(retrieved, memory_format=torch.contiguous_format)


def _output_in_torch(
    q: Tensor, k: Tensor, v: Tensor, features: Tensor | None, retrieved: Tensor, chunk_size: int, chunk_overlap: int, seen: int
) -> Tensor:
    local = pytorch.local_attention(q, k, v, chunk_size=chunk_size, chunk_overlap=chunk_overlap)
    return local + pytorch.read_out(pytorch.unit_norm(q) if features is None else features, retrieved, chunk_size)


output = Differentiable(_output, _output_backward, _output_in_torch)
"""output(q, k, v, features, retrieved, chunk_size, chunk_overlap, seen): softmax(QKᵀ/√d ⊙ M_in) V + φ(Q) F̄.

φ(Q) is `features`, or the unit norm of q if None; k and v may begin before q. `seen`: number of chunks before the first one; if 0,
the first chunk retrieves nothing."""


# --- features -----------------------------------------------------------------------------------


def _features(x: Tensor, size: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    features = x.new_empty(x.shape[0], x.shape[2], x.shape[1], size).transpose(1, 2)
    torch.ops.bsbr.quadratic_features(x, features)
    return features, ()


def _features_backward(arguments: tuple[Any, ...], saved: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> Gradients:
    x: Tensor = arguments[0]
    d_x = empty_like_heads(x)
    torch.ops.bsbr.quadratic_features_backward(gradients[0], x, d_x)
    return d_x, None


quadratic_features = Differentiable(_features, _features_backward, pytorch.quadratic_features)
"""quadratic_features(x, size): `pytorch.quadratic_features` of x [batch, heads, time, factors]: [batch, heads, time, size]."""
