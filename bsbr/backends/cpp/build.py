"""Compiles a C++ source on first use and caches the library for this processor."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import stat
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

INCLUDES = [Path(__file__).with_name(name) for name in ("tensors.h", "tiles.h", "vectors.h")]
"""What every source may include."""

FLAGS = ["-O2", "-march=native", "-std=c++17", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC", f"-I{Path(__file__).parent}"]


@functools.cache
def library(source: Path) -> ctypes.CDLL | str:
    """Loads the library compiled from `source`.

    The first call on a machine compiles it, which takes some seconds, with the compiler that CXX names, by default c++.

    Returns:
        The library; or, if it cannot be compiled or loaded, the reason as a sentence, after one RuntimeWarning.
    """
    try:
        return ctypes.CDLL(str(_build(source)))
    except OSError as error:
        problem = str(error)
    except subprocess.CalledProcessError as error:
        problem = f"{' '.join(error.cmd[:1])} failed: {(error.stderr.strip().splitlines() or ['it printed nothing'])[0]}"
    reason = f"the C++ backend is not available ({problem}); it needs a C++ compiler with OpenMP, which CXX names"
    warnings.warn(f"{source.stem} runs on the torch backend, several times slower: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def _build(source: Path) -> Path:
    """Compiles `source` unless it is cached as it is, for this processor; processes may call it at the same time."""
    compiler = os.environ.get("CXX", "c++")
    # A source's own headers are in a folder of its name; those of bsbr.cpp serve others too.
    parts = sorted({*source.with_suffix("").glob("*.h"), *Path(__file__).with_name("bsbr").glob("*.h")})
    texts = [path.read_text(encoding="utf-8") for path in (source, *parts, *INCLUDES)]
    identity = [*texts, compiler, *FLAGS[:-1], platform.machine(), torch.__version__, _processor_features()]
    name = f"{source.stem}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.so"
    folder = _cache_folder(name)
    if not (folder / name).exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / name
            subprocess.run([compiler, *FLAGS, str(source), "-o", str(built)], check=True, capture_output=True, text=True)
            built.replace(folder / name)
    return folder / name


def _cache_folder(name: str) -> Path:
    """Folder that holds the library `name`, or that can be written: in the user's cache, or else in the temporary folder."""
    caches = (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache"))  # noqa: PTH111  Path raises without a home
    folder = next((Path(cache) / "bsbr" for cache in caches if Path(cache).is_absolute()), None)
    if folder is not None:
        with contextlib.suppress(OSError):  # of another user, read-only, or a file
            if (folder / name).exists():
                return folder
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
    return _private_folder(Path(tempfile.gettempdir()) / f"bsbr-{os.getuid()}")


def _private_folder(folder: Path) -> Path:
    """Creates a folder that nobody else can write, since what lies in it is run. Raises OSError if somebody else could."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} is not a folder of this user alone")
    return folder


def _processor_features() -> str:
    """The instruction sets that -march=native selects by. The cache folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
