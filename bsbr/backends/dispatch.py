"""Selects the backend: the fastest one that can take the inputs, or the one that `impl` names and no other."""

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor

from bsbr.backends import pytorch, triton
from bsbr.backends.cpp import segment as cpp
from bsbr.inputs import EMPTY_MEMORY, BSBRInputs, BSBROptions, ChunkMemory, Segment

Impl = Literal["auto", "torch", "cpp", "triton"]
"""Values of the option `impl`: the name of a backend, or "auto" for the fastest that supports the inputs."""

_UNSUPPORTED: dict[Impl, Callable[[BSBRInputs, BSBROptions], str | None]] = {
    "triton": triton.unsupported,
    "cpp": cpp.unsupported,
}
"""Backends that do not support every input, the fastest first, each with a function that returns the reason, or None."""


def check_impl(impl: str) -> None:
    """Raises ValueError unless `impl` is one of `Impl`."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")


def select_backend(impl: Impl, inputs: BSBRInputs, options: BSBROptions) -> Impl:
    """Name of the backend that runs: "torch", "cpp" (CPUs) or "triton" (GPUs).

    Args:
        impl: a backend, or "auto" for the fastest that supports the inputs.
        inputs: the tensors; their dtypes, devices and sizes decide.
        options: see `BSBROptions`.

    Raises:
        ValueError: if there is no such backend.
        NotImplementedError: if `impl` names a backend that does not support the inputs.
    """
    check_impl(impl)
    if impl == "auto":
        return next((name for name, unsupported in _UNSUPPORTED.items() if not unsupported(inputs, options)), "torch")
    reason = _UNSUPPORTED[impl](inputs, options) if impl in _UNSUPPORTED else None
    if reason:
        raise NotImplementedError(f"impl='{impl}' was asked for: {reason}; impl='torch' takes every input")
    return impl


def attend(impl: Impl, inputs: BSBRInputs, options: BSBROptions) -> Tensor:
    """BSBR of a whole sequence on the selected backend: [batch, heads, time, head_dim]. Arguments as `select_backend`."""
    backend = select_backend(impl, inputs, options)
    if backend == "triton":
        return triton.attend(inputs, options)
    retrievable = options.num_chunks(inputs.q.shape[2]) - 1
    inputs = inputs._replace(meta_key=inputs.meta_key[:, :, :retrievable])
    return _segment(backend, inputs, options, EMPTY_MEMORY).output


def attend_segment(impl: Impl, inputs: BSBRInputs, options: BSBROptions, past: ChunkMemory) -> Segment:
    """BSBR of a segment after the chunks of `past`, see `bsbr.backends.pytorch.segment`, on the selected backend.

    If Triton is selected the torch backend runs, because the kernels do not support earlier chunks.
    """
    return _segment(select_backend(impl, inputs, options), inputs, options, past)


def _segment(backend: Impl, inputs: BSBRInputs, options: BSBROptions, past: ChunkMemory) -> Segment:
    run = cpp.segment if backend == "cpp" else pytorch.segment
    return run(inputs, options, past)
