"""The highest FLOP/s and bytes/s of this machine, with which `evals.stats.roofline` bounds the latency of a call.

Both rates are measured and not read off a data sheet. A measured rate is a lower bound of the true peak, so of several figures the
fastest counts.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from evals.measure import Work
from evals.measure.memory import available_bytes
from evals.stats.roofline import Peaks, merge_ladders

SMALLEST_BYTES = 2**16
LARGEST_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Range of working sets: the smallest fits into a core's own cache, the largest into hardly any cache."""


class Product(NamedTuple):
    """A matrix product and the FLOPs of one call."""

    flops: float
    call: Work


class MemoryPass(NamedTuple):
    """A call that reads or writes every byte of a working set once."""

    num_bytes: int
    call: Work


def measure_peaks(device: str, dtype: torch.dtype, threads: int, seconds: float = 0.8) -> Peaks:
    """Repeats matrix products and memory passes of several sizes, and returns the best rates, with all threads and with one.

    They alternate, so that a busy tenth of a second spoils one try of each and not all tries of one. Caches are warm, and bytes
    are counted without those that caches add: a copy of 1 MiB moves 2 MiB.
    Call it in a process of its own: it sets the number of threads.

    Args:
        device: cpu or cuda; a GPU counts as one thread.
        dtype: of the products, beside float32.
        threads: number of threads to measure together.
        seconds: about how long to measure; everything is tried once in any case.
    """
    counts = [1] if device == "cuda" else sorted({1, threads})
    passes = list(memory_passes(device))
    flops_per_s = dict.fromkeys(counts, 0.0)
    bytes_per_s = {count: {size: 0.0 for size, _ in passes} for count in counts}
    tries: list[Callable[[], None]] = []

    def try_product(count: int, flops: float, call: Work) -> None:
        torch.set_num_threads(count)
        flops_per_s[count] = max(flops_per_s[count], flops / _seconds(call, device))

    def try_pass(count: int, size: int, call: Work) -> None:
        torch.set_num_threads(count)
        calls = max(1, 2**22 // size)  # a short pass is repeated, so that reading the clock adds next to nothing
        bytes_per_s[count][size] = max(bytes_per_s[count][size], calls * size / _seconds(call, device, calls))

    for count in counts:
        torch.set_num_threads(count)
        tries += [partial(try_product, count, *product) for product in _products(device, dtype)]
        tries += [partial(try_pass, count, *memory_pass) for memory_pass in passes]
    end = time.perf_counter() + seconds
    for number, attempt in enumerate(itertools.cycle(tries)):
        if number >= len(tries) and time.perf_counter() >= end:
            break
        attempt()
    one, every = counts[0], counts[-1]
    ladders = {count: tuple(sorted(rates.items())) for count, rates in bytes_per_s.items()}
    # Several threads reach what one thread reaches, since all but one may do nothing.
    return Peaks(max(flops_per_s.values()), merge_ladders(ladders.values()), every, flops_per_s[one], ladders[one])


def _products(device: str, dtype: torch.dtype) -> Iterator[Product]:
    """Square matrix products, from a small one to one that takes 4 ms.

    float32 is tried beside `dtype`, since a variant may compute in more precision than that of its inputs, and float16 is slower
    than float32 on a CPU. On CUDA float32 means TF32, which kernels are free to use. The matrices are random: zeros switch fewer
    transistors, and are faster on a GPU.
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    for tried in dict.fromkeys([dtype, torch.float32] if dtype != torch.float64 else [dtype]):
        n = {"cpu": 256, "cuda": 1024}[device]
        seconds = 0.0
        while seconds < 0.004:
            a, b = (torch.randn(n, n, device=device).to(tried) for _ in range(2))
            call = partial(torch.mm, a, b, out=torch.empty_like(a))
            yield Product(2.0 * n**3, call)
            seconds = min(_seconds(call, device) for _ in range(2))
            n *= 2


def memory_passes(device: str) -> Iterator[MemoryPass]:
    """A copy and a sum over each working set: either may be the faster one. They use at most a quarter of the free memory."""
    free = available_bytes() if device == "cpu" else torch.cuda.mem_get_info()[0]
    sizes = [SMALLEST_BYTES]
    while 2 * sizes[-1] <= min(LARGEST_BYTES[device], free // 4):
        sizes.append(2 * sizes[-1])
    buffer = torch.ones(sizes[-1] // 4, dtype=torch.float32, device=device)
    for size in sizes:
        working_set = buffer[: size // 4]
        source, target = working_set.chunk(2)
        yield MemoryPass(size, partial(target.copy_, source))
        yield MemoryPass(size, partial(torch.sum, working_set))


def _seconds(call: Work, device: str, calls: int = 1) -> float:
    """Seconds of `calls` calls; on CUDA the time between two events, while the host queues ahead of the device."""
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - begin
