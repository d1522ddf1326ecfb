"""Device time of single calls on a CUDA device. Imports without one.

Events bracket each call, as in triton.testing.do_bench. Before it the L2 cache is flushed by its real size, as in nvbench. The
device is kept busy until the whole call is queued, so that no gap between launches is timed. nvbench does this with a blocking
kernel; here it is a sleep that ends by itself, since work that waits for the device would otherwise wait forever. Unlike in
those tools, a sample records whether this succeeded: it is marked as exposed if the device began the call before the host had
queued all of it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch

from evals.measure import Work
from evals.measure.cuda_state import read_state


class Mark(Protocol):
    """A point in the device's queue."""

    def passed(self) -> bool:
        """Whether the device has reached the mark. Does not wait."""

    def seconds_since(self, earlier: Self) -> float:
        """Device time between two marks that both are passed."""


class Device(Protocol):
    """A device with a queue that it executes in order, as `CudaClock` needs it."""

    def now(self) -> float:
        """Time of the host's clock, in seconds."""

    def mark(self) -> Mark:
        """Queues a mark."""

    def sleep(self, cycles: int) -> None:
        """Queues idling for a number of the device's clock cycles."""

    def flush(self) -> None:
        """Queues the eviction of the whole L2 cache."""

    def synchronize(self) -> None:
        """Waits until the queue is empty."""

    def capture(self, work: Work) -> Work:
        """Returns a call that replays everything that `work` queues at the cost of one launch.

        Raises:
            CannotCapture: if the work cannot become a CUDA graph.
        """

    def clock_mhz(self) -> float | None:
        """Clock rate of the device's processors; None if it cannot be read."""


class CannotCapture(NotImplementedError):
    """The work cannot become a CUDA graph; its outcome in mode graph is `unsupported`."""


@dataclass(frozen=True)
class Burst:
    """Samples of one call each, in order."""

    device_s: list[float]  # seconds from the call's start to its end on the device
    host_s: list[float]  # seconds that the host took to queue the call
    # Positions of samples that contain waiting for the host: the device began the call before it was queued completely.
    exposed: list[int]


class CudaClock:
    """Times one piece of work: `first_call`, then `warm`, then any number of `burst`s.

    Args:
        work: must queue on the current stream, or make the current stream wait for what it queues elsewhere.
        mode: eager calls the work every time. graph captures it once after the first call, and replays the graph: Python code of
            the work no longer runs, so a state that grows with every call stays as it is.
        device: by default the current CUDA device.
        before: is queued before each sample, and not timed.

    Attributes:
        hides_launches: False once keeping the device busy has failed `TRIES` times in a row: the work waits for the device
            (`.item()`, a copy to the host), queues more than a device holds (some 1000 launches), or takes the host too long.
    """

    MARGIN = 2.0
    """The device is kept busy for this multiple of the time that queuing took during calibration."""

    MAX_SLEEP_S = 0.1
    """Work that takes the host longer than this also leaves the device idle in practice; hiding it would double the total time."""

    TRIES = 5
    """After an exposed sample the device is kept busy twice as long. One exposed sample means that the host was disturbed; this
    many in a row, the last with 16 times the sleep that should suffice, mean that the launches cannot be hidden."""

    CALIBRATION_CYCLES = 1_000_000

    def __init__(
        self,
        work: Work,
        mode: Literal["eager", "graph"] = "eager",
        device: Device | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        if mode not in ("eager", "graph"):
            raise ValueError(f"mode must be eager or graph, got {mode!r}")
        self._device = TorchDevice() if device is None else device
        self._work = work
        self._before = before
        self._mode = mode
        self._ready = False
        self._cycles_per_s = 0.0
        self._sleep_s = 0.0
        self._exposed = 0  # samples in a row
        self.hides_launches = True

    def first_call(self) -> float:
        """Wall seconds of the first call, to the end of its work on the device; loading, compiling and tuning are included.

        Raises:
            CannotCapture: in mode graph. Whatever the work raises is raised, too.
        """
        self._device.synchronize()
        start = self._device.now()
        self._work()
        self._device.synchronize()
        seconds = self._device.now() - start
        if self._mode == "graph":
            self._work = self._device.capture(self._work)
        self._ready = True
        return seconds

    def warm(self, min_s: float = 0.2, max_s: float = 2.0) -> bool:
        """Calls the work for `min_s` to `max_s`, until the device's clock rate changes by less than 1 % in 50 ms.

        Returns:
            Whether the rate became steady; True after `min_s` if it cannot be read.
        """
        self._check_ready()
        begin = self._device.now()
        before = self._device.clock_mhz()
        while True:
            slice_end = self._device.now() + 0.05
            while self._device.now() < slice_end:
                self._work()
                self._device.synchronize()
            clock = self._device.clock_mhz()
            steady = clock is None or before is None or abs(clock - before) < 0.01 * before
            before = clock
            elapsed = self._device.now() - begin
            if (steady and elapsed >= min_s) or elapsed >= max_s:
                self._calibrate()  # cycles are shorter now than on an idle device
                return steady

    def burst(self, *, seconds: float | None = None, count: int | None = None) -> Burst:
        """Takes samples for about `seconds` of wall time, or `count` samples; at least one."""
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
        self._before()
        if self.hides_launches:
            sleep_s = min(self._sleep_s * 2**self._exposed, self.MAX_SLEEP_S)
            device.sleep(int(sleep_s * self._cycles_per_s))
        device.flush()
        start = device.mark()
        called = device.now()
        self._work()
        returned = device.now()
        stop = device.mark()
        # If the device has not reached the start yet, the whole call was queued before it began.
        exposed = start.passed()
        device.synchronize()
        if exposed:
            burst.exposed.append(len(burst.device_s))
        self._exposed = self._exposed + 1 if exposed else 0
        if self._exposed >= self.TRIES:
            self.hides_launches = False
        burst.device_s.append(stop.seconds_since(start))
        burst.host_s.append(returned - called)

    def _calibrate(self) -> None:
        """Measures the device's cycles per second, and how long the host takes to queue a sample."""
        device = self._device
        device.sleep(self.CALIBRATION_CYCLES)  # the first launch loads the kernel
        start = device.mark()
        device.sleep(self.CALIBRATION_CYCLES)
        stop = device.mark()
        device.synchronize()
        self._cycles_per_s = self.CALIBRATION_CYCLES / stop.seconds_since(start)
        queued = []
        for _ in range(3):
            begin = device.now()
            device.flush()
            device.mark()
            self._work()
            device.mark()
            queued.append(device.now() - begin)
            device.synchronize()
        self._sleep_s = self.MARGIN * min(queued)  # the least: every disturbance of the host makes it slower

    def _check_ready(self) -> None:
        if not self._ready:
            raise RuntimeError("nothing was called yet: take first_call() before warm() and burst()")


class TorchMark:
    """A CUDA event, recorded at its creation."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def passed(self) -> bool:
        return bool(self._event.query())

    def seconds_since(self, earlier: Self) -> float:
        return float(earlier._event.elapsed_time(self._event)) / 1e3


class TorchDevice:
    """The current CUDA device, used through torch."""

    LARGEST_L2_BYTES = 2**27
    """The largest L2 cache of any device so far, flushed if the driver does not report the size."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        words = 2 * (properties.L2_cache_size or self.LARGEST_L2_BYTES) // 4
        self._written = torch.empty(words, dtype=torch.int32, device="cuda")
        self._read = torch.zeros(words, dtype=torch.float32, device="cuda")
        self._sum = torch.zeros((), dtype=torch.float32, device="cuda")

    def now(self) -> float:
        return time.perf_counter()

    def mark(self) -> TorchMark:
        return TorchMark()

    def sleep(self, cycles: int) -> None:
        torch.cuda._sleep(cycles)  # private, but torch's own tests use it to delay a stream

    def flush(self) -> None:
        # Lines just written must be written back before they can be replaced, and that would be charged to the work. Reading
        # another buffer after writing one leaves a cache full of lines that can simply be dropped.
        self._written.zero_()
        torch.sum(self._read, dim=0, out=self._sum)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, work: Work) -> Work:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # the set-up of libraries in their first calls on a stream cannot be captured
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=side):
                work()
        except RuntimeError as error:  # every CUDA error is one
            # Ending a failed capture raises another error on top of the work's.
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
