"""Limits of memory and processor time that this process was given: resource limits, and control groups of both versions.

A control group limits all groups inside it, so the limits of every group on the way to the root count.
"""

import math
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

UNLIMITED_BYTES = 2**60
"""Version 1 writes no limit as the largest multiple of a page below 2⁶³."""


def memory_limit_bytes(root: Path = Path("/")) -> int | None:
    """The least limit of memory that was set for this process or a group around it; None if there is none.

    Args:
        root: folder with the files /proc and /sys of the kernel.
    """
    limits = [limit for limit, _ in _memory(root)] + [limit for limit, _ in _resource_limits()]
    return min(limits, default=None)


def memory_left_bytes(root: Path = Path("/")) -> float:
    """Memory that this process can take before it reaches a limit; infinite if there is none."""
    left = [limit - used for limit, used in (*_memory(root), *_resource_limits())]
    return max(0, min(left, default=math.inf))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Number of cores whose time this process and the groups around it may use; None if it is not limited."""
    quotas = []
    for folder in _control_groups(root):
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if (limit := kernel_file(folder / "cpu.max")) is not None:
            quota, period = (int(text) if text.isdigit() else None for text in limit.split())
        if quota is not None and period is not None and quota > 0:  # version 1 writes -1 for no limit
            quotas.append(quota / period)
    return min(quotas, default=None)


def _resource_limits() -> Iterator[tuple[int, int]]:
    """Limits of this process's memory as set by setrlimit, with what counts against each, in bytes."""
    memory = psutil.Process().memory_info()
    # Of a virtual address space, most is reserved and never used; a limit of it is a limit all the same.
    for kind, used in ((resource.RLIMIT_DATA, getattr(memory, "data", 0)), (resource.RLIMIT_AS, memory.vms)):
        limit = min((limit for limit in resource.getrlimit(kind) if limit != resource.RLIM_INFINITY), default=None)
        if limit is not None:
            yield limit, used


def _memory(root: Path) -> Iterator[tuple[int, int]]:
    """Limits of memory of the control groups around this process, with what each group holds, in bytes.

    The kernel takes back pages of files that were not read lately before it refuses memory, so they do not count.
    """
    versions = (
        (("memory.max", "memory.high"), "memory.current", "inactive_file"),
        (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    )
    for folder in _control_groups(root):
        for limits, current, reclaimable in versions:
            statistics = dict(line.split() for line in (kernel_file(folder / "memory.stat") or "").splitlines())
            held = max(0, (_number(folder / current) or 0) - int(statistics.get(reclaimable, 0)))
            for limit in (_number(folder / name) for name in limits):
                if limit is not None and limit < UNLIMITED_BYTES:
                    yield limit, held


def _control_groups(root: Path) -> Iterator[Path]:
    """Folders of this process's control groups, and of the groups around them, in every hierarchy."""
    memberships = [line.split(":", 2) for line in (kernel_file(root / "proc/self/cgroup") or "").splitlines()]
    for line in (kernel_file(root / "proc/self/mountinfo") or "").splitlines():
        mount, _, filesystem = line.partition(" - ")
        kind, _, options = filesystem.split(" ", 2)
        if kind not in ("cgroup", "cgroup2"):
            continue
        mounted_group, mount_point = (Path(field) for field in mount.split()[3:5])
        for _, controllers, group in memberships:
            if set(controllers.split(",")) <= set(options.split(",")) if controllers else kind == "cgroup2":
                # A container's mount may begin at its own group, and its groups may be named as the host names them.
                inside = Path(group).relative_to(mounted_group) if Path(group).is_relative_to(mounted_group) else Path()
                top = root / mount_point.relative_to("/")
                yield from (top / part for part in (inside, *inside.parents))


def _number(path: Path) -> int | None:
    text = kernel_file(path)
    return int(text) if text is not None and text.lstrip("-").isdigit() else None


def kernel_file(path: Path) -> str | None:
    """Contents of a file in /proc or /sys; None if this system has no such file, or forbids to read it."""
    try:
        return path.read_text().strip()
    except OSError:
        return None
