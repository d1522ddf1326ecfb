"""The steps as one differentiable function: what one kernel leaves for another never passes through autograd."""

from dataclasses import replace
from typing import Any, cast

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


class BSBRFunction(torch.autograd.Function):
    """q, k, v, φ(q), φ(k) (None: unit norm), U, gain, then either r, h or the weights and states that `top_k.select` chose.

    U [batch, kv_heads, (C - 1)·chunk_size, head_dim], which needs features, is what the states hold in place of v.
    Kept for the backward: the inputs, F and F̄ (n/chunk_size · d_r · head_dim numbers a head each, in the inputs' type) and two
    logs of sums; not o. F and F̄ in the inputs' type, because rounding them is the same order of error as rounding o, which is
    made of them, and float32 would double the traffic between the kernels; sums are float32 inside each kernel.
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
        chunks = -(-q.shape[2] // options.chunk_size) - 1  # those that can be retrieved
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
        ctx.save_for_backward(
            q, k, v, q_features, k_features, pseudo, gain, meta_query, meta_key, weights, selected, states, mixed, mix_lse, lse
        )
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, q_features, k_features, pseudo, gain, meta_query, meta_key, weights, selected, states, mixed, mix_lse, lse = (
            ctx.saved_tensors
        )
        options: BSBROptions = ctx.options
        unit = q_features is None
        phi_q, phi_k = (q, k) if unit else (q_features, k_features)
        grad = tiles.rows_contiguous(grad)
        grad_meta_query = grad_meta_key = grad_weights = grad_states = grad_pseudo = None
        retrieved, size = mixed, options.chunk_size
        with torch.cuda.device_of(q):
            if states is not None:
                # dF̄ of a chunk is the state of φ(q) and do: gathered by the same kernel.
                grad_mixed = chunk_states(phi_q, grad, first=1, chunks=states.shape[2], chunk_size=size, unit=unit, gain=gain)
                if options.normalise:
                    # Of y = s x, s = √d (|x|² + ε)^-1/2: dx = s (dy − y (y·dy)/d).
                    scale, upstream = norm_factors(mixed), grad_mixed.float()
                    normal = mixed.float() * scale
                    along = (normal * upstream).sum(dim=(-2, -1), keepdim=True) / mixed.shape[-1]
                    retrieved, grad_mixed = normal.to(mixed.dtype), (scale * (upstream - normal * along)).to(mixed.dtype)
                    del normal, upstream
                if selected is None:
                    grad_meta_query, grad_meta_key, grad_states = mix_backward(
                        meta_query, meta_key, states, mixed, mix_lse, grad_mixed
                    )
                else:
                    grad_states, grad_weights = top_k.gather_backward(states, weights, selected, grad_mixed)
                del grad_mixed
            sizes = {"chunk_size": size, "chunk_overlap": options.chunk_overlap}
            grad_q, grad_q_features, grad_gain, delta = queries_backward(
                q, k, v, phi_q, retrieved, gain, grad, lse, **sizes, unit=unit
            )
            of_v = None if pseudo is not None else grad_states
            grad_k, grad_v, grad_k_features = keys_backward(q, k, v, phi_k, of_v, grad, lse, delta, **sizes, unit=unit)
            if pseudo is not None and grad_states is not None:
                assert grad_k_features is not None  # where there is U, there are features
                tokens, shape = pseudo.shape[2], (grad_states.shape[2], size)
                grad_k_features[:, :, :tokens] = (pseudo.unflatten(2, shape) @ grad_states.mT).flatten(2, 3)
                grad_pseudo = (phi_k[:, :, :tokens].unflatten(2, shape) @ grad_states).flatten(2, 3)
        return (
            *(grad_q, grad_k, grad_v, grad_q_features, grad_k_features, grad_pseudo, grad_gain),
            *(grad_meta_query, grad_meta_key, grad_weights, None, None),
        )


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
