"""C++ functions of a source file: calls through ctypes, and torch operators over them.

A source includes tensors.h and exports, for each function and dtype, `<function>_<dtype>(sizes, tensors, scratch)` and
`<function>_scratch_<dtype>(sizes)`; the macro FUNCTION of tensors.h writes both.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsbr.backends.cpp.build import library
from bsbr.backends.selection import is_transformed

DTYPES = {torch.float32: "float32", torch.float64: "float64"}
"""The dtypes that a source is compiled for, and their names in its functions."""


class Kernels:
    """The C++ functions of one source file, compiled at first use, and the torch operators that call them.

    Torch's profiler shows the operators `torch.ops.<namespace>.*`, and torch's FLOP counter counts them. Each returns the number
    of floating point operations in the matrix products that it ran.

    Args:
        source: the C++ file.
        namespace: the namespace of its operators, unique to this source.
    """

    def __init__(self, source: Path, namespace: str) -> None:
        self.source = source
        self._library = torch.library.Library(namespace, "DEF")
        self._operators = getattr(torch.ops, namespace)
        self._names: list[str] = []

    def operator(self, signature: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
        """Registers a function as the operator with this signature; its results are tensors that the caller allocated.

        The operator raises ValueError for a result without contiguous rows, of which `call` would write a copy.
        """
        schema = torch._C.parse_schema(signature)
        written = [i for i, x in enumerate(schema.arguments) if x.alias_info is not None and x.alias_info.is_write]

        def register(function: Callable[..., int]) -> Callable[..., int]:
            def checked(*arguments: Any) -> int:
                for i in written:
                    x = arguments[i]
                    if x is not None and x.stride(-1) != 1:
                        raise ValueError(
                            f"{schema.name} writes {schema.arguments[i].name} in contiguous rows, got strides {x.stride()}; "
                            "pass a contiguous tensor"
                        )
                return function(*arguments)

            name = schema.name
            self._library.define(signature)
            self._library.impl(name, checked, "CPU")
            self._library.impl(name, lambda *_: 0, "Meta")  # tensors without data: nothing is computed
            self._names.append(name)
            return function

        return register

    def unsupported(self, *tensors: Tensor, dropout_p: float = 0.0) -> str | None:
        """Why the functions cannot take these tensors, as a sentence; None if they can. May compile the source."""
        dtypes = {x.dtype for x in tensors}
        if any(x.device.type != "cpu" for x in tensors):
            return f"the C++ backend runs on a CPU, got tensors on {tensors[0].device}"
        if len(dtypes) > 1 or not dtypes <= DTYPES.keys():
            return f"the C++ backend takes float32 or float64, got {', '.join(sorted(map(str, dtypes)))}"
        if dropout_p:
            return "the C++ backend has no dropout"
        if is_transformed():
            return "the C++ backend has no forward-mode derivatives and no rules for torch.func and torch.vmap"
        loaded = library(self.source)
        if isinstance(loaded, str):
            return loaded
        self._register_flop_formulas()
        return None

    def call(self, function: str, sizes: tuple[int, ...], *tensors: Tensor | None) -> int:
        """Calls a function, which writes to some of the tensors.

        Args:
            function: its name without the dtype.
            sizes: its structure of sizes, in order, without the last field, `threads`, which is torch's number of threads.
            tensors: its tensors in order, each [batch, heads, rows, dim] or with more dimensions that are contiguous after the
                rows, all of one dtype except indices; None for an optional tensor that is not given.

        Returns:
            Number of floating point operations in the matrix products that it ran.

        Raises:
            TypeError: if the tensors have several dtypes.
        """
        # Several microseconds, which count in decoding: one pass over the tensors, and no objects of classes.
        strided: list[int] = []  # `Tensor` of tensors.h for each: an address, and the strides of batch, head and row
        copies: list[Tensor] = []
        first = next(x for x in tensors if x is not None)
        for x in tensors:
            if x is None:
                strided += 0, 0, 0, 0
                continue
            if x.dtype is not first.dtype and x.dtype is not torch.int64:
                raise TypeError(f"{function} takes tensors of one dtype, got {first.dtype} and {x.dtype}; convert them first")
            if not x.numel():
                return 0
            if x.stride(-1) != 1:  # C++ takes any other strides
                copies.append(x := x.contiguous())
            strided += x.data_ptr(), *x.stride()[:3]
        threads = torch.get_num_threads()
        structure = (ctypes.c_int64 * (len(sizes) + 1))(*sizes, threads)
        compiled = self._function(function, DTYPES[first.dtype])
        scratch = first.new_empty(threads * compiled.scratch(structure))
        arguments = (ctypes.c_int64 * len(strided))(*strided)
        return int(compiled.run(structure, arguments, ctypes.c_void_p(scratch.data_ptr())))

    @functools.cache  # noqa: B019  instances are module globals
    def _function(self, function: str, dtype: str) -> "_Function":
        loaded = library(self.source)
        assert isinstance(loaded, ctypes.CDLL), loaded
        run, scratch = loaded[f"{function}_{dtype}"], loaded[f"{function}_scratch_{dtype}"]
        run.restype = scratch.restype = ctypes.c_int64
        return _Function(run, scratch)

    @functools.cache  # noqa: B019  instances are module globals
    def _register_flop_formulas(self) -> None:
        """Makes torch's FLOP counter count the operators."""
        # Late, because this module of torch imports Triton where it is installed.
        from torch.utils.flop_counter import register_flop_formula

        for name in self._names:
            register_flop_formula(getattr(self._operators, name), get_raw=True)(lambda *_, out_val, **__: out_val)


class _Function(NamedTuple):
    run: Any
    scratch: Any
