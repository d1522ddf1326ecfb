"""Compiles the C++ kernels when they are first used, and keeps the library for this processor."""

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

SOURCE = Path(__file__).with_name("bsbr.cpp")
FLAGS = ["-O2", "-march=native", "-std=c++17", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]
TYPES = {torch.float32: "float32", torch.float64: "float64"}


@functools.cache
def library() -> ctypes.CDLL | str:
    """The compiled `bsbr.cpp`; where it cannot be had, why not, which is also said aloud, once."""
    try:
        return ctypes.CDLL(str(_build()))
    except OSError as error:
        problem = str(error)
    except subprocess.CalledProcessError as error:
        problem = f"{' '.join(error.cmd[:1])} failed: {(error.stderr.strip().splitlines() or ['it said nothing'])[0]}"
    reason = f"there is no native code ({problem}); a C++ compiler with OpenMP makes it, CXX names one"
    warnings.warn(f"BSBR runs in plain torch, several times slower: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def _build() -> Path:
    """Compiles unless this source was compiled for this processor before; safe beside other processes that do the same."""
    compiler = os.environ.get("CXX", "c++")
    identity = [SOURCE.read_text(), compiler, *FLAGS, platform.machine(), torch.__version__, _processor()]
    name = f"native-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bsbr"
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            built = Path(own) / name
            subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(built)], check=True, capture_output=True, text=True)
            built.replace(folder / name)
    return folder / name


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
