"""The cores and GPUs that this process may use, and slots of them for comparisons that run at once."""

import fcntl
import functools
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from evals.errors import UsageError
from evals.measure.limits import cpu_quota

T = TypeVar("T")


def core_count() -> int:
    """Number of logical cores that this process may use, by its affinity and by the quotas of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, math.ceil(cpu_quota() or cores))


def thread_counts() -> str:
    """Powers of two up to the number of cores, and that number, as in "1,2,4,6": the values of a sweep over threads."""
    return ",".join(map(str, sorted({2**power for power in range(core_count().bit_length())} | {core_count()})))


def physical_cores() -> dict[int, list[int]]:
    """Logical cores that this process may use, grouped by the lowest logical core of their physical core, in ascending order."""
    if not hasattr(os, "sched_getaffinity"):
        return {core: [core] for core in range(os.cpu_count() or 1)}
    cores: dict[int, list[int]] = {}
    for core in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{core}/topology/core_cpus_list")
        first = siblings.read_text().replace("-", ",").partition(",")[0] if siblings.exists() else core
        cores.setdefault(int(first), []).append(core)
    return dict(sorted(cores.items()))


def exclusive_resources(device: str) -> list[str]:
    """Names of the physical cores, and on cuda the GPU, that this process must not share while it measures."""
    names = [f"core-{core}" for core in physical_cores()]
    if device == "cuda":
        names.append(f"gpu-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")
    return names


def take_share(items: Sequence[T], share: int, shares: int) -> list[T]:
    """Share number `share`, from 0, of items that are cut into contiguous shares whose sizes differ by at most one."""
    return list(items[len(items) * share // shares : len(items) * (share + 1) // shares])


@functools.cache  # a process keeps its slot
def claim_slot(slots: int) -> int:
    """Gives this process one GPU and its share of the physical cores, which no other process of this user can claim.

    It sets CPU affinity, CUDA_VISIBLE_DEVICES and torch's number of threads, and must come before the first use of CUDA. The
    slot is free again when the process ends.

    Returns:
        Number of the slot, 0 … slots − 1.

    Raises:
        UsageError: if there are fewer GPUs or physical cores than slots, or if all slots are taken.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    cores = list(physical_cores().values())
    if min(len(gpus), len(cores)) < slots:
        raise UsageError(
            f"{slots} comparisons at once need as many GPUs and physical cores, and this machine has {len(gpus)} and "
            f"{len(cores)}; lower hydra.launcher.n_jobs"
        )
    slot = next((slot for slot in range(slots) if _lock_slot(slot, slots)), None)
    if slot is None:
        raise UsageError(f"all {slots} slots of this machine are taken by other commands; wait for them to end")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[slot]
    slot_cores = take_share(cores, slot, slots)
    if sys.platform == "linux":
        os.sched_setaffinity(0, [core for siblings in slot_cores for core in siblings])
    torch.set_num_threads(len(slot_cores))
    return slot


def _lock_slot(slot: int, slots: int) -> bool:
    """Takes the lock of a slot for the rest of this process's life; returns whether it was free."""
    path = Path(tempfile.gettempdir()) / f"bsbr-slot-{os.getuid()}-{slot}-of-{slots}.lock"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    return True
