"""Compiles the C++ library on first use and caches it for this processor."""

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

SOURCES = [Path(__file__).with_name(name) for name in ("bsbr.cpp", "tensors.h", "tiles.h")]
"""The compiled file, then its includes."""

FLAGS = ["-O2", "-march=native", "-std=c++17", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]


@functools.cache
def library() -> ctypes.CDLL | str:
    """Loads the compiled `bsbr.cpp`.

    The first call on a machine compiles it, which takes some seconds, with the compiler that CXX names, by default c++.

    Returns:
        The library; or, if it cannot be compiled or loaded, the reason as a sentence, after one RuntimeWarning.
    """
    try:
        return ctypes.CDLL(str(_build()))
    except OSError as error:
        problem = str(error)
    except subprocess.CalledProcessError as error:
        problem = f"{' '.join(error.cmd[:1])} failed: {(error.stderr.strip().splitlines() or ['it printed nothing'])[0]}"
    reason = f"the C++ backend is not available ({problem}); it needs a C++ compiler with OpenMP, which CXX names"
    warnings.warn(f"BSBR runs on the torch backend, several times slower: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def _build() -> Path:
    """Compiles the library unless it is cached for these sources and this processor; processes may call it at the same time."""
    compiler = os.environ.get("CXX", "c++")
    sources = [path.read_text() for path in SOURCES]
    identity = [*sources, compiler, *FLAGS, platform.machine(), torch.__version__, _processor_features()]
    name = f"bsbr-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bsbr"
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / name
            subprocess.run([compiler, *FLAGS, str(SOURCES[0]), "-o", str(built)], check=True, capture_output=True, text=True)
            built.replace(folder / name)
    return folder / name


def _processor_features() -> str:
    """The instruction sets that -march=native selects by. The cache folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
