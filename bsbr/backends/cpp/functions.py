"""Autograd functions over the C++ operators, each differentiable once, and functions without gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class ChunkStates(torch.autograd.Function):
    """States F_s = φ(K_s)ᵀ V_s of the first `chunks` chunks [batch, kv_heads, chunks, d_r, head_dim].

    φ(K) is `keys`, or its unit norm if `unit_norm`.
    """

    @staticmethod
    def forward(ctx: Any, keys: Tensor, v: Tensor, chunk_size: int, chunks: int, unit_norm: bool) -> Tensor:
        ctx.save_for_backward(keys, v)
        ctx.options = chunk_size, unit_norm
        states = v.new_empty(*v.shape[:2], chunks, keys.shape[3], v.shape[3])
        torch.ops.bsbr.chunk_states(keys, v, states, chunk_size, unit_norm)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_states: Tensor) -> tuple[Tensor | None, ...]:
        keys, v = ctx.saved_tensors
        chunk_size, unit_norm = ctx.options
        stored = d_states.shape[2] * chunk_size
        d_keys, d_v = _zero_from(stored, keys), _zero_from(stored, v)
        torch.ops.bsbr.chunk_states_backward(keys, v, d_states.contiguous(), d_keys, d_v, chunk_size, unit_norm)
        return d_keys, d_v, None, None, None


def pseudo_values(keys: Tensor, v: Tensor, beta: Tensor, chunk_size: int) -> Tensor:
    """`bsbr.backends.pytorch.pseudo_values` of whole chunks [batch, kv_heads, time, head_dim], without gradients."""
    pseudo = empty_like_heads(v)
    torch.ops.bsbr.pseudo_values(keys, v, beta.to(v.dtype).unsqueeze(3), pseudo, chunk_size)
    return pseudo


class PseudoValues(torch.autograd.Function):
    """`pseudo_values` of the first `chunks` chunks, with gradients."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, v: Tensor, beta: Tensor, chunk_size: int, chunks: int) -> Tensor:
        tokens = slice(0, chunks * chunk_size)
        pseudo = pseudo_values(keys[:, :, tokens], v[:, :, tokens], beta[:, :, tokens], chunk_size)
        ctx.save_for_backward(keys, v, beta, pseudo)
        ctx.chunk_size = chunk_size
        return pseudo

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_pseudo: Tensor) -> tuple[Tensor | None, ...]:
        keys, v, beta, pseudo = ctx.saved_tensors
        rates = beta.to(v.dtype).unsqueeze(3)
        d_keys, d_v, d_rates = (_zero_from(pseudo.shape[2], x) for x in (keys, v, rates))
        torch.ops.bsbr.pseudo_values_backward(keys, v, rates, pseudo, d_pseudo, d_keys, d_v, d_rates, ctx.chunk_size)
        return d_keys, d_v, d_rates.squeeze(3).to(beta.dtype), None, None


class Output(torch.autograd.Function):
    """softmax(QKᵀ/√d ⊙ M_in) V + φ(Q) F̄; φ(Q) is `features`, or the unit norm of q if None; k and v may begin before q."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, features: Tensor | None, retrieved: Tensor, chunk_size: int, chunk_overlap: int
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, features, retrieved)
        ctx.options = chunk_size, chunk_overlap
        out = empty_like_heads(q)
        torch.ops.bsbr.attend(q, k, v, features, retrieved.contiguous(), out, chunk_size, chunk_overlap)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, features, retrieved = ctx.saved_tensors
        chunk_size, chunk_overlap = ctx.options
        d_q, d_k, d_v = (empty_like_heads(x) for x in (q, k, v))
        if chunk_overlap:  # several chunks add to a key's gradient
            d_k.zero_()
            d_v.zero_()
        d_features = None if features is None else empty_like_heads(features)
        d_retrieved = torch.empty_like(retrieved, memory_format=torch.contiguous_format)
        gradients = d_q, d_k, d_v, d_features, d_retrieved
        torch.ops.bsbr.attend_backward(d_out, q, k, v, features, retrieved.contiguous(), *gradients, chunk_size, chunk_overlap)
        return *gradients, None, None


class _QuadraticFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(x)
        return _quadratic_features(x, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_features: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        d_x = empty_like_heads(x)
        torch.ops.bsbr.quadratic_features_backward(d_features, x, d_x)
        return d_x, None


def quadratic_features(x: Tensor, size: int) -> Tensor:
    """`bsbr.features.quadratic_features` of x [batch, heads, time, factors]: [batch, heads, time, size]; differentiable once."""
    if not (torch.is_grad_enabled() and x.requires_grad):  # in decoding, autograd would take as long as the computation
        return _quadratic_features(x, size)
    features: Tensor = _QuadraticFeatures.apply(x, size)  # type: ignore[no-untyped-call]
    return features


def _quadratic_features(x: Tensor, size: int) -> Tensor:
    features = x.new_empty(x.shape[0], x.shape[2], x.shape[1], size).transpose(1, 2)
    torch.ops.bsbr.quadratic_features(x, features)
    return features


def empty_like_heads(x: Tensor) -> Tensor:
    """Uninitialised [batch, heads, time, dim], stored as [batch, time, heads · dim]: joining the heads is then no copy."""
    batch, heads, time, dim = x.shape
    return x.new_empty(batch, time, heads, dim).transpose(1, 2)


def _zero_from(token: int, x: Tensor) -> Tensor:
    """`empty_like_heads` with zeros from `token` on: tokens outside the states have gradient 0."""
    gradient = empty_like_heads(x)
    gradient[:, :, token:] = 0
    return gradient
