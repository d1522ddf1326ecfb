"""The steps as one differentiable function: what one kernel leaves for another never passes through autograd."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bsbr.kernels import tiles, top_k
from bsbr.kernels.mixing import mix, mix_backward
from bsbr.kernels.output import output
from bsbr.kernels.output_backward import keys_backward, queries_backward
from bsbr.kernels.states import chunk_states


class Options(NamedTuple):
    chunk_size: int
    chunk_overlap: int


class BSBRFunction(torch.autograd.Function):
    """q, k, v, φ(q), φ(k) (None: unit norm), gain, then either r, h or the weights and states that `top_k.select` chose.

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
        states = retrieved = mix_lse = None
        with torch.cuda.device_of(q):
            if chunks:
                states = chunk_states(phi_k, v, first=0, chunks=chunks, chunk_size=options.chunk_size, unit=unit)
                if r is not None and h is not None:
                    retrieved, mix_lse = mix(r, h, states)
                elif weights is not None and chosen is not None:
                    retrieved = top_k.gather(states, weights, chosen)
            out, lse = output(q, k, v, phi_q, retrieved, gain, **options._asdict(), unit=unit)
        ctx.save_for_backward(q, k, v, q_features, k_features, gain, r, h, weights, chosen, states, retrieved, mix_lse, lse)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, q_features, k_features, gain, r, h, weights, chosen, states, retrieved, mix_lse, lse = ctx.saved_tensors
        options: Options = ctx.options
        unit = q_features is None
        phi_q, phi_k = (q, k) if unit else (q_features, k_features)
        grad = tiles.rows_contiguous(grad)
        grad_r = grad_h = grad_weights = grad_states = None
        with torch.cuda.device_of(q):
            if states is not None:
                # dF̄ of a chunk is the state of φ(q) and do: gathered by the same kernel.
                grad_retrieved = chunk_states(
                    phi_q, grad, first=1, chunks=states.shape[2], chunk_size=options.chunk_size, unit=unit, gain=gain
                )
                if chosen is None:
                    grad_r, grad_h, grad_states = mix_backward(r, h, states, retrieved, mix_lse, grad_retrieved)
                else:
                    grad_states, grad_weights = top_k.gather_backward(states, weights, chosen, grad_retrieved)
                del grad_retrieved
            grad_q, grad_q_features, grad_gain, delta = queries_backward(
                q, k, v, phi_q, retrieved, gain, grad, lse, **options._asdict(), unit=unit
            )
            grad_k, grad_v, grad_k_features = keys_backward(
                q, k, v, phi_k, grad_states, grad, lse, delta, **options._asdict(), unit=unit
            )
        return (
            *(grad_q, grad_k, grad_v, grad_q_features, grad_k_features, grad_gain),
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
    gain: Tensor | None,
    chunk_overlap: int,
    kept: int | None,
) -> Tensor:
    """`bsbr.kernels.bsbr_attention` on arguments that were checked."""
    chunk_size = min(chunk_size, q.shape[2])  # no programs for tokens that there are not
    chunks = -(-q.shape[2] // chunk_size) - 1
    given = [None if x is None else tiles.rows_contiguous(x) for x in (q, k, v, q_features, k_features)]
    gain = None if gain is None else gain.contiguous()
    ways: tuple[Tensor | None, ...] = (tiles.rows_contiguous(r), tiles.rows_contiguous(h), None, None)
    if kept is not None and kept < chunks:
        ways = (None, None, *top_k.select(r, h, chunks, kept))
    out: Tensor = BSBRFunction.apply(*given, gain, *ways, Options(chunk_size, chunk_overlap))
    return out
