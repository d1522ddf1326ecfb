"""Selects the backend: the fastest one that can take the inputs, or the one that `impl` names and no other."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from bsbr.backends import pytorch, triton
from bsbr.backends.cpp import segment as cpp
from bsbr.backends.selection import check_impl, select
from bsbr.inputs import EMPTY_MEMORY, BSBRInputs, BSBROptions, ChunkMemory, ChunkRoom, Segment

BACKENDS: dict[str, Callable[[BSBRInputs, BSBROptions], str | None]] = {"triton": triton.unsupported, "cpp": cpp.unsupported}
"""The backends beside "torch", the fastest first, each with the reason why it cannot take some inputs, or None if it can."""


def select_backend(impl: str, inputs: BSBRInputs, options: BSBROptions) -> str:
    """Name of the backend that runs: "torch", "cpp" (CPUs) or "triton" (GPUs).

    Args:
        impl: a backend, or "auto" for the fastest that supports the inputs.
        inputs: the tensors; their dtypes, devices and sizes decide.
        options: see `BSBROptions`.

    Raises:
        ValueError: if there is no such backend.
        NotImplementedError: if `impl` names a backend that does not support the inputs.
    """
    check_impl(impl, *BACKENDS)
    return select(impl, {name: partial(unsupported, inputs, options) for name, unsupported in BACKENDS.items()})


def attend(impl: str, inputs: BSBRInputs, options: BSBROptions) -> Tensor:
    """BSBR of a whole sequence on the selected backend: [batch, heads, time, head_dim]. Arguments as `select_backend`."""
    backend = select_backend(impl, inputs, options)
    if backend == "triton":
        return triton.attend(inputs, options)
    retrievable = options.num_chunks(inputs.q.shape[2]) - 1
    inputs = inputs._replace(meta_key=inputs.meta_key[:, :, :retrievable])
    if backend == "cpp":
        return cpp.attend(inputs, options)
    return _segment(backend, inputs, options, EMPTY_MEMORY).output


def attend_segment(impl: str, inputs: BSBRInputs, options: BSBROptions, past: ChunkMemory) -> Segment:
    """BSBR of a segment after the chunks of `past`, see `bsbr.backends.pytorch.segment`, on the selected backend.

    If Triton is selected the torch backend runs, because the kernels do not support earlier chunks.
    """
    return _segment(select_backend(impl, inputs, options), inputs, options, past)


def attend_segment_in_room(impl: str, inputs: BSBRInputs, options: BSBROptions, room: ChunkRoom) -> Segment:
    """`attend_segment`, without gradients, after the chunks that are stored in `room`, where the segment's own chunks are added."""
    backend, new = select_backend(impl, inputs, options), inputs.meta_key.shape[2]
    room.meta_keys[:, :, room.filled : room.filled + new] = inputs.meta_key
    if backend == "cpp" and options.top_k is None:
        segment = cpp.segment_in_room(inputs, options, room)
    else:
        segment = _segment(backend, inputs, options, room.memory())
        room.states[:, :, room.filled : room.filled + new] = segment.states
    room.filled += new
    return segment


def _segment(backend: str, inputs: BSBRInputs, options: BSBROptions, past: ChunkMemory) -> Segment:
    run = cpp.segment if backend == "cpp" else pytorch.segment
    return run(inputs, options, past)
