"""Which implementation runs: the fastest that can take the input, or the one that was asked for and no other."""

from typing import Literal, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "torch", "blocked", "triton"]


def choose(impl: Impl, q: Tensor, *, dropout_p: float) -> Impl:
    """torch (`bsbr.plain`), blocked (`bsbr.blocked`, on a CPU) or triton (`bsbr.kernels`, on a GPU), for inputs like q.

    Raises ValueError if there is no such implementation, NotImplementedError if it cannot take these inputs.
    """
    check(impl)
    if impl == "torch":
        return impl
    if impl == "auto":
        return next((one for one, why in (("triton", _not_triton), ("blocked", _not_blocked)) if not why(q, dropout_p)), "torch")
    obstacle = (_not_triton if impl == "triton" else _not_blocked)(q, dropout_p)
    if obstacle:
        raise NotImplementedError(f"impl='{impl}' {obstacle}; impl='torch' takes every input, 'auto' what is fastest for it")
    return impl


def check(impl: str) -> None:
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")


def _not_blocked(q: Tensor, dropout_p: float) -> str:
    if q.device.type != "cpu":
        return f"runs on a CPU only, got tensors on {q.device}"
    if q.dtype not in (torch.float32, torch.float64):
        return f"takes float32 and float64, got {q.dtype}"
    return "has no dropout" if dropout_p else ""


def _not_triton(q: Tensor, dropout_p: float) -> str:
    return "is not there yet"
