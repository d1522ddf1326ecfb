"""The only file that holds a clock or a memory counter."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

Work = Callable[[], object]

# --- time ---------------------------------------------------------------------------------------

MAX_SAMPLES = 500
"""More samples of one process say nothing that its rounds do not."""


@dataclass(frozen=True)
class Latency:
    """Seconds a call: the first, with all that is done once, and samples of the calls after warming up."""

    first_call_s: float
    samples_s: list[float]


def sample_latency(work: Work, device: str, *, budget_s: float, min_samples: int) -> Latency:
    """Calls `work` for about `budget_s`, and at least `min_samples` times, after warming up for a tenth of that.

    device: cpu or cuda, where events time the device and every sample begins with a cold L2 cache.
    """
    seconds = cuda_timer() if device == "cuda" else cpu_seconds
    collects = gc.isenabled()
    gc.disable()  # a collection belongs to no one's call, and one before them would take longer than they do
    try:
        first = seconds(work)
        warm = time.perf_counter() + budget_s / 10 - first
        while time.perf_counter() < warm:
            seconds(work)
        samples: list[float] = []
        end = time.perf_counter() + budget_s
        while len(samples) < min_samples or (time.perf_counter() < end and len(samples) < MAX_SAMPLES):
            samples.append(seconds(work))
    finally:
        if collects:
            gc.enable()
    return Latency(first, samples)


def cpu_seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cuda_timer() -> Callable[[Work], float]:
    """A timer of device time, between events. Not yet run on a device."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")

    def seconds(work: Work) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    return seconds


def now() -> str:
    """The time of day in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- memory -------------------------------------------------------------------------------------


def peak_allocated_bytes(work: Work, device: str = "cpu") -> int:
    """The most bytes of tensors that `work` holds at once above what was held before it, by the allocator's own account.

    CPU: every allocation and release is an event of the profiler; their running sum is exact, which no polling
    is. Scratch that a library takes past torch's allocator is not in it. CUDA: the allocator's own peak.
    """
    return _cuda_peak_bytes(work) if device == "cuda" else _cpu_peak_bytes(work)


def _cpu_peak_bytes(work: Work) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _cuda_peak_bytes(work: Work) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before


def available_bytes() -> int:
    """Memory that this machine can give without swapping."""
    return int(psutil.virtual_memory().available)


def private_bytes() -> int:
    """What the kernel counts against RLIMIT_DATA for this process, where it counts at all (Linux)."""
    return int(getattr(psutil.Process().memory_info(), "data", 0))


# --- FLOPs --------------------------------------------------------------------------------------


def count_flops(work: Work) -> int:
    """Floating point operations of the matrix products that `work` runs, masked halves included."""
    with FlopCounterMode(display=False, custom_mapping=UNREGISTERED) as counter:
        work()
    return int(counter.get_total_flops())


def _flash_for_cpu(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    batch, heads, queries, head_dim = q
    return int(2 * batch * heads * queries * k[2] * (head_dim + v[3]))


def _solve_triangular(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    *batch, rows, columns = b
    return int(torch.Size(batch).numel() * rows * rows * columns)


def _embedding_bag(weight: Any, indices: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(2 * torch.Size(indices).numel() * weight[1])


UNREGISTERED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash_for_cpu,
    torch.ops.aten.linalg_solve_triangular: _solve_triangular,
    torch.ops.aten._embedding_bag: _embedding_bag,
    torch.ops.aten._embedding_bag_forward_only: _embedding_bag,
}
"""What torch counts as 0, multiply-add = 2."""
