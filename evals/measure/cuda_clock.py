"""Time, memory and health of a CUDA device. Imports without one.

How a sample is made, and after whom: events bracket the call (triton.testing.do_bench); the L2 cache is flushed before it
by its real size (nvbench); the device is kept busy until all of it is queued, so that no gap between launches is timed
(nvbench's blocking kernel, here a spin that ends by itself, since work that waits for the device would wait for ever).
Other than those, a sample knows whether that succeeded: if the device had begun before the host was done, it says so.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch

from evals.measure.cuda_state import read_state

Work = Callable[[], object]

# --- time ---------------------------------------------------------------------------------------


class Mark(Protocol):
    """A point in the device's queue."""

    def passed(self) -> bool:
        """The device has come this far. Does not wait."""

    def seconds_since(self, earlier: Self) -> float:
        """Device time between two marks that are both passed."""


class Device(Protocol):
    """What a clock needs of a device: it works off, in order, what the host queues."""

    def now(self) -> float:
        """The host's clock, in seconds."""

    def mark(self) -> Mark:
        """Queues a mark."""

    def sleep(self, cycles: int) -> None:
        """Queues doing nothing for so many cycles of the device."""

    def flush(self) -> None:
        """Queues evicting all of the cache."""

    def synchronise(self) -> None:
        """Waits until the queue is empty."""

    def capture(self, work: Work) -> Work:
        """What replays all that `work` queues at the cost of one launch. Raises CannotCapture."""

    def clock_mhz(self) -> float | None:
        """The clock of the device's processors; None if it cannot be read."""


class CannotCapture(NotImplementedError):
    """The work cannot become a CUDA graph: with graphs it is `unsupported`."""


@dataclass(frozen=True)
class Burst:
    """Samples of one call each, in order: seconds that the device worked, and that the host took to queue it.

    exposed: positions of samples whose device time contains waiting for the host, because not all of the call was queued
    when the device began it.
    """

    device_s: list[float]
    host_s: list[float]
    exposed: list[int]


class CudaClock:
    """Times one piece of work: `first_call`, then `warm`, then any number of `burst`s.

    mode: eager calls the work every time. graph captures it once behind the first call, and replays that: what the work
    does in Python happens no more, so a state that grows with every call stands still.
    The work must queue on the current stream, or have the current stream wait for what it queues elsewhere.
    """

    MARGIN = 2.0
    """The device is kept busy for so many times what queuing took when it was tried."""

    LONGEST_SLEEP_S = 0.1
    """Work that takes the host longer than this leaves the device idle in use, too; hiding it would double the time of all."""

    TRIES = 5
    """The device is kept busy twice as long after a sample that was exposed. One is a host that was disturbed; so many in a
    row, the last of 16 times what should do, are work that cannot be hidden."""

    CALIBRATION_CYCLES = 1_000_000

    def __init__(self, work: Work, mode: Literal["eager", "graph"] = "eager", device: Device | None = None) -> None:
        if mode not in ("eager", "graph"):
            raise ValueError(f"mode must be eager or graph, got {mode!r}")
        self._device = TorchDevice() if device is None else device
        self._work = work
        self._mode = mode
        self._ready = False
        self._cycles_per_s = 0.0
        self._sleep_s = 0.0
        self._exposed = 0  # samples in a row
        self.hides_launches = True
        """False once keeping the device busy has failed `TRIES` times in a row: the work waits for the device (`.item()`, a
        copy to the host), queues more than a device holds (some 1000 launches), or takes the host too long."""

    def first_call(self) -> float:
        """Wall seconds of the first call, to the end of its work on the device: loading, compiling and tuning are in it.

        Raises CannotCapture in mode graph, and whatever the work raises.
        """
        self._device.synchronise()
        start = self._device.now()
        self._work()
        self._device.synchronise()
        seconds = self._device.now() - start
        if self._mode == "graph":
            self._work = self._device.capture(self._work)
        self._ready = True
        return seconds

    def warm(self, least_s: float = 0.2, most_s: float = 2.0) -> bool:
        """Calls the work until the device's clock stands still: over the last 50 ms it moved by less than 1 %.

        Takes between `least_s` and `most_s`. Returns whether the clock stood still; where it cannot be read, time alone
        decides, and the answer is True.
        """
        self._check_ready()
        begin = self._device.now()
        before = self._device.clock_mhz()
        while True:
            slice_end = self._device.now() + 0.05
            while self._device.now() < slice_end:
                self._work()
                self._device.synchronise()
            clock = self._device.clock_mhz()
            still = clock is None or before is None or abs(clock - before) < 0.01 * before
            before = clock
            elapsed = self._device.now() - begin
            if (still and elapsed >= least_s) or elapsed >= most_s:
                self._calibrate()  # cycles are shorter now than on a sleeping device
                return still

    def burst(self, *, seconds: float | None = None, count: int | None = None) -> Burst:
        """Samples for about so many seconds of wall time, or so many samples; at least one."""
        if (seconds is None) == (count is None):
            raise ValueError(f"give either seconds or count, got seconds={seconds} and count={count}")
        self._check_ready()
        if not self._cycles_per_s:
            self._calibrate()
        burst = Burst([], [], [])
        end = self._device.now() + (seconds or 0.0)
        while not burst.device_s or (self._device.now() < end if count is None else len(burst.device_s) < count):
            self._sample(burst)
        return burst

    def _sample(self, burst: Burst) -> None:
        device = self._device
        if self.hides_launches:
            sleep_s = min(self._sleep_s * 2**self._exposed, self.LONGEST_SLEEP_S)
            device.sleep(int(sleep_s * self._cycles_per_s))
        device.flush()
        start = device.mark()
        called = device.now()
        self._work()
        returned = device.now()
        stop = device.mark()
        # Not yet there, the device had all of the call before it when it came to it.
        exposed = start.passed()
        device.synchronise()
        if exposed:
            burst.exposed.append(len(burst.device_s))
        self._exposed = self._exposed + 1 if exposed else 0
        if self._exposed >= self.TRIES:
            self.hides_launches = False
        burst.device_s.append(stop.seconds_since(start))
        burst.host_s.append(returned - called)

    def _calibrate(self) -> None:
        """How fast the device's cycles pass, and how long the host takes to queue a sample."""
        device = self._device
        device.sleep(self.CALIBRATION_CYCLES)  # the first launch loads it
        start = device.mark()
        device.sleep(self.CALIBRATION_CYCLES)
        stop = device.mark()
        device.synchronise()
        self._cycles_per_s = self.CALIBRATION_CYCLES / stop.seconds_since(start)
        queued = []
        for _ in range(3):
            begin = device.now()
            device.flush()
            device.mark()
            self._work()
            device.mark()
            queued.append(device.now() - begin)
            device.synchronise()
        self._sleep_s = self.MARGIN * min(queued)  # the least: what disturbs a host makes it slower

    def _check_ready(self) -> None:
        if not self._ready:
            raise RuntimeError("nothing was called yet: take first_call() before warm() and burst()")


class TorchMark:
    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def passed(self) -> bool:
        return bool(self._event.query())

    def seconds_since(self, earlier: Self) -> float:
        return float(earlier._event.elapsed_time(self._event)) / 1e3


class TorchDevice:
    """The current CUDA device, through torch."""

    LARGEST_L2 = 2**27
    """Where the driver does not know its size, the largest of any device yet: to flush too much is still to flush."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        words = 2 * (properties.L2_cache_size or self.LARGEST_L2) // 4
        self._written = torch.empty(words, dtype=torch.int32, device="cuda")
        self._read = torch.zeros(words, dtype=torch.float32, device="cuda")
        self._sum = torch.zeros((), dtype=torch.float32, device="cuda")

    def now(self) -> float:
        return time.perf_counter()

    def mark(self) -> TorchMark:
        return TorchMark()

    def sleep(self, cycles: int) -> None:
        torch.cuda._sleep(cycles)  # private, yet what torch's own tests delay a stream with

    def flush(self) -> None:
        # Lines just written must be written back before others can take their place, which would be charged to the work:
        # reading another buffer after writing one leaves a cache that is full of what can simply be dropped.
        self._written.zero_()
        torch.sum(self._read, dim=0, out=self._sum)

    def synchronise(self) -> None:
        torch.cuda.synchronize()

    def capture(self, work: Work) -> Work:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what libraries set up on their first calls on a stream cannot be captured
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=side):
                work()
        except RuntimeError as error:  # every error of CUDA's is one
            # Ending a capture that failed raises too, on top of what the work raised.
            cause = error.__context__ or error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise CannotCapture(
                "the work cannot become a CUDA graph, because it waits for the device, copies to the host or depends on values "
                f"there; use mode eager. CUDA says: {' '.join(str(cause).split())[:200]}"
            ) from error
        torch.cuda.synchronize()
        return graph.replay

    def clock_mhz(self) -> float | None:
        state = read_state()
        return None if state is None else state.sm_mhz
