"""Calls into the C++ library through ctypes: descriptions of tensors, sizes, and scratch memory for each thread."""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from bsbr.backends.cpp.build import library

DTYPES = {torch.float32: "float32", torch.float64: "float64"}
"""The dtypes that the library is compiled for, and their names in its functions."""


class ChunkSizes(ctypes.Structure):
    """`ChunkSizes` of tensors.h: sizes of a function that works on tokens, chunk by chunk."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("batch", "heads", "kv_heads", "time", "before", "chunk_size", "overlap", "chunks", "head_dim", "features"),
            *("unit_norm", "threads"),
        )
    ]


class RetrievalSizes(ctypes.Structure):
    """`RetrievalSizes` of tensors.h: sizes of a function that works on scores and states of chunks."""

    _fields_ = [
        (name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "rows", "chunks", "seen", "size", "add", "threads")
    ]


class FeatureSizes(ctypes.Structure):
    """`FeatureSizes` of tensors.h: sizes of a function that makes features of tokens."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "heads", "time", "factors", "size", "threads")]


class _Strided(ctypes.Structure):
    """`Tensor` of tensors.h: an address, and strides in elements of batch, head and row."""

    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("head", ctypes.c_int64), ("row", ctypes.c_int64)]


def unsupported(*tensors: Tensor, dropout_p: float = 0.0) -> str | None:
    """Why the C++ backend cannot take these tensors, as a sentence; None if it can."""
    dtypes = {x.dtype for x in tensors}
    if any(x.device.type != "cpu" for x in tensors):
        return f"the C++ backend runs on a CPU, got tensors on {tensors[0].device}"
    if len(dtypes) > 1 or not dtypes <= DTYPES.keys():
        return f"the C++ backend takes float32 or float64, got {', '.join(sorted(map(str, dtypes)))}"
    if dropout_p:
        return "the C++ backend has no dropout"
    loaded = library()
    return loaded if isinstance(loaded, str) else None


def call(function: str, sizes: ChunkSizes | RetrievalSizes | FeatureSizes, *tensors: Tensor | None) -> int:
    """Calls a function of the library, which writes to some of the tensors.

    Args:
        function: its name without the dtype.
        sizes: its sizes except `threads`, which is set here.
        tensors: its tensors in order, all of one dtype except indices; None for an optional tensor that is not given.

    Returns:
        Number of floating point operations in the matrix products that it ran.
    """
    given = [x for x in tensors if x is not None]
    if not all(x.numel() for x in given):
        return 0
    dtype = DTYPES[given[0].dtype]
    sizes.threads = torch.get_num_threads()
    # The library takes any strides but that of the last dimension. Tensors that are written have contiguous rows already.
    rows = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]
    strided = (_Strided * len(rows))(*[_Strided() if x is None else _Strided(x.data_ptr(), *x.stride()[:3]) for x in rows])
    scratch = given[0].new_empty(sizes.threads * _function(f"{function}_scratch_{dtype}")(ctypes.byref(sizes)))
    return int(_function(f"{function}_{dtype}")(ctypes.byref(sizes), strided, ctypes.c_void_p(scratch.data_ptr())))


@functools.cache
def _function(name: str) -> Any:
    loaded = library()
    assert isinstance(loaded, ctypes.CDLL), loaded
    function = loaded[name]
    function.restype = ctypes.c_int64
    return function
