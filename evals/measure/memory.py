"""Peak memory of some work, by torch's allocator and by the kernel; and free memory."""

import ctypes
import gc
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from evals.measure import Work
from evals.measure.clock import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
from evals.measure.limits import memory_left_bytes


class CudaPeak(NamedTuple):
    """Bytes above those held before."""

    allocated_bytes: int  # of tensors
    reserved_bytes: int  # that the allocator took from the device to hold them


def peak_allocated_bytes(work: Work, device: str = "cpu") -> int:
    """The most bytes of tensors that one call of `work` holds at once, above those held before it, by torch's allocator.

    CPU: every allocation and release is an event of the profiler, and their running sum is exact. Scratch memory that a library
    takes without torch's allocator is not in it. CUDA: the allocator's own peak.
    """
    return cuda_peak_memory(work).allocated_bytes if device == "cuda" else _cpu_peak_bytes(work)


def cuda_peak_memory(work: Work) -> CudaPeak:
    """The most that `work` holds at once on the GPU, by torch's allocator; other allocations are not in it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # memory cached earlier would be used without being counted as reserved
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    work()
    torch.cuda.synchronize()
    return CudaPeak(torch.cuda.max_memory_allocated() - allocated, torch.cuda.max_memory_reserved() - reserved)


def retained_bytes(work: Work, device: str = "cpu") -> int:
    """The bytes of tensors that one call of `work` leaves behind once its result is gone, by torch's allocator."""

    def call_and_collect() -> None:
        work()
        gc.collect()  # a graph of autograd may be a cycle

    if device == "cuda":
        before = torch.cuda.memory_allocated()
        call_and_collect()
        return torch.cuda.memory_allocated() - before
    return sum(_cpu_allocations(call_and_collect))


def _cpu_peak_bytes(work: Work) -> int:
    held = peak = 0
    for nbytes in _cpu_allocations(work):
        held += nbytes
        peak = max(peak, held)
    return peak


def _cpu_allocations(work: Work) -> list[int]:
    """Bytes of every allocation, and minus those of every release, in their order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def process_peak_bytes(work: Work) -> int | None:
    """The rise of this process's resident memory during `work`, scratch memory of libraries included.

    It is the kernel's own high-water mark of touched pages (proc(5), clear_refs). Call it in a process in which `work` has not
    run yet.

    Returns:
        Bytes; None outside Linux, which alone has such a mark.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    libc = ctypes.CDLL(None)
    # Released blocks must return to the kernel at once: the mark does not rise when they are used again.
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    libc.mallopt(M_TRIM_THRESHOLD, 0)
    libc.malloc_trim(0)
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def available_bytes() -> int:
    """Memory that this process can take without swapping, and before it reaches a limit that was set for it."""
    return int(min(psutil.virtual_memory().available, memory_left_bytes()))


def private_bytes() -> int:
    """Memory that the kernel counts against RLIMIT_DATA for this process; 0 outside Linux."""
    return int(getattr(psutil.Process().memory_info(), "data", 0))
