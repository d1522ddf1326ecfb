"""TODO: what lives here."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

TOLERANCE = {"cpu": 0.5, "cuda": 0.25}
"""How much below the floor a sample must be to be called impossible, by kind of device.

CPU, measured on a virtual machine of 2 cores with up to 5 processes at work, whose neighbours on the host were too: what one
thread alone reached at best in a second varied from 48 to 102 GFLOP/s in float32 (best of three such seconds: 69 to 102), as
it must where a neighbour takes turns on the same core. So only what takes less than half of the floor is certain. CUDA, not
measured by us: the power that a large product draws lowers the clocks that it is timed at, on an H200 to some 0.8 of its data
sheet's rate, and work that draws less keeps them.
"""

RESOLUTION_S = 1e-6
"""Of a clock's reading: events of CUDA resolve 0.5 µs, at either end."""


Ladder = tuple[tuple[int, float], ...]
"""(working set in bytes, bytes read and written per second), working sets ascending."""


@dataclass(frozen=True)
class Peaks:
    """The highest rates seen, of one dtype: with all threads, and of one thread alone. A GPU counts as one thread.

    What all threads were seen to do is what a call can hope for. What bounds it is `threads` times one alone: threads that
    wait for each other are slowed down by any other process for as long as it is there (seen: 2 threads on 2 busy cores at
    1 of 187 GFLOP/s), while a short piece of work of one thread finds its moment.
    """

    flops_per_s: float
    bytes_per_s: Ladder
    threads: int
    thread_flops_per_s: float
    thread_bytes_per_s: Ladder

    def __post_init__(self) -> None:
        for ladder in (self.bytes_per_s, self.thread_bytes_per_s):
            sizes = [size for size, _ in ladder]
            if not sizes or sizes != sorted(set(sizes)):
                raise ValueError(f"working sets must be different and ascend, and there must be one, got {sizes}")
        rates = [rate for ladder in (self.bytes_per_s, self.thread_bytes_per_s) for _, rate in ladder]
        if not all(rate > 0 for rate in (self.flops_per_s, self.thread_flops_per_s, self.threads, *rates)):
            raise ValueError(f"rates and threads must be positive, got {self}")

    def as_record(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """The inverse of `as_record`, also when JSON lay between."""
        ladders = {key: tuple((int(size), float(rate)) for size, rate in value) for key, value in record.items() if "bytes" in key}
        return cls(**{**record, **ladders})


def merge_peaks(*measured: Peaks) -> Peaks:
    """What was seen at best. One measurement may fall into a busy second; the best of one each round seldom does."""
    if len({ceilings.threads for ceilings in measured}) != 1:
        raise ValueError(f"there must be ceilings, all of the same number of threads, got {[one.threads for one in measured]}")
    return Peaks(
        max(ceilings.flops_per_s for ceilings in measured),
        merge_ladders(ceilings.bytes_per_s for ceilings in measured),
        measured[0].threads,
        max(ceilings.thread_flops_per_s for ceilings in measured),
        merge_ladders(ceilings.thread_bytes_per_s for ceilings in measured),
    )


def merge_ladders(ladders: Iterable[Ladder]) -> Ladder:
    rates: dict[int, float] = {}
    for ladder in ladders:
        for size, rate in ladder:
            rates[size] = max(rate, rates.get(size, 0.0))
    return tuple(sorted(rates.items()))


def bandwidth(min_bytes: float, ladder: Ladder) -> float:
    """What touches `min_bytes` or more moves no more bytes per second than this.

    It is the highest rate of any working set from the next smaller one on: what fits less well into the caches is not
    faster. So it never rises with `min_bytes`, and errs to the fast side between two steps of the ladder.
    """
    start = max((size for size, _ in ladder if size <= min_bytes), default=0)
    return max(rate for size, rate in ladder if size >= start)


# --- what follows from them ---------------------------------------------------------------------


@dataclass(frozen=True)
class Roofline:
    """The least seconds of a call by what all threads were seen to do, and which ceiling says so.

    provable_s: the least by what bounds them, never more than `seconds`.
    """

    seconds: float
    bound: Literal["compute", "memory"]
    provable_s: float

    def fraction(self, latency_s: float) -> float | None:
        """Which part of the ceiling a call reached, at most 1; None where it beat what was seen, so that this says nothing."""
        return self.seconds / latency_s if self.seconds <= latency_s else None


def roofline(flops: float, min_bytes: float, ceilings: Peaks) -> Roofline:
    """max(flops / peak, min_bytes / bandwidth).

    flops: that the work needs, however it is done. min_bytes: that must be read or written at least once, such as
    parameters, inputs and outputs.
    """
    if not (flops >= 0 and min_bytes >= 0):
        raise ValueError(f"FLOPs and bytes must not be negative, got {flops} and {min_bytes}")
    compute_s = flops / ceilings.flops_per_s
    memory_s = min_bytes / bandwidth(min_bytes, ceilings.bytes_per_s)
    # Each thread touches its share, which fits into a smaller cache, and that is its own.
    share = 1 / ceilings.threads
    provable_s = max(
        share * flops / ceilings.thread_flops_per_s,
        share * min_bytes / bandwidth(share * min_bytes, ceilings.thread_bytes_per_s),
    )
    seconds = max(compute_s, memory_s)
    return Roofline(seconds, "compute" if compute_s > memory_s else "memory", min(seconds, provable_s))


def impossible(latency_s: float, least: Roofline, tolerance: float) -> str | None:
    """Why a sample cannot be, in words that name both numbers; None if it can, or if that cannot be proven.

    tolerance: that of `TOLERANCE` for its device. Of floors from ceilings that were measured in several rounds (`highest`),
    this judges far more reliably than of one.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be a fraction from 0 to below 1, got {tolerance}")
    if latency_s + RESOLUTION_S >= (1 - tolerance) * least.provable_s:
        return None
    return (
        f"faster than physics: a call took {latency_s:.3g} s, but its FLOPs and bytes take at least {least.provable_s:.3g} s at "
        f"this machine's highest rates (tolerance {tolerance:.0%}): it does not do the work, is not waited for or declares too much"
    )


def implausible_peak(peak_bytes: int, must_hold_bytes: int) -> str | None:
    """Why a peak of memory cannot be, in words that name both numbers; None if it can. Without tolerance: bytes are counted.

    must_hold_bytes: that must exist at one moment of the call and did not before it, such as its output.
    """
    if peak_bytes >= must_hold_bytes:
        return None
    return f"less memory than it must hold: a peak of {peak_bytes} bytes, where its output alone takes {must_hold_bytes}"
