"""What this machine can do at most, measured; and what follows: the least time that a call can take.

The roofline (Williams 2009, doi:10.1145/1498765.1498785): work of F operations that must move B bytes takes no less than
max(F / peak, B / bandwidth). Both rates are measured here and not read off a data sheet, and both are then bounds from one
side only: a machine is at least as fast as it was seen to be. So wherever there is a choice, the faster figure counts, and
a sample is called impossible only where it beats even that by more than what such figures were seen to vary by.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial

import psutil
import torch

from evals.config import Device
from evals.stats.roofline import Ceilings, _highest

Call = Callable[[], object]

SMALLEST = 2**16
LARGEST = {"cpu": 2**28, "cuda": 2**30}
"""Working sets in bytes, from one that a core holds to one that hardly a cache does."""


# --- measuring ----------------------------------------------------------------------------------


def measure_ceilings(device: Device, seconds: float = 0.8) -> Ceilings:
    """The best of what is tried over and over for about `seconds`. Meant for a process of its own: it sets the threads.

    Everything is tried in turns, so that a busy tenth of a second spoils a try of each and not all tries of one. Caches are
    warm, and bytes are counted as a caller sees them: a copy of 1 MiB moves 2, whatever the cache does besides.
    """
    counts = [1] if device.kind == "cuda" else sorted({1, device.threads})
    passes = list(_passes(device.kind))
    flops_per_s = dict.fromkeys(counts, 0.0)
    bytes_per_s = {threads: {size: 0.0 for size, _ in passes} for threads in counts}
    tries: list[Callable[[], None]] = []

    def product(threads: int, flops: float, call: Call) -> None:
        torch.set_num_threads(threads)
        flops_per_s[threads] = max(flops_per_s[threads], flops / _seconds(call, device.kind))

    def pass_over(threads: int, size: int, call: Call) -> None:
        torch.set_num_threads(threads)
        calls = max(1, 2**22 // size)  # short ones many times, for a clock's reading to be nothing beside them
        bytes_per_s[threads][size] = max(bytes_per_s[threads][size], calls * size / _seconds(call, device.kind, calls))

    for threads in counts:
        torch.set_num_threads(threads)
        tries += [partial(product, threads, flops, call) for flops, call in _products(device)]
        tries += [partial(pass_over, threads, size, call) for size, call in passes]
    end = time.perf_counter() + seconds
    for number, attempt in enumerate(itertools.cycle(tries)):
        if number >= len(tries) and time.perf_counter() >= end:
            break
        attempt()
    one, every = counts[0], counts[-1]
    ladders = {threads: tuple(sorted(rates.items())) for threads, rates in bytes_per_s.items()}
    # Whatever one thread does, several can do too: they only need not to share it.
    return Ceilings(max(flops_per_s.values()), _highest(ladders.values()), every, flops_per_s[one], ladders[one])


def _products(device: Device) -> Iterator[tuple[float, Call]]:
    """Square matrix products and their FLOPs, from a small one to one that takes milliseconds.

    Of the dtype and of float32, since a variant may compute in more precision than it is given, and float16 on a CPU is
    the slower one. On CUDA float32 means TF32, which kernels are free to use. Of random numbers: zeros switch fewer
    transistors, and are faster on a GPU.
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    for dtype in dict.fromkeys([device.torch_dtype, torch.float32] if device.dtype != "float64" else [torch.float64]):
        n = {"cpu": 256, "cuda": 1024}[device.kind]
        seconds = 0.0
        while seconds < 0.004:
            a, b = (torch.randn(n, n, device=device.kind).to(dtype) for _ in range(2))
            call = partial(torch.mm, a, b, out=torch.empty_like(a))
            yield 2.0 * n**3, call
            seconds = min(_seconds(call, device.kind) for _ in range(2))
            n *= 2


def _passes(kind: str) -> Iterator[tuple[int, Call]]:
    """Copying and reading, and how many bytes each moves: all of its working set once. Either may be the faster one."""
    free = psutil.virtual_memory().available if kind == "cpu" else torch.cuda.mem_get_info()[0]
    sizes = [SMALLEST]
    while 2 * sizes[-1] <= min(LARGEST[kind], free // 4):
        sizes.append(2 * sizes[-1])
    buffer = torch.ones(sizes[-1] // 4, dtype=torch.float32, device=kind)
    for size in sizes:
        words = buffer[: size // 4]
        source, target = words.chunk(2)
        yield size, partial(target.copy_, source)
        yield size, partial(torch.sum, words)


def _seconds(call: Call, kind: str, calls: int = 1) -> float:
    """Of so many calls; on CUDA between events, with the host queuing ahead of the device."""
    if kind == "cuda":
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
