"""Clocks: the seconds of each call of some work, on CPU or GPU; and wall time for budgets and timestamps."""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from time import perf_counter  # by name: attentions cannot replace the one in `time`, knowingly or not
from typing import Any, Literal, Protocol

import psutil

from evals.measure import Work
from evals.measure.cuda_clock import CudaClock
from evals.measure.cuda_state import DeviceState, read_state, throttle_reason

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of mallopt(3)."""


@dataclass(frozen=True)
class TimeSlice:
    """The samples of one time slice, and the state of the device."""

    samples_s: list[float]  # seconds of each call
    called_s: float  # seconds spent in all calls, including those that warm up and give no sample
    host_s: float | None = None  # median seconds that the host took to queue a call; None on a CPU
    exposed: int = 0  # how many samples contain waiting for the host
    throttled: str | None = None  # why the device may have run below its full speed, in words
    device: dict[str, Any] | None = None  # state of the device after the slice


class Clock(Protocol):
    """Times the calls of one piece of work.

    Attributes:
        returned: what the last call returned.
    """

    returned: Any

    def first_call(self) -> float:
        """Seconds of the first call, including everything that is done only once."""

    def time_slice(self, seconds: float) -> TimeSlice:
        """Calls the work for about `seconds`, at least once."""


def do_nothing() -> None:
    """What is done before a call whose input stays."""


def make_clock(work: Work, device: str, mode: Literal["eager", "graph"], before: Callable[[], None] = do_nothing) -> Clock:
    """Makes the clock of a device (cpu or cuda). On a CPU it turns off the garbage collector of this process.

    before: is called before each call of the work, and not timed.
    """
    return DeviceClock(work, mode, before) if device == "cuda" else CpuClock(work, before)


class CpuClock:
    """Wall time of each call. Garbage is collected between time slices; within one it would be charged to a call."""

    def __init__(self, work: Work, before: Callable[[], None] = do_nothing) -> None:
        self._work = work
        self._before = before
        self.returned: Any = None
        self._typical_s = 0.0
        # Imported modules stay: to search them for garbage would take longer than a time slice.
        gc.freeze()
        gc.disable()

    def first_call(self) -> float:
        self._typical_s = self._call()
        return self._typical_s

    def time_slice(self, seconds: float) -> TimeSlice:
        gc.collect()
        # Other processes had the caches, and the threads sleep: the first tenth of the slice gives no samples if calls are that
        # short.
        called_s = 0.0
        start = perf_counter()
        while perf_counter() - start + self._typical_s < seconds / 10:
            called_s += self._call()
        samples: list[float] = []
        start = perf_counter()
        while not samples or perf_counter() - start < seconds:
            samples.append(self._call())
        self._typical_s = statistics.median(samples)
        return TimeSlice(samples, called_s + sum(samples))

    def _call(self) -> float:
        self.returned = None  # frees what the last call returned
        self._before()
        start = perf_counter()
        returned = self._work()
        seconds = perf_counter() - start
        self.returned = returned
        return seconds


class DeviceClock:
    """Device time of each call, and the state of the device. Not yet run on a GPU."""

    def __init__(self, work: Work, mode: Literal["eager", "graph"], before: Callable[[], None] = do_nothing) -> None:
        self.returned: Any = None

        def call() -> None:
            self.returned = work()

        self._clock = CudaClock(call, mode, before=before)
        self._before: DeviceState | None = None
        self._settled = False

    def first_call(self) -> float:
        seconds = self._clock.first_call()
        self._settled = self._clock.warm()
        self._before = read_state()
        return seconds

    def time_slice(self, seconds: float) -> TimeSlice:
        start = perf_counter()
        burst = self._clock.burst(seconds=seconds)
        called_s = perf_counter() - start
        after = read_state()
        return TimeSlice(
            burst.device_s,
            called_s,
            host_s=statistics.median(burst.host_s),
            exposed=len(burst.exposed),
            throttled=throttle_reason(self._before, after),
            device={
                **({} if after is None else asdict(after)),
                "clocks_settled": self._settled,
                "hides_launches": self._clock.hides_launches,
            },
        )


def settle_allocator() -> None:
    """Makes malloc keep all memory in this process: blocks of any size come from a heap that never shrinks.

    By default the first blocks that a process releases, those of imports included, decide which sizes glibc returns to the kernel.
    So the imports decided whether a call paid for its pages anew: one attention under two names differed by 5 %. Does nothing
    outside Linux.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
        libc.mallopt(M_MMAP_MAX, 0)


class Stopwatch:
    """Wall time since its creation, for budgets only: no published number comes from it."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def exclude(self, seconds: float) -> None:
        """Subtracts seconds that have passed already."""
        self._start += seconds


def now() -> str:
    """The time of day in UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def seconds_since(time: str) -> float:
    """Seconds between a time of day that `now` returned and the present."""
    return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()


def process_age_s() -> float:
    """Wall seconds since this process began, imports included."""
    return time.time() - psutil.Process().create_time()


def pause(seconds: float) -> None:
    """Sleeps, where something must be polled because it cannot call back."""
    time.sleep(seconds)
