"""BSBR's C++ operators as functions that autograd differentiates: states of chunks, the output, quadratic features."""

from typing import Any

import torch
from torch import Tensor

from bsbr.backends import pytorch
from bsbr.backends.cpp.differentiable import Differentiable

Gradients = tuple[Tensor | None, ...]


def empty_like_heads(x: Tensor) -> Tensor:
    """Uninitialised [batch, heads, time, dim], stored as [batch, time, heads · dim]: joining the heads is then no copy."""
    batch, heads, time, dim = x.shape
    return x.new_empty(batch, time, heads, dim).transpose(1, 2)


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
    torch.ops.bsbr.chunk_states_backward(keys, v, rates, d_states.contiguous(), d_keys, d_v, d_rates, chunk_size, unit_norm)
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
    d_q, d_k, d_v = (empty_like_heads(x) for x in (q, k, v))
    if chunk_overlap:  # several chunks add to a key's gradient
        d_k.zero_()
        d_v.zero_()
    d_features = None if features is None else empty_like_heads(features)
    d_retrieved = torch.empty_like(retrieved, memory_format=torch.contiguous_format)
    written = d_q, d_k, d_v, d_features, d_retrieved
    sizes = chunk_size, chunk_overlap, seen
    torch.ops.bsbr.attend_backward(gradients[0], q, k, v, features, retrieved.contiguous(), *written, *sizes)
    return *written, None, None, None


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
