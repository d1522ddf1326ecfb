"""One autograd function over all Triton kernels, so that autograd does not store the tensors between kernels."""

from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bsbr.backends import pytorch
from bsbr.backends.pytorch import unit_norm
from bsbr.backends.retrieval import norm_factors
from bsbr.backends.triton import tiles, top_k
from bsbr.backends.triton.mixing import mix, mix_backward
from bsbr.backends.triton.output import output
from bsbr.backends.triton.output_backward import keys_backward, queries_backward
from bsbr.backends.triton.states import chunk_states
from bsbr.inputs import BSBRInputs, BSBROptions


class _Saved(NamedTuple):
    """Tensors that the forward pass saves for the backward pass; see `BSBRFunction`."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_features: Tensor | None
    k_features: Tensor | None
    pseudo: Tensor | None
    gain: Tensor | None
    meta_query: Tensor | None
    meta_key: Tensor | None
    weights: Tensor | None
    selected: Tensor | None
    states: Tensor | None
    mixed: Tensor | None
    mix_lse: Tensor | None
    lse: Tensor


class _RetrievalGradients(NamedTuple):
    """Gradients of the inputs of retrieval; None for an input that is absent."""

    states: Tensor | None = None
    meta_query: Tensor | None = None
    meta_key: Tensor | None = None
    weights: Tensor | None = None


class BSBRFunction(torch.autograd.Function):
    """BSBR of a whole sequence.

    Its tensors are q, k, v; φ(q) and φ(k), or None for the unit norm; the pseudo-values U [batch, kv_heads, (C − 1)·chunk_size,
    head_dim], which replace v in the states and require features; the gain; and either the meta queries and meta keys, or the
    weights and indices of the states that `top_k.select` selected.

    Saved for the backward pass are the inputs, F and F̄ (each n / chunk_size · d_r · head_dim numbers per head) and the logarithms
    of the sums of both softmaxes, but not o. F and F̄ have the dtype of the inputs: their rounding error is of the same order as
    that of o, and float32 would double the traffic between the kernels. Sums inside a kernel are float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_features: Tensor | None,
        k_features: Tensor | None,
        pseudo: Tensor | None,
        gain: Tensor | None,
        meta_query: Tensor | None,
        meta_key: Tensor | None,
        weights: Tensor | None,
        selected: Tensor | None,
        options: BSBROptions,
    ) -> Tensor:
        chunks = -(-q.shape[2] // options.chunk_size) - 1  # the retrievable ones
        unit = q_features is None or k_features is None
        phi_q, phi_k = (q, k) if q_features is None or k_features is None else (q_features, k_features)
        states = mixed = retrieved = mix_lse = None
        with torch.cuda.device_of(q):
            if chunks:
                values = v if pseudo is None else pseudo
                states = chunk_states(phi_k, values, first=0, chunks=chunks, chunk_size=options.chunk_size, unit=unit)
                if meta_query is not None and meta_key is not None:
                    mixed, mix_lse = mix(meta_query, meta_key, states)
                elif weights is not None and selected is not None:
                    mixed = top_k.gather(states, weights, selected)
                assert mixed is not None
                retrieved = (mixed * norm_factors(mixed)).to(mixed.dtype) if options.normalise else mixed
            sizes = {"chunk_size": options.chunk_size, "chunk_overlap": options.chunk_overlap}
            out, lse = output(q, k, v, phi_q, retrieved, gain, **sizes, unit=unit)
        attention = q, k, v, q_features, k_features, pseudo, gain
        retrieval = meta_query, meta_key, weights, selected, states, mixed, mix_lse
        ctx.save_for_backward(*attention, *retrieval, lse)  # in the order of _Saved
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, options = _Saved(*ctx.saved_tensors), cast(BSBROptions, ctx.options)
        q, k, v, size = saved.q, saved.k, saved.v, options.chunk_size
        unit = saved.q_features is None or saved.k_features is None
        phi_q, phi_k = (q, k) if saved.q_features is None or saved.k_features is None else (saved.q_features, saved.k_features)
        grad = tiles.rows_contiguous(grad)
        retrieved, gradients, grad_pseudo = saved.mixed, _RetrievalGradients(), None
        with torch.cuda.device_of(q):
            if saved.states is not None and saved.mixed is not None:
                # dF̄ of a chunk is the state of φ(q) and dO: the same kernel computes it.
                chunks = saved.states.shape[2]
                grad_mixed = chunk_states(phi_q, grad, first=1, chunks=chunks, chunk_size=size, unit=unit, gain=saved.gain)
                if options.normalise:
                    retrieved, grad_mixed = _normalise_backward(saved.mixed, grad_mixed)
                gradients = _mix_backward(saved, grad_mixed)
                del grad_mixed
            sizes = {"chunk_size": size, "chunk_overlap": options.chunk_overlap}
            grad_q, grad_q_features, grad_gain, delta = queries_backward(
                q, k, v, phi_q, retrieved, saved.gain, grad, saved.lse, **sizes, unit=unit
            )
            # With pseudo-values, the states do not depend on v directly.
            states_of_v = gradients.states if saved.pseudo is None else None
            grad_k, grad_v, grad_k_features = keys_backward(q, k, v, phi_k, states_of_v, grad, saved.lse, delta, **sizes, unit=unit)
            if saved.pseudo is not None and gradients.states is not None:
                assert grad_k_features is not None  # pseudo-values need features
                tokens, shape = saved.pseudo.shape[2], (gradients.states.shape[2], size)
                grad_k_features[:, :, :tokens] = (saved.pseudo.unflatten(2, shape) @ gradients.states.mT).flatten(2, 3)
                grad_pseudo = (phi_k[:, :, :tokens].unflatten(2, shape) @ gradients.states).flatten(2, 3)
        return (
            *(grad_q, grad_k, grad_v, grad_q_features, grad_k_features, grad_pseudo, grad_gain),
            *(gradients.meta_query, gradients.meta_key, gradients.weights, None, None),
        )


def _normalise_backward(mixed: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """y = s x with x = `mixed` and s = √d (|x|² + ε)^(−1/2); and dx = s (dy − y (y·dy)/d) from dy = `grad`."""
    scale, upstream = norm_factors(mixed), grad.float()
    normal = mixed.float() * scale
    along = (normal * upstream).sum(dim=(-2, -1), keepdim=True) / mixed.shape[-1]
    return normal.to(mixed.dtype), (scale * (upstream - normal * along)).to(mixed.dtype)


def _mix_backward(saved: _Saved, grad_mixed: Tensor) -> _RetrievalGradients:
    """Gradients of states and of meta queries and meta keys, or of the weights of selected states, from dF̄."""
    states, weights, selected = saved.states, saved.weights, saved.selected
    assert states is not None
    if weights is not None and selected is not None:
        grad_states, grad_weights = top_k.gather_backward(states, weights, selected, grad_mixed)
        return _RetrievalGradients(grad_states, weights=grad_weights)
    assert saved.meta_query is not None
    assert saved.meta_key is not None
    assert saved.mixed is not None
    assert saved.mix_lse is not None
    grad_meta_query, grad_meta_key, grad_states = mix_backward(
        saved.meta_query, saved.meta_key, states, saved.mixed, saved.mix_lse, grad_mixed
    )
    return _RetrievalGradients(grad_states, grad_meta_query, grad_meta_key)


def attend(inputs: BSBRInputs, options: BSBROptions) -> Tensor:
    """`bsbr.backends.triton.attend` of inputs that are supported."""
    q, k, v, meta_query, meta_key, q_features, k_features, beta, gain = inputs
    chunk_size = min(options.chunk_size, q.shape[2])  # a longer chunk would launch programs for tokens that do not exist
    options = replace(options, chunk_size=chunk_size)
    retrievable = options.num_chunks(q.shape[2]) - 1
    pseudo = None
    if beta is not None:
        if q_features is None or k_features is None:
            q_features, k_features = unit_norm(q), unit_norm(k)
        chunked = [x[:, :, : retrievable * chunk_size].unflatten(2, (retrievable, chunk_size)) for x in (k_features, v, beta)]
        pseudo = pytorch.pseudo_values(*chunked).flatten(2, 3)
    given = [None if x is None else tiles.rows_contiguous(x) for x in (q, k, v, q_features, k_features, pseudo)]
    gain = None if gain is None else gain.contiguous()
    meta = [tiles.rows_contiguous(meta_query), tiles.rows_contiguous(meta_key)]
    if options.top_k is None or options.top_k >= retrievable:
        return cast(Tensor, BSBRFunction.apply(*given, gain, *meta, None, None, options))
    weights, selected = top_k.select(meta_query, meta_key, retrievable, options.top_k)
    return cast(Tensor, BSBRFunction.apply(*given, gain, None, None, weights, selected, options))
