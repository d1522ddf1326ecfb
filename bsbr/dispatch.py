"""Which implementation runs: the fastest that can take the input, or the one that was asked for and no other."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from bsbr import kernels

Impl = Literal["auto", "torch", "blocked", "triton"]


def choose(impl: Impl, *tensors: Tensor, gain: Tensor | None = None, dropout_p: float = 0.0) -> Impl:
    """torch (`bsbr.plain`), blocked (`bsbr.blocked`, on a CPU) or triton (`bsbr.kernels`, on a GPU).

    tensors: q, k, v, r, h and, where they are given, φ(q), φ(k), as `bsbr_attention` takes them.
    Raises ValueError if there is no such implementation, NotImplementedError if it cannot take these tensors.
    """
    check(impl)
    obstacles = {"triton": _not_triton, "blocked": _not_blocked}
    if impl == "auto":
        chunks = tensors[3].shape[2]
        able = (one for one, least in WORTHWHILE.items() if chunks >= least and not obstacles[one](tensors, gain, dropout_p))
        return next(able, "torch")
    obstacle = obstacles[impl](tensors, gain, dropout_p) if impl in obstacles else None
    if obstacle:
        raise NotImplementedError(f"impl='{impl}' was asked for: {obstacle}; impl='torch' takes every input")
    return impl


WORTHWHILE: dict[Impl, int] = {"triton": 1, "blocked": 2}
"""From how many chunks on, the fastest first. A single one is one operation in plain torch, and 1.3 to 1.8 times as fast
there. A rule by size would find the turning point better, but a certificate, whose sequences are short, would then be of the
other implementation.
"""


def check(impl: str) -> None:
    """Raises ValueError unless there is such an implementation."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")


def _not_triton(tensors: Sequence[Tensor], gain: Tensor | None, dropout_p: float) -> str | None:
    q_features, k_features = tensors[5:] or (None, None)
    q, k, v, r, h = tensors[:5]
    return kernels.unsupported(q, k, v, r, h, q_features=q_features, k_features=k_features, gain=gain, dropout_p=dropout_p)


def _not_blocked(tensors: Sequence[Tensor], gain: Tensor | None, dropout_p: float) -> str | None:
    types = {x.dtype for x in (*tensors, *([] if gain is None else [gain]))}
    if any(x.device.type != "cpu" for x in tensors):
        return f"blocks are for a CPU, got tensors on {tensors[0].device}"
    if types not in ({torch.float32}, {torch.float64}):
        return f"blocks take float32 or float64, got {', '.join(sorted(map(str, types)))}"
    return "blocks have no dropout" if dropout_p else None
