"""The gated attention unit in C++: operators torch.ops.gated_attention_unit.* over gau.cpp, and their composition."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsbr.backends.cpp.calls import Kernels
from bsbr.backends.cpp.differentiable import Differentiable

Outputs = Tensor | tuple[Tensor, ...]

KERNELS = Kernels(Path(__file__).with_name("gau.cpp"), "gated_attention_unit")
"""The functions of gau.cpp."""


class Sizes(NamedTuple):
    """`Sizes` of gau.cpp."""

    batch: int
    time: int
    chunk_size: int
    key_dim: int
    value_dim: int
    chunks_before: int


@KERNELS.operator(
    "forward(Tensor u, Tensor v, Tensor quad_q, Tensor quad_k, Tensor lin_q, Tensor lin_k, Tensor? past, Tensor(a!) out, "
    "Tensor(b!)? attended, Tensor(c!)? final, int chunk_size, int chunks_before) -> int"
)
def _forward(u: Tensor, v: Tensor, quad_q: Tensor, *rest: Any) -> int:
    """Writes the output, the output before the gate and the state after all complete chunks; see `attention`."""
    *tensors, chunk_size, chunks_before = rest
    return _call("forward", _sizes(u, quad_q, chunk_size, chunks_before), u, v, quad_q, *tensors)


@KERNELS.operator(
    "states(Tensor u, Tensor v, Tensor lin_q, Tensor lin_k, Tensor? past, Tensor d_out, Tensor? d_final, Tensor(a!) states, "
    "Tensor(b!)? d_past, int chunk_size, int chunks_before) -> int"
)
def _states(u: Tensor, v: Tensor, lin_q: Tensor, *rest: Any) -> int:
    """Writes the state before each chunk, and the gradient of the state after it, to `states` [batch, 2, chunks, state]."""
    *tensors, chunk_size, chunks_before = rest
    return _call("states", _sizes(u, lin_q, chunk_size, chunks_before), u, v, lin_q, *tensors)


@KERNELS.operator(
    "backward(Tensor u, Tensor v, Tensor quad_q, Tensor quad_k, Tensor lin_k, Tensor? past, Tensor attended, Tensor d_out, "
    "Tensor? d_final, Tensor states, Tensor(a!) d_u, Tensor(b!) d_v, Tensor(c!) d_quad_q, Tensor(d!) d_quad_k, Tensor(e!) d_lin_q, "
    "Tensor(f!) d_lin_k, int chunk_size, int chunks_before) -> int"
)
def _backward(u: Tensor, v: Tensor, quad_q: Tensor, *rest: Any) -> int:
    """Writes the gradients of all tokens, from the `states` of the operator of that name."""
    *tensors, chunk_size, chunks_before = rest
    return _call("backward", _sizes(u, quad_q, chunk_size, chunks_before), u, v, quad_q, *tensors)


def _sizes(u: Tensor, queries: Tensor, chunk_size: int, chunks_before: int) -> Sizes:
    batch, time, value_dim = u.shape
    return Sizes(batch, time, chunk_size, queries.shape[2], value_dim, chunks_before)


def _call(function: str, sizes: Sizes, *tensors: Tensor | None) -> int:
    """Calls a function with tensors [batch, time, dim], which C++ takes as those of one head."""
    return KERNELS.call(function, sizes, *(x.unsqueeze(1) if x is not None and x.dim() == 3 else x for x in tensors))


def attention(torch_form: Callable[..., Outputs]) -> Differentiable[Outputs]:
    """Gated attention f(u, v, quad_q, quad_k, lin_q, lin_k, past, chunk_size, chunks_before, differentiated), of tensors that
    `KERNELS` supports.

    It returns the output, or with a state `past` [batch, key_dim, value_dim] the output and the state after all complete chunks.
    If `differentiated`, the output before the gate is kept for the gradients.

    Args:
        torch_form: the same function by torch operations.
    """

    def forward(*arguments: Any) -> tuple[Outputs, tuple[Tensor, ...]]:
        u, *tensors, past, chunk_size, chunks_before, differentiated = arguments
        out, attended = _empty(u), _empty(u) if differentiated else None
        final = None if past is None else _empty(past)
        torch.ops.gated_attention_unit.forward(u, *tensors, past, out, attended, final, chunk_size, chunks_before)
        return out if final is None else (out, final), () if attended is None else (attended,)

    def backward(arguments: tuple[Any, ...], saved: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        u, v, quad_q, quad_k, lin_q, lin_k, past, *options, _ = arguments
        d_out, d_final = (*gradients, None)[:2]
        d_past = None if past is None else _empty(past)
        d_tensors = [_empty(x) for x in (u, v, quad_q, quad_k, lin_q, lin_k)]
        states = u.new_empty(u.shape[0], 2, -(-u.shape[1] // options[0]), lin_q.shape[2] * u.shape[2])
        torch.ops.gated_attention_unit.states(u, v, lin_q, lin_k, past, d_out, d_final, states, d_past, *options)
        given = u, v, quad_q, quad_k, lin_k, past, *saved, d_out, d_final, states
        torch.ops.gated_attention_unit.backward(*given, *d_tensors, *options)
        return *d_tensors, d_past, None, None, None

    return Differentiable(forward, backward, torch_form)


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
