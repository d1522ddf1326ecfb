"""What this machine is: the provenance of every number."""

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
from evals.paths import ROOT

SYSTEM = Path("/sys/devices/system/cpu")

Fact = str | int | float | bool | None

IDENTITY = ("processor", "torch", "device", "dtype", "threads")
"""The settings that decide how fast a machine can be: under the same ones, ceilings are the same."""

LIBRARIES = ("numpy", "triton")
"""Whose version can change a number, beside torch's own."""

SPEED_VARIABLES = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ONEDNN_", "DNNL_", "ATEN_", "MALLOC_", "LD_PRELOAD"),
    *("CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_", "PYTORCH_", "TORCH_", "TORCHINDUCTOR_", "TRITON_"),
)
"""Beginnings of the names of environment variables that change how fast threads, libraries or the allocator are."""


def processor_name(device: str) -> str:
    """The model name of what computes: two machines of one name are taken to be alike."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_cpuinfo().get('model name') or platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def provenance(device: str = "cpu") -> dict[str, Fact]:
    """One flat dict of JSON's types: software, host, processor, commit. None is what cannot be known here.

    device: cpu or cuda; what is said of the GPU is None for a measurement that has no part in one. `load_1m` is the load
    as this is called, before a measurement has added to it. Takes some 20 ms, most of them git's.
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
        "cpu_quota": _quota(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "virtual_machine": "hypervisor" in _cpuinfo()["flags"].split() if "flags" in _cpuinfo() else None,
        "governor": _of_all(SYSTEM.glob("cpu[0-9]*/cpufreq/scaling_governor")),
        "boost": _boost(),
        "smt": {"1": True, "0": False}.get(_text(SYSTEM / "smt/active") or ""),
        "huge_pages": _chosen(_text(Path("/sys/kernel/mm/transparent_hugepage/enabled"))),
        "load_1m": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "memory_bytes": psutil.virtual_memory().total,
        "environment": environment(os.environ.items()),
        **_gpu(device),
    }


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as the kernel writes them: 0,1,2,5 is 0-2,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def environment(variables: Iterable[tuple[str, str]]) -> str:
    """Those that change speed, in the order of their names: 'KMP_BLOCKTIME=0 OMP_NUM_THREADS=2'; empty if none is set."""
    return " ".join(f"{name}={value}" for name, value in sorted(variables) if name.startswith(SPEED_VARIABLES))


def _gpu(device: str) -> dict[str, Fact]:
    if device != "cuda":  # asking costs a CUDA context, half a gigabyte and half a second
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
    """The commit that is checked out here and whether a tracked file differs from it; None where git does not know."""
    if not (ROOT / ".git").exists():  # an archive was unpacked, perhaps inside a repository of something else
        return None, None
    # Without optional locks, a commit that is being made at the same moment is not disturbed.
    command = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=5).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):  # no git, a repository that it does not trust, or a disk that does not answer
        return None, None
    commits = [line.removeprefix("# branch.oid ") for line in lines if line.startswith("# branch.oid ")]
    known = bool(commits) and commits[0] != "(initial)"
    return commits[0] if known else None, any(not line.startswith("#") for line in lines)


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first core; empty elsewhere."""
    first = (_text(Path("/proc/cpuinfo")) or "").split("\n\n")[0]
    lines = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _quota() -> float | None:
    """Cores' worth of time that this process's control group may use; None if as much as there is, or unknown."""
    quota, _, period = (_text(Path("/sys/fs/cgroup/cpu.max")) or "").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _boost() -> bool | None:
    intel = _text(SYSTEM / "intel_pstate/no_turbo")
    if intel is not None:
        return intel == "0"
    return {"1": True, "0": False}.get(_text(SYSTEM / "cpufreq/boost") or "")


def _of_all(files: Iterable[Path]) -> str | None:
    """The different texts of files that should say the same; None if there is none."""
    return ",".join(sorted({text for text in map(_text, files) if text})) or None


def _chosen(options: str | None) -> str | None:
    """The one in brackets: 'always [madvise] never' says madvise."""
    return None if options is None or "[" not in options else options.partition("[")[2].partition("]")[0]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:  # this system has no such file, or does not show it
        return None
