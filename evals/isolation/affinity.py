"""Cores and GPUs: which ones this process may use, and a slot of them for each of several comparisons at once."""

import fcntl
import functools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from evals.errors import UsageError

T = TypeVar("T")


def core_count() -> int:
    """Number of logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_counts() -> str:
    """Powers of two up to the number of cores, and that number, as in "1,2,4,6": the values of a sweep over threads."""
    return ",".join(map(str, sorted({2**power for power in range(core_count().bit_length())} | {core_count()})))


def physical_cores() -> dict[int, list[int]]:
    """Logical cores that this process may use, grouped by physical core.

    Returns:
        By the lowest logical core of each physical core, in ascending order: those of its logical cores that may be used.
    """
    if not hasattr(os, "sched_getaffinity"):
        return {core: [core] for core in range(os.cpu_count() or 1)}
    cores: dict[int, list[int]] = {}
    for core in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{core}/topology/core_cpus_list")
        first = siblings.read_text().replace("-", ",").partition(",")[0] if siblings.exists() else core
        cores.setdefault(int(first), []).append(core)
    return dict(sorted(cores.items()))


def exclusive_resources(device: str) -> list[str]:
    """Names of what this process needs for itself while it measures: its physical cores, and on cuda its GPU."""
    names = [f"core-{core}" for core in physical_cores()]
    if device == "cuda":
        names.append(f"gpu-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")
    return names


def split_evenly(things: Sequence[T], part: int, parts: int) -> list[T]:
    """Part number `part`, from 0, of a sequence that is cut into parts whose sizes differ by at most one."""
    return list(things[len(things) * part // parts : len(things) * (part + 1) // parts])


@functools.cache  # a process keeps its slot
def claim_slot(slots: int) -> int:
    """Gives this process one GPU and its share of the physical cores, which no other process of this user can claim.

    It sets CPU affinity, CUDA_VISIBLE_DEVICES and torch's number of threads, and must come before the first use of CUDA. The
    slot is free again when the process ends.

    Args:
        slots: number of slots that the machine is divided into.

    Returns:
        Number of the slot, from 0.

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
    own = split_evenly(cores, slot, slots)
    if sys.platform == "linux":
        os.sched_setaffinity(0, [core for siblings in own for core in siblings])
    torch.set_num_threads(len(own))
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
