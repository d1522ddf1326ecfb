"""The only file that holds a clock or a memory counter."""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

import psutil

from evals.measure import cuda_clock, cuda_state

Work = Callable[[], object]

# --- time ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimeSlice:
    """The samples of one turn, in seconds a call, and what a device tells besides.

    called_s: all that went into calls, those included that warm up and are no samples.
    host_s: what the host took to queue a call. exposed: how many samples contain waiting for the host. throttled: why
    the device may have been slower than it can, in words.
    """

    samples_s: list[float]
    called_s: float
    host_s: float | None = None
    exposed: int = 0
    throttled: str | None = None
    device: dict[str, Any] | None = None


class Clock(Protocol):
    """How the calls of one piece of work are timed."""

    def first_call(self) -> float:
        """Seconds of the first call, with all that is done once."""

    def time_slice(self, seconds: float) -> TimeSlice:
        """Calls the work for about so long, at least once."""


class CpuClock:
    """Wall time of each call. Garbage is collected between turns, and not within one: it belongs to no one's call."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._typical_s = 0.0
        # What is imported stays: to search it for garbage would take longer than a turn.
        gc.freeze()
        gc.disable()

    def first_call(self) -> float:
        self._typical_s = self._once()
        return self._typical_s

    def time_slice(self, seconds: float) -> TimeSlice:
        gc.collect()
        # Others had the caches, and the threads sleep: the first tenth of a turn does not count, where a call is that short.
        called_s = 0.0
        start = time.perf_counter()
        while time.perf_counter() - start + self._typical_s < seconds / 10:
            called_s += self._once()
        samples: list[float] = []
        start = time.perf_counter()
        while not samples or time.perf_counter() - start < seconds:
            samples.append(self._once())
        self._typical_s = statistics.median(samples)
        return TimeSlice(samples, called_s + sum(samples))

    def _once(self) -> float:
        start = time.perf_counter()
        self._work()
        return time.perf_counter() - start


class DeviceClock:
    """Device time of each call, and the state of the device. Not yet run on one."""

    def __init__(self, work: Work, mode: Literal["eager", "graph"]) -> None:
        self._clock = cuda_clock.CudaClock(work, mode)
        self._before: cuda_state.DeviceState | None = None
        self._settled = False

    def first_call(self) -> float:
        seconds = self._clock.first_call()
        self._settled = self._clock.warm()
        self._before = cuda_state.read_state()
        return seconds

    def time_slice(self, seconds: float) -> TimeSlice:
        start = time.perf_counter()
        burst = self._clock.burst(seconds=seconds)
        called_s = time.perf_counter() - start
        after = cuda_state.read_state()
        return TimeSlice(
            burst.device_s,
            called_s,
            host_s=statistics.median(burst.host_s),
            exposed=len(burst.exposed),
            throttled=cuda_state.throttle_reason(self._before, after),
            device={
                **({} if after is None else asdict(after)),
                "clocks_settled": self._settled,
                "hides_launches": self._clock.hides_launches,
            },
        )


def make_clock(work: Work, device: str, mode: Literal["eager", "graph"]) -> Clock:
    """The clock of `device`, cpu or cuda. It takes over this process. mode: eager or graph (CUDA graphs)."""
    return DeviceClock(work, mode) if device == "cuda" else CpuClock(work)


def settle_allocator() -> None:
    """Makes malloc keep what it has, in this process: blocks of any size come from a heap that never shrinks.

    By itself glibc learns from the blocks that happen to be released first, imports included, which sizes it hands back to
    the kernel. Whether a call then pays for its pages anew depended on what else its process had imported: one
    attention under two names differed by 5 %. Elsewhere than on Linux nothing is done.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
        libc.mallopt(M_MMAP_MAX, 0)


class Stopwatch:
    """Wall time since it was made, for budgets: nothing that is published comes from it."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def exclude(self, seconds: float) -> None:
        """Of the time until now."""
        self._start += seconds


def now() -> str:
    """The time of day in UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def pause(seconds: float) -> None:
    """Lets time go by, where something else is waited for that cannot call back."""
    time.sleep(seconds)


def seconds_since(time: str) -> float:
    """Of the time of day, since what `now` said then."""
    return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()


def process_age_s() -> float:
    """Wall time since this process began, imports included."""
    return time.time() - psutil.Process().create_time()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
