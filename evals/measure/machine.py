"""Provenance of every number: software, hardware and commit of this machine."""

import functools
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import psutil
import torch

from evals.measure.cuda_state import driver_version
from evals.measure.limits import cpu_quota, kernel_file, memory_limit_bytes
from evals.paths import ROOT

SYSTEM = Path("/sys/devices/system/cpu")

Fact = str | int | float | bool | None

IDENTITY = ("processor", "torch", "device", "dtype", "threads")
"""The settings that decide how fast a machine can be. Machines that agree in them have the same peaks."""

LIBRARIES = ("numpy", "triton")
"""Libraries besides torch whose version can change a number."""

SPEED_VARIABLES = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ONEDNN_", "DNNL_", "ATEN_", "MALLOC_", "LD_PRELOAD"),
    *("CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_", "PYTORCH_", "TORCH_", "TORCHINDUCTOR_", "TRITON_"),
)
"""Prefixes of environment variables that change the speed of threads, libraries or the allocator."""


def processor_name(device: str) -> str:
    """Model name of the processor that computes on a device (cpu or cuda). Machines with the same name count as equal."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_cpuinfo().get('model name') or platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def provenance(device: str = "cpu") -> dict[str, Fact]:
    """Software, host, processor and commit as one flat dict of JSON types; None for a fact that is unknown here.

    `load_1m` is the load at the time of the call, before a measurement adds to it. Takes some 20 ms, most of them for git.
    Facts about the GPU are None for a measurement on the CPU.
    """
    commit, dirty = _commit()
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "host": platform.node() or None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in LIBRARIES},
        "commit": commit,
        "dirty": dirty,
        "cpu": processor_name("cpu"),
        "cores": os.cpu_count(),
        "physical_cores": psutil.cpu_count(logical=False),
        "affinity": None if affinity is None else ranges(affinity),
        "threads_available": os.cpu_count() if affinity is None else len(affinity),
        "cpu_quota": cpu_quota(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "virtual_machine": "hypervisor" in _cpuinfo()["flags"].split() if "flags" in _cpuinfo() else None,
        "governor": _distinct(SYSTEM.glob("cpu[0-9]*/cpufreq/scaling_governor")),
        "boost": _boost(),
        "smt": {"1": True, "0": False}.get(kernel_file(SYSTEM / "smt/active") or ""),
        "huge_pages": _selected(kernel_file(Path("/sys/kernel/mm/transparent_hugepage/enabled"))),
        "load_1m": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "memory_bytes": psutil.virtual_memory().total,
        "memory_limit_bytes": memory_limit_bytes(),
        "environment": environment(os.environ.items()),
        **_gpu(device),
    }


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers in the kernel's notation: 0,1,2,5 becomes 0-2,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def environment(variables: Iterable[tuple[str, str]]) -> str:
    """The variables that change speed, sorted by name: 'KMP_BLOCKTIME=0 OMP_NUM_THREADS=2'; empty if none is set."""
    return " ".join(f"{name}={value}" for name, value in sorted(variables) if name.startswith(SPEED_VARIABLES))


def _gpu(device: str) -> dict[str, Fact]:
    if device != "cuda":  # a query creates a CUDA context: half a gigabyte and half a second
        return dict.fromkeys(
            ("gpu", "gpu_driver", "gpu_capability", "gpu_memory_bytes", "gpu_processors", "gpu_l2_bytes", "cuda", "cudnn")
        )
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "gpu_driver": driver_version(),
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_memory_bytes": properties.total_memory,
        "gpu_processors": properties.multi_processor_count,
        "gpu_l2_bytes": properties.L2_cache_size or None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _commit() -> tuple[str | None, bool | None]:
    """The commit that is checked out, and whether a tracked file differs from it; None if git does not know."""
    if not (ROOT / ".git").exists():  # unpacked from an archive, perhaps inside another repository
        return None, None
    # Optional locks could disturb a commit that is made at the same moment.
    command = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=5).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):  # no git, an untrusted repository, or a disk that hangs
        return None, None
    commits = [line.removeprefix("# branch.oid ") for line in lines if line.startswith("# branch.oid ")]
    known = bool(commits) and commits[0] != "(initial)"
    return commits[0] if known else None, any(not line.startswith("#") for line in lines)


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """Facts about the first core; empty outside Linux."""
    first = (kernel_file(Path("/proc/cpuinfo")) or "").split("\n\n")[0]
    lines = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _boost() -> bool | None:
    intel = kernel_file(SYSTEM / "intel_pstate/no_turbo")
    if intel is not None:
        return intel == "0"
    return {"1": True, "0": False}.get(kernel_file(SYSTEM / "cpufreq/boost") or "")


def _distinct(files: Iterable[Path]) -> str | None:
    """The distinct contents of files that should all be equal; None if there is no file."""
    return ",".join(sorted({text for text in map(kernel_file, files) if text})) or None


def _selected(options: str | None) -> str | None:
    """The option in brackets: madvise from 'always [madvise] never'."""
    return None if options is None or "[" not in options else options.partition("[")[2].partition("]")[0]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
