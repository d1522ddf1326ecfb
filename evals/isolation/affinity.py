"""Where on a machine a comparison is measured: cores and a GPU that no other one has meanwhile."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    pass


import fcntl
import sys
import tempfile
from typing import TextIO, TypeVar

from evals.errors import UsageError

T = TypeVar("T")

_mine: list[TextIO] = []
"""The lock of the place that this process has taken: it is free again when the process has ended, however that came about."""


def exclusive_resources(device: str) -> list[str]:
    """What a measurement of this process has to itself, by name: the physical cores that it may run on, and its GPU."""
    names = [f"core-{core}" for core in physical_cores()]
    if device == "cuda":
        names.append(f"gpu-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")
    return names


def physical_cores() -> dict[int, list[int]]:
    """The logical cores that this process may use, by the first of those that share a physical core with it, in order."""
    if not hasattr(os, "sched_getaffinity"):
        return {core: [core] for core in range(os.cpu_count() or 1)}
    cores: dict[int, list[int]] = {}
    for core in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{core}/topology/core_cpus_list")
        first = siblings.read_text().replace("-", ",").partition(",")[0] if siblings.exists() else core
        cores.setdefault(int(first), []).append(core)
    return dict(sorted(cores.items()))


def split_evenly(things: Sequence[T], number: int, of: int) -> list[T]:
    """The `number`-th of so many parts, in order, none of which has more than one more than another."""
    return list(things[len(things) * number // of : len(things) * (number + 1) // of])


def claim_slot(places: int) -> None:
    """Has this process run on one GPU and its part of the cores, which none of the other processes that called this has.

    places: into how many parts the machine is cut. Of a process that has not used CUDA yet; again, it stays where it is.
    Raises UsageError if there are fewer GPUs or physical cores than places, or if all places are taken.
    """
    if _mine:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    cores = physical_cores()
    if min(len(gpus), len(cores)) < places:
        raise UsageError(
            f"{places} comparisons at once need as many GPUs and physical cores, and this machine has {len(gpus)} and "
            f"{len(cores)}; lower hydra.launcher.n_jobs"
        )
    for number in range(places):
        file = (Path(tempfile.gettempdir()) / f"bsbr-place-{os.getuid()}-{number}-of-{places}.lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        _mine.append(file)
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number]
        own = split_evenly(list(cores.values()), number, places)
        if sys.platform == "linux":
            os.sched_setaffinity(0, [core for siblings in own for core in siblings])
        torch.set_num_threads(len(own))
        return
    raise UsageError(f"all {places} places of this machine are taken by other commands; wait for them to end")


def core_count() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_counts() -> str:
    """1,2,4,… up to all cores, as a sweep over this machine's threads writes it."""
    return ",".join(map(str, sorted({2**power for power in range(core_count().bit_length())} | {core_count()})))
