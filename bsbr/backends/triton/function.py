"""The steps as one differentiable function: what one kernel leaves for another never passes through autograd."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bsbr.backends import pytorch
from bsbr.backends.pytorch import norm_factors, unit_norm
from bsbr.backends.triton import tiles, top_k
from bsbr.backends.triton.mixing import mix, mix_backward
from bsbr.backends.triton.output import output
from bsbr.backends.triton.output_backward import keys_backward, queries_backward
from bsbr.backends.triton.states import chunk_states


class Options(NamedTuple):
    chunk_size: int
    chunk_overlap: int
    normalise: bool


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
        corrected: Tensor | None,
        gain: Tensor | None,
        r: Tensor | None,
        h: Tensor | None,
        weights: Tensor | None,
        chosen: Tensor | None,
        options: Options,
    ) -> Tensor:
        chunks = -(-q.shape[2] // options.chunk_size) - 1  # those that can be retrieved
        unit = q_features is None or k_features is None
        phi_q, phi_k = (q, k) if q_features is None or k_features is None else (q_features, k_features)
        states = mixed = retrieved = mix_lse = None
        with torch.cuda.device_of(q):
            if chunks:
                values = v if corrected is None else corrected
                states = chunk_states(phi_k, values, first=0, chunks=chunks, chunk_size=options.chunk_size, unit=unit)
                if r is not None and h is not None:
                    mixed, mix_lse = mix(r, h, states)
                elif weights is not None and chosen is not None:
                    mixed = top_k.gather(states, weights, chosen)
                assert mixed is not None
                retrieved = (mixed * norm_factors(mixed)).to(mixed.dtype) if options.normalise else mixed
            sizes = {"chunk_size": options.chunk_size, "chunk_overlap": options.chunk_overlap}
            out, lse = output(q, k, v, phi_q, retrieved, gain, **sizes, unit=unit)
        ctx.save_for_backward(q, k, v, q_features, k_features, corrected, gain, r, h, weights, chosen, states, mixed, mix_lse, lse)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, q_features, k_features, corrected, gain, r, h, weights, chosen, states, mixed, mix_lse, lse = ctx.saved_tensors
        options: Options = ctx.options
        unit = q_features is None
        phi_q, phi_k = (q, k) if unit else (q_features, k_features)
        grad = tiles.rows_contiguous(grad)
        grad_r = grad_h = grad_weights = grad_states = grad_corrected = None
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
                if chosen is None:
                    grad_r, grad_h, grad_states = mix_backward(r, h, states, mixed, mix_lse, grad_mixed)
                else:
                    grad_states, grad_weights = top_k.gather_backward(states, weights, chosen, grad_mixed)
                del grad_mixed
            sizes = {"chunk_size": size, "chunk_overlap": options.chunk_overlap}
            grad_q, grad_q_features, grad_gain, delta = queries_backward(
                q, k, v, phi_q, retrieved, gain, grad, lse, **sizes, unit=unit
            )
            of_v = None if corrected is not None else grad_states
            grad_k, grad_v, grad_k_features = keys_backward(q, k, v, phi_k, of_v, grad, lse, delta, **sizes, unit=unit)
            if corrected is not None and grad_states is not None:
                assert grad_k_features is not None  # where there is U, there are features
                tokens, shape = corrected.shape[2], (grad_states.shape[2], size)
                grad_k_features[:, :, :tokens] = (corrected.unflatten(2, shape) @ grad_states.mT).flatten(2, 3)
                grad_corrected = (phi_k[:, :, :tokens].unflatten(2, shape) @ grad_states).flatten(2, 3)
        return (
            *(grad_q, grad_k, grad_v, grad_q_features, grad_k_features, grad_corrected, grad_gain),
            *(grad_r, grad_h, grad_weights, None, None),
        )


def bsbr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    h: Tensor,
    *,
    chunk_size: int,
    q_features: Tensor | None,
    k_features: Tensor | None,
    beta: Tensor | None,
    gain: Tensor | None,
    chunk_overlap: int,
    kept: int | None,
    normalise: bool,
) -> Tensor:
    """`bsbr.backends.triton.bsbr_attention` on arguments that were checked."""
    chunk_size = min(chunk_size, q.shape[2])  # no programs for tokens that there are not
    chunks = -(-q.shape[2] // chunk_size) - 1
    corrected = None
    if beta is not None:
        if q_features is None or k_features is None:
            q_features, k_features = unit_norm(q), unit_norm(k)
        stored = [x[:, :, : chunks * chunk_size].unflatten(2, (chunks, chunk_size)) for x in (k_features, v, beta)]
        corrected = pytorch.pseudo_values(*stored).flatten(2, 3)
    given = [None if x is None else tiles.rows_contiguous(x) for x in (q, k, v, q_features, k_features, corrected)]
    gain = None if gain is None else gain.contiguous()
    ways: tuple[Tensor | None, ...] = (tiles.rows_contiguous(r), tiles.rows_contiguous(h), None, None)
    if kept is not None and kept < chunks:
        ways = (None, None, *top_k.select(r, h, chunks, kept))
    out: Tensor = BSBRFunction.apply(*given, gain, *ways, Options(chunk_size, chunk_overlap, normalise))
    return out
