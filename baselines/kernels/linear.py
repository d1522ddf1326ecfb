"""Linear attention in C++: the operators torch.ops.linear_attention.* over linear.cpp, and their differentiable composition."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsbr.backends.cpp.calls import Kernels
from bsbr.backends.cpp.differentiable import Differentiable

Outputs = Tensor | tuple[Tensor, ...]

KERNELS = Kernels(Path(__file__).with_name("linear.cpp"), "linear_attention")
"""The functions of linear.cpp."""


class Sizes(NamedTuple):
    """`Sizes` of linear.cpp."""

    batch: int
    heads: int
    kv_heads: int
    time: int
    chunk_size: int
    head_dim: int
    value_dim: int


@KERNELS.operator(
    "forward(Tensor q, Tensor k, Tensor v, Tensor? initial, Tensor(a!) out, Tensor(b!) normaliser, Tensor(c!)? final, "
    "Tensor epsilon, int chunk_size) -> int"
)
def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> int:
    """Writes the output, its normalisers [batch, heads, time, 1] and the state after the last token; see `attention`."""
    *tensors, chunk_size = rest
    return KERNELS.call("forward", _sizes(q, k, v, chunk_size), q, k, v, *tensors)


@KERNELS.operator(
    "backward(Tensor d_out, Tensor? d_final, Tensor q, Tensor k, Tensor v, Tensor? initial, Tensor out, Tensor normaliser, "
    "Tensor(a!) d_q, Tensor(b!) d_k, Tensor(c!) d_v, Tensor(d!)? d_initial, int chunk_size) -> int"
)
def _backward(d_out: Tensor, d_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> int:
    """Writes the gradients of q, k, v and initial."""
    *tensors, chunk_size = rest
    return KERNELS.call("backward", _sizes(q, k, v, chunk_size), d_out, d_final, q, k, v, *tensors)


def _sizes(q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> Sizes:
    batch, heads, time, head_dim = q.shape
    return Sizes(batch, heads, k.shape[1], time, chunk_size, head_dim, v.shape[3])


def attention(torch_form: Callable[..., Outputs], epsilon: float) -> Differentiable[Outputs]:
    """Linear attention f(q, k, v, initial, chunk_size), of tensors that `KERNELS` supports.

    It returns the output, or with a state `initial` [batch, kv_heads, head_dim, value_dim + 1] the output and the final state.

    Args:
        torch_form: the same function by torch operations.
        epsilon: added to the normalisers.
    """

    def forward(q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, chunk_size: int) -> tuple[Outputs, tuple[Tensor, ...]]:
        batch, heads, time, _ = q.shape
        out = q.new_empty(batch, time, heads, v.shape[3]).transpose(1, 2)  # joining the heads is then no copy
        normaliser = q.new_empty(batch, heads, time, 1)
        final = None if initial is None else torch.empty_like(initial, memory_format=torch.contiguous_format)
        torch.ops.linear_attention.forward(q, k, v, initial, out, normaliser, final, q.new_full((1, 1, 1, 1), epsilon), chunk_size)
        return out if final is None else (out, final), (out, normaliser)

    def backward(
        arguments: tuple[Tensor, Tensor, Tensor, Tensor | None, int], saved: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        *tensors, initial, chunk_size = arguments
        d_out, d_final = (*gradients, None)[:2]
        d_tensors = [x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in tensors]
        d_initial = None if initial is None else torch.empty_like(initial, memory_format=torch.contiguous_format)
        torch.ops.linear_attention.backward(d_out, d_final, *tensors, initial, *saved, *d_tensors, d_initial, chunk_size)
        return *d_tensors, d_initial, None

    return Differentiable(forward, backward, torch_form)
