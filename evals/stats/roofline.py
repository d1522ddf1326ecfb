"""The roofline: the least time that a call can take on this machine, and the test for samples that beat it.

Work of F operations that must move B bytes takes at least max(F / peak FLOP/s, B / bandwidth) (Williams 2009,
doi:10.1145/1498765.1498785). Both rates are measured (`evals.measure.peaks`), and so are lower bounds of the true peaks.
A sample is therefore called impossible only if it beats the roofline by more than such rates vary.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self

TOLERANCE = {"cpu": 0.5, "cuda": 0.25}
"""Fraction by which a sample must beat the roofline to be called impossible, by kind of device.

CPU, measured on a virtual machine of 2 cores with up to 5 busy processes and busy neighbours on the host: the best rate of one
thread alone in a second varied from 48 to 102 GFLOP/s in float32 (best of three such seconds: 69 to 102), because a neighbour can
share the core. So only a sample below half of the roofline is certainly wrong. CUDA, not measured by us: a large product draws so
much power that the clocks fall, on an H200 to some 0.8 of its data sheet's rate, and work that draws less keeps them.
"""

RESOLUTION_S = 1e-6
"""Resolution of a clock's reading: CUDA events resolve 0.5 µs at either end."""


Ladder = tuple[tuple[int, float], ...]
"""(working set in bytes, bytes read and written per second), working sets ascending."""


@dataclass(frozen=True)
class Peaks:
    """The highest measured rates for one dtype: with all threads, and of one thread alone. A GPU counts as one thread.

    The rates of all threads are what a call can reach; `threads` times the rate of one thread bounds it. Threads that wait for
    each other are slowed down by any other process for as long as it runs (measured: 2 threads on 2 busy cores reached 1 of 187
    GFLOP/s), while a short piece of work of one thread finds an undisturbed moment.
    """

    flops_per_s: float  # of a matrix product, with all threads
    bytes_per_s: Ladder  # of a pass over each working set, with all threads
    threads: int
    thread_flops_per_s: float  # the same of one thread
    thread_bytes_per_s: Ladder

    def __post_init__(self) -> None:
        for ladder in (self.bytes_per_s, self.thread_bytes_per_s):
            sizes = [size for size, _ in ladder]
            if not sizes or sizes != sorted(set(sizes)):
                raise ValueError(f"working sets must be different and ascend, and there must be one, got {sizes}")
        rates = [rate for ladder in (self.bytes_per_s, self.thread_bytes_per_s) for _, rate in ladder]
        if not all(rate > 0 for rate in (self.flops_per_s, self.thread_flops_per_s, self.threads, *rates)):
            raise ValueError(f"rates and threads must be positive, got {self}")

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`, also after a round trip through JSON."""
        ladders = {key: tuple((int(size), float(rate)) for size, rate in value) for key, value in record.items() if "bytes" in key}
        return cls(**{**record, **ladders})


def merge_peaks(*measured: Peaks) -> Peaks:
    """The best of several measurements of one machine: one may fall into a busy second, all of them seldom do.

    Raises:
        ValueError: if there is none, or their numbers of threads differ.
    """
    threads = [peaks.threads for peaks in measured]
    if len(set(threads)) != 1:
        raise ValueError(f"there must be peaks, all of the same number of threads, got {threads}")
    return Peaks(
        max(peaks.flops_per_s for peaks in measured),
        merge_ladders(peaks.bytes_per_s for peaks in measured),
        threads[0],
        max(peaks.thread_flops_per_s for peaks in measured),
        merge_ladders(peaks.thread_bytes_per_s for peaks in measured),
    )


def merge_ladders(ladders: Iterable[Ladder]) -> Ladder:
    """The highest rate of each working set."""
    rates: dict[int, float] = {}
    for ladder in ladders:
        for size, rate in ladder:
            rates[size] = max(rate, rates.get(size, 0.0))
    return tuple(sorted(rates.items()))


def bandwidth(min_bytes: float, ladder: Ladder) -> float:
    """The highest rate in bytes/s at which work can move `min_bytes` or more.

    It is the highest rate of all working sets from the next smaller one upwards, because a larger one fits less well into the
    caches. So it never rises with `min_bytes`, and is too high rather than too low between two steps of the ladder.
    """
    start = max((size for size, _ in ladder if size <= min_bytes), default=0)
    return max(rate for size, rate in ladder if size >= start)


@dataclass(frozen=True)
class Roofline:
    """The least time of a call at the peaks of a machine."""

    seconds: float  # at the measured rates of all threads
    bound: Literal["compute", "memory"]  # the peak that decides `seconds`
    provable_s: float  # at `threads` times the rates of one thread, never more than `seconds`

    def fraction(self, latency_s: float) -> float | None:
        """The fraction of the peak that a call reached, at most 1; None for a call that beat the peak and so proves it too low."""
        return self.seconds / latency_s if self.seconds <= latency_s else None


def roofline(flops: float, min_bytes: float, peaks: Peaks) -> Roofline:
    """max(flops / peak FLOP/s, min_bytes / bandwidth).

    Args:
        flops: operations that any implementation of the work needs.
        min_bytes: bytes that must be read or written at least once, such as parameters, inputs and outputs.
        peaks: of the machine.

    Raises:
        ValueError: for negative amounts.
    """
    if not (flops >= 0 and min_bytes >= 0):
        raise ValueError(f"FLOPs and bytes must not be negative, got {flops} and {min_bytes}")
    compute_s = flops / peaks.flops_per_s
    memory_s = min_bytes / bandwidth(min_bytes, peaks.bytes_per_s)
    # Each thread touches its share, which fits into a smaller cache of its own.
    share = 1 / peaks.threads
    provable_s = max(
        share * flops / peaks.thread_flops_per_s,
        share * min_bytes / bandwidth(share * min_bytes, peaks.thread_bytes_per_s),
    )
    seconds = max(compute_s, memory_s)
    return Roofline(seconds, "compute" if compute_s > memory_s else "memory", min(seconds, provable_s))


def impossible(latency_s: float, limit: Roofline, tolerance: float) -> str | None:
    """Why a sample cannot be true, with both numbers; None if it can be, or if the opposite cannot be proven.

    Args:
        latency_s: the fastest sample.
        limit: from peaks that were measured in several rounds (`merge_peaks`): one measurement is far less reliable.
        tolerance: a fraction, as `TOLERANCE` has it for the device.

    Raises:
        ValueError: if the tolerance is no fraction.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be a fraction from 0 to below 1, got {tolerance}")
    if latency_s + RESOLUTION_S >= (1 - tolerance) * limit.provable_s:
        return None
    return (
        f"faster than physics: a call took {latency_s:.3g} s, but its FLOPs and bytes take at least {limit.provable_s:.3g} s at "
        f"this machine's highest rates (tolerance {tolerance:.0%}): it does not do the work, is not waited for or declares too much"
    )


def implausible_peak(peak_bytes: int, must_hold_bytes: int) -> str | None:
    """Why a memory peak cannot be true, with both numbers; None if it can be. Bytes are counted exactly, so there is no tolerance.

    Args:
        peak_bytes: measured during the call.
        must_hold_bytes: bytes that must exist at one moment of the call and did not before it, such as its output.
    """
    if peak_bytes >= must_hold_bytes:
        return None
    return f"less memory than it must hold: a peak of {peak_bytes} bytes, where its output alone takes {must_hold_bytes}"
