"""Which implementation runs: the fastest that can take the input, or the one that was asked for and no other."""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from torch import Tensor

from bsbr.backends import triton
from bsbr.backends.cpp import operators

Impl = Literal["auto", "torch", "cpp", "triton"]


def select_backend(impl: Impl, *tensors: Tensor, gain: Tensor | None = None, dropout_p: float = 0.0) -> Impl:
    """torch (`bsbr.backends.pytorch`), native (`bsbr.backends.cpp.operators`, on a CPU) or triton (`bsbr.backends.triton`, on a GPU).

    tensors: q, k, v, r, h and, where they are given, φ(q), φ(k), as `bsbr_attention` takes them.
    Raises ValueError if there is no such implementation, NotImplementedError if it cannot take these tensors.
    """
    check_impl(impl)
    obstacles: dict[Impl, Callable[[Sequence[Tensor], Tensor | None, float], str | None]] = {
        "triton": _not_triton,
        "cpp": _not_native,
    }
    if impl == "auto":
        return next((one for one, obstacle in obstacles.items() if not obstacle(tensors, gain, dropout_p)), "torch")
    obstacle = obstacles[impl](tensors, gain, dropout_p) if impl in obstacles else None
    if obstacle:
        raise NotImplementedError(f"impl='{impl}' was asked for: {obstacle}; impl='torch' takes every input")
    return impl


def check_impl(impl: str) -> None:
    """Raises ValueError unless there is such an implementation."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")


def _not_triton(tensors: Sequence[Tensor], gain: Tensor | None, dropout_p: float) -> str | None:
    q_features, k_features = tensors[5:] or (None, None)
    q, k, v, r, h = tensors[:5]
    return triton.unsupported(q, k, v, r, h, q_features=q_features, k_features=k_features, gain=gain, dropout_p=dropout_p)


def _not_native(tensors: Sequence[Tensor], gain: Tensor | None, dropout_p: float) -> str | None:
    return operators.unsupported(*tensors, *([] if gain is None else [gain]), dropout_p=dropout_p)
