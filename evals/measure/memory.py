"""TODO: what lives here."""

import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from evals.measure.clock import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, Work

# --- memory -------------------------------------------------------------------------------------


def peak_allocated_bytes(work: Work, device: str = "cpu") -> int:
    """The most bytes of tensors that `work` holds at once above what was held before it, by the allocator's own account.

    CPU: every allocation and release is an event of the profiler; their running sum is exact, which no polling
    is. Scratch that a library takes past torch's allocator is not in it. CUDA: the allocator's own peak.
    """
    return cuda_peak_memory(work).allocated_bytes if device == "cuda" else _cpu_peak_bytes(work)


def _cpu_peak_bytes(work: Work) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def process_peak_bytes(work: Work) -> int | None:
    """How far the memory of this process rises while `work` runs: scratch that libraries take past torch's allocator too.

    The kernel's own high-water mark, of pages touched, which needs a process in which `work` has not run yet. None where
    there is no such mark to reset (it is Linux's). Source: proc(5), clear_refs.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    libc = ctypes.CDLL(None)
    # Released blocks go back to the kernel at once, or the mark would rise by nothing where they are used again.
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    libc.mallopt(M_TRIM_THRESHOLD, 0)
    libc.malloc_trim(0)
    before = process_status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return max(process_status_bytes("VmHWM") - before, 0)


def process_status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def available_bytes() -> int:
    """Memory that this machine can give without swapping."""
    return int(psutil.virtual_memory().available)


def private_bytes() -> int:
    """What the kernel counts against RLIMIT_DATA for this process, where it counts at all (Linux)."""
    return int(getattr(psutil.Process().memory_info(), "data", 0))


# --- memory -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CudaPeak:
    """Bytes above what was held before: of tensors, and of what the allocator took from the device to hold them."""

    allocated_bytes: int
    reserved_bytes: int


def cuda_peak_memory(work: Work) -> CudaPeak:
    """The most that `work` held at once, by the allocator's own account; what libraries take past it is not in it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what is cached from before would be used without being counted as reserved
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    work()
    torch.cuda.synchronize()
    return CudaPeak(torch.cuda.max_memory_allocated() - allocated, torch.cuda.max_memory_reserved() - reserved)
