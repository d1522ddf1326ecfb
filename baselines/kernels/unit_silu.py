"""Queries and keys of DeltaNet in C++: SiLU and the scaling to unit norm in one pass over memory instead of five."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.kernels.recurrent import unit_norm
from bsbr.backends.cpp.calls import Kernels
from bsbr.backends.cpp.differentiable import Differentiable

KERNELS = Kernels(Path(__file__).with_name("unit_silu.cpp"), "unit_silu")
"""The functions of unit_silu.cpp."""


class _Sizes(NamedTuple):
    """`Sizes` of unit_silu.cpp."""

    batch: int
    heads: int
    time: int
    dim: int


def unit_silu(x: Tensor, impl: str) -> Tensor:
    """silu(x) / ‖silu(x)‖ over the last dimension, and 0 where x is 0; differentiable.

    Args:
        x: [batch, heads, time, dim].
        impl: that of the attention; C++ runs if it is "auto" or "cpp" and x is supported, or else torch.

    Returns:
        The shape of x.
    """
    return (_cpp if impl in ("auto", "cpp") and KERNELS.unsupported(x) is None else _torch_form)(x)


def _torch_form(x: Tensor) -> Tensor:
    return unit_norm(F.silu(x))


@KERNELS.operator("forward(Tensor x, Tensor(a!) out) -> int")
def _operator(x: Tensor, out: Tensor) -> int:
    """Writes the value."""
    return KERNELS.call("forward", _Sizes(*x.shape), x, out)


@KERNELS.operator("backward(Tensor d_out, Tensor x, Tensor(a!) d_x) -> int")
def _backward_operator(d_out: Tensor, x: Tensor, d_x: Tensor) -> int:
    """Writes the gradient."""
    return KERNELS.call("backward", _Sizes(*x.shape), d_out, x, d_x)


def _forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = _empty_like_heads(x)
    torch.ops.unit_silu.forward(x, out)
    return out, ()


def _backward(arguments: tuple[Any, ...], saved: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    d_x = _empty_like_heads(arguments[0])
    torch.ops.unit_silu.backward(*gradients, *arguments, d_x)
    return (d_x,)


def _empty_like_heads(x: Tensor) -> Tensor:
    """Uninitialised, stored as [batch, time, heads · dim], the layout of projections."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


_cpp = Differentiable(_forward, _backward, _torch_form)
