"""The clock of a CUDA device: its logic on a simulated device with virtual time, and its readings on a real device."""

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import pynvml  # type: ignore[import-untyped]
import pytest
import torch

from evals.isolation.worker import classify_error
from evals.measure import cuda_clock, cuda_state
from evals.measure.cuda_clock import CannotCapture, CudaClock
from evals.measure.cuda_state import DeviceState, driver_version, read_state, throttle_reason
from evals.measure.memory import cuda_peak_memory

US = 1e-6


class SimulatedMark:
    def __init__(self, device: "Simulated") -> None:
        self.device = device
        self.at = device.launch(0.0)

    def passed(self) -> bool:
        return self.at <= self.device.time

    def seconds_since(self, earlier: "SimulatedMark") -> float:
        assert self.passed(), "an event was read that the device has not reached"
        return self.at - earlier.at


class Simulated:
    """A host and a device with one stream, in virtual time: launches run in order, and no earlier than they were queued.

    Queuing takes the host `launch_s`; what is queued runs for as long as it says. The device holds `depth` launches: the
    host waits to queue more. `cold` is whether the cache was flushed since the data of a kernel was last read.
    """

    def __init__(self, launch_s: float = 5 * US, depth: int = 1024, hertz: float = 1.7e9) -> None:
        self.launch_s, self.depth, self.hertz = launch_s, depth, hertz
        self.time = 100.0
        self.end = 0.0  # of all that is queued
        self.pending: deque[float] = deque()
        self.cold = True
        self.captured: list[float] | None = None
        self.log: list[str] = []
        self.clocks: list[float | None] = [1980.0]

    def launch(self, seconds: float) -> float:
        if self.captured is not None:
            self.captured.append(seconds)
            return math.nan
        while self.pending and self.pending[0] <= self.time:
            self.pending.popleft()
        if len(self.pending) >= self.depth:
            self.time = max(self.time, self.pending.popleft())
        self.time += self.launch_s
        self.end = max(self.end, self.time) + seconds
        self.pending.append(self.end)
        return self.end

    def now(self) -> float:
        return self.time

    def mark(self) -> SimulatedMark:
        self.log.append("mark")
        return SimulatedMark(self)

    def sleep(self, cycles: int) -> None:
        self.log.append("sleep")
        self.launch(cycles / self.hertz)

    def flush(self) -> None:
        self.log.append("flush")
        self.launch(30 * US)
        self.cold = True

    def synchronize(self) -> None:
        if self.captured is not None:
            raise CannotCapture("it waits for the device")
        self.time = max(self.time, self.end)

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """Records the work without running it; a replay is one launch of all kernels."""
        self.log.append("capture")
        self.captured = []
        try:
            work()
            seconds = sum(self.captured)
        finally:
            self.captured = None

        def replay() -> None:
            self.log.append("replay")
            self.launch(seconds)

        return replay

    def clock_mhz(self) -> float | None:
        return self.clocks.pop(0) if len(self.clocks) > 1 else self.clocks[0]


def kernels(device: Simulated, count: int, seconds: float) -> Callable[[], object]:
    def work() -> None:
        device.log.append("work")
        for _ in range(count):
            device.launch(seconds)

    return work


def ready(work: Callable[[], object], device: Simulated, **options: Any) -> CudaClock:
    clock = CudaClock(work, device=device, **options)
    clock.first_call()
    return clock


# --- logic, on the simulated device -------------------------------------------------------------


def test_launches_that_take_longer_than_the_kernels_are_hidden() -> None:
    device = Simulated(launch_s=10 * US)
    burst = ready(kernels(device, 20, 2 * US), device).burst(count=5)
    assert burst.device_s == pytest.approx([20 * 2 * US] * 5)
    assert burst.host_s == pytest.approx([20 * 10 * US] * 5)
    assert burst.exposed == []


def test_the_simulated_device_shows_launches_if_nothing_hides_them() -> None:
    device = Simulated(launch_s=10 * US)
    start = device.mark()
    kernels(device, 20, 2 * US)()
    stop = device.mark()
    device.synchronize()
    assert stop.seconds_since(start) > 20 * 10 * US


def test_the_cache_is_flushed_before_every_sample_and_its_time_is_not_counted() -> None:
    device = Simulated()

    def reads() -> None:
        device.launch(50 * US if device.cold else 5 * US)
        device.cold = False

    clock = ready(reads, device)
    device.log.clear()
    assert clock.burst(count=4).device_s == pytest.approx([50 * US] * 4)
    assert device.log[-16:] == ["sleep", "flush", "mark", "mark"] * 4


@pytest.mark.parametrize("hertz", [1e8, 1.98e9, 4e10])
def test_the_device_is_kept_busy_in_its_own_cycles(hertz: float) -> None:
    device = Simulated(launch_s=20 * US, hertz=hertz)
    clock = ready(kernels(device, 50, 1 * US), device)
    clock.warm()
    begin = device.now()
    burst = clock.burst(count=3)
    assert burst.exposed == []
    assert burst.device_s == pytest.approx([50 * US] * 3)
    queuing_s = 54 * 20 * US
    assert device.now() - begin < 3 * 3 * queuing_s


def test_work_that_waits_for_the_device_is_detected_and_ends() -> None:
    device = Simulated()

    def waits() -> None:
        device.launch(100 * US)
        device.synchronize()  # .item()
        device.time += 300 * US  # and then thinks about it
        device.launch(100 * US)

    clock = ready(waits, device)
    begin = device.now()
    burst = clock.burst(count=50)
    assert not clock.hides_launches
    assert burst.exposed == list(range(50))
    assert min(burst.device_s) >= 500 * US
    assert device.now() - begin < 50 * 2e-3


def test_a_full_queue_is_detected() -> None:
    device = Simulated(launch_s=5 * US, depth=1024)
    clock = ready(kernels(device, 3000, 1 * US), device)
    clock.burst(count=10)
    assert not clock.hides_launches


@pytest.mark.parametrize("pause_s", [3e-3, 30.0])
def test_a_host_that_was_stopped_once_exposes_one_sample(pause_s: float) -> None:
    device = Simulated(launch_s=5 * US)
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1
        kernels(device, 5, 10 * US)()
        if calls == 10:
            device.time += pause_s
        kernels(device, 5, 10 * US)()

    clock = ready(work, device)
    begin = device.now()
    burst = clock.burst(count=20)
    assert len(burst.exposed) == 1
    assert clock.hides_launches
    hidden = [seconds for position, seconds in enumerate(burst.device_s) if position not in burst.exposed]
    assert hidden == pytest.approx([100 * US] * 19)
    assert device.now() - begin - pause_s < 21 * 1e-3


def test_a_host_that_is_stopped_occasionally_does_not_end_the_hiding() -> None:
    device = Simulated()
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1
        if calls % 5 == 0:
            device.time += 3e-3
        device.launch(10 * US)

    clock = ready(work, device)
    assert len(clock.burst(count=50).exposed) == 10
    assert clock.hides_launches


def test_work_that_takes_the_host_very_long_is_not_hidden() -> None:
    device = Simulated(launch_s=1e-3)
    clock = ready(kernels(device, 200, 10 * US), device)
    begin = device.now()
    burst = clock.burst(count=10)
    assert not clock.hides_launches
    assert len(burst.exposed) == 10
    assert device.now() - begin < (3 + 10) * 0.21 + clock.TRIES * clock.MAX_SLEEP_S


def test_no_sample_is_dropped() -> None:
    """Every call of a burst gives a sample, exposed or not."""
    device = Simulated()
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            device.synchronize()
        device.launch(10 * US)

    clock = ready(work, device)
    clock.burst(count=1)
    before = calls
    burst = clock.burst(count=30)
    assert calls - before == len(burst.device_s) == len(burst.host_s) == 30
    assert 0 < len(burst.exposed) < 30


def test_a_graph_is_captured_once_and_replayed() -> None:
    device = Simulated(launch_s=10 * US)
    clock = ready(kernels(device, 20, 2 * US), device, mode="graph")
    assert device.log.count("capture") == 1
    calls = device.log.count("work")
    burst = clock.burst(count=6)
    assert device.log.count("work") == calls
    assert device.log.count("replay") >= 6
    assert burst.device_s == pytest.approx([40 * US] * 6)
    assert burst.host_s == pytest.approx([10 * US] * 6)


def test_work_that_waits_cannot_be_captured() -> None:
    device = Simulated()
    with pytest.raises(CannotCapture, match="waits for the device"):
        CudaClock(device.synchronize, mode="graph", device=device).first_call()


def test_a_failed_capture_is_unsupported() -> None:
    assert classify_error(CannotCapture("it waits for the device")) == "unsupported"


def test_the_first_call_includes_the_time_of_host_and_device() -> None:
    device = Simulated(launch_s=5 * US)
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            device.time += 2.0  # compiles
        device.launch(1e-3)

    assert CudaClock(work, device=device).first_call() == pytest.approx(2.0 + 5 * US + 1e-3)


def test_warming_up_continues_until_the_clock_is_steady() -> None:
    device = Simulated()
    device.clocks = [300.0, 600.0, 900.0, 1200.0, 1500.0, 1800.0, 1980.0, 1980.0]
    clock = ready(kernels(device, 1, 1e-3), device)
    begin = device.now()
    assert clock.warm(min_s=0.05, max_s=2.0)
    assert device.now() - begin == pytest.approx(7 * 0.05, rel=0.1)


def test_warming_up_ends_if_the_clock_never_is_steady() -> None:
    device = Simulated()
    device.clocks = [1000.0, 1500.0] * 100
    clock = ready(kernels(device, 1, 1e-3), device)
    begin = device.now()
    assert not clock.warm(min_s=0.1, max_s=0.5)
    assert device.now() - begin == pytest.approx(0.5, rel=0.2)


def test_warming_up_takes_the_least_time_if_the_clock_cannot_be_read() -> None:
    device = Simulated()
    device.clocks = [None]
    clock = ready(kernels(device, 1, 1e-3), device)
    begin = device.now()
    assert clock.warm(min_s=0.2, max_s=2.0)
    assert device.now() - begin == pytest.approx(0.2, rel=0.3)


def test_a_burst_lasts_as_long_as_given_and_has_at_least_one_sample() -> None:
    device = Simulated()
    clock = ready(kernels(device, 1, 1e-3), device)
    begin = device.now()
    burst = clock.burst(seconds=0.1)
    assert device.now() - begin == pytest.approx(0.1, rel=0.1)
    assert len(burst.device_s) == len(burst.host_s) > 50
    assert len(ready(kernels(device, 1, 1.0), device).burst(seconds=1e-3).device_s) == 1


def test_misuse_raises() -> None:
    device = Simulated()
    clock = CudaClock(kernels(device, 1, US), device=device)
    with pytest.raises(RuntimeError, match="take first_call"):
        clock.burst(count=1)
    clock.first_call()
    with pytest.raises(ValueError, match="either seconds or count, got seconds=None and count=None"):
        clock.burst()
    with pytest.raises(ValueError, match="mode must be eager or graph, got 'fast'"):
        CudaClock(kernels(device, 1, US), mode="fast", device=device)  # type: ignore[arg-type]


COOL = DeviceState(sm_mhz=1980.0, memory_mhz=3201.0, temperature_c=45.0, power_w=300.0, reasons=0)


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ({}, None),
        ({"sm_mhz": 1900.0}, None),  # 4 %
        ({"sm_mhz": 1800.0}, "throttled: SM clock fell from 1980 to 1800 MHz at 45 °C"),
        ({"memory_mhz": 2600.0}, "throttled: memory clock fell from 3201 to 2600 MHz at 45 °C"),
        ({"sm_mhz": 345.0, "reasons": 0x1}, None),  # nothing to do any more
        ({"reasons": 0x2}, None),  # someone set the clocks
        ({"reasons": 0x4}, "throttled: power cap at 45 °C"),
        ({"reasons": 0x8 | 0x40, "temperature_c": 91.0}, "throttled: hardware slowdown, thermal slowdown by the hardware at 91 °C"),
        ({"reasons": 0x20, "temperature_c": None}, "throttled: thermal slowdown by the driver"),
        ({"reasons": None, "sm_mhz": None, "memory_mhz": None}, None),
    ],
)
def test_throttling_is_reported_with_its_reason(after: dict[str, Any], words: str | None) -> None:
    assert throttle_reason(COOL, DeviceState(**{**COOL.__dict__, **after})) == words


def test_a_reason_present_before_counts_and_unknown_states_give_none() -> None:
    hot = DeviceState(**{**COOL.__dict__, "reasons": 0x4})
    assert throttle_reason(hot, COOL) == "throttled: power cap at 45 °C"
    assert throttle_reason(None, COOL) is None
    assert throttle_reason(COOL, None) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what a machine without a GPU says")
def test_without_a_device_there_is_no_state() -> None:
    assert read_state() is None


def test_without_a_driver_there_is_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fails)
    cuda_state.has_driver.cache_clear()
    try:
        assert driver_version() is None
    finally:
        cuda_state.has_driver.cache_clear()


# --- the real thing -----------------------------------------------------------------------------


@pytest.mark.gpu
def test_matrix_products_stay_below_the_data_sheet() -> None:
    """No NVIDIA GPU up to Blackwell does 5 PFLOP/s of dense bfloat16; an H200 does 0.99."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    clock = CudaClock(lambda: a @ a)
    clock.first_call()
    clock.warm()
    burst = clock.burst(count=20)
    peak = 1.05e15 if "H200" in torch.cuda.get_device_name() else 5e15
    assert 0 < 2 * 8192**3 / min(burst.device_s) < peak
    assert burst.exposed == []


@pytest.mark.gpu
def test_a_flushed_cache_is_slower_to_read_than_a_warm_one() -> None:
    half = torch.cuda.get_device_properties(0).L2_cache_size // 8
    source = torch.ones(half // 4, device="cuda")
    target = torch.empty_like(source)
    device = cuda_clock.TorchDevice()
    clock = CudaClock(lambda: target.copy_(source), device=device)
    clock.first_call()
    clock.warm()
    cold = sorted(clock.burst(count=100).device_s)[50]
    device.flush = lambda: None  # type: ignore[method-assign]
    warm = sorted(clock.burst(count=100).device_s)[50]
    assert cold > 1.1 * warm


@pytest.mark.gpu
def test_launches_are_hidden_on_the_device() -> None:
    """A graph of the same kernels has no launches in between: hidden launches come near to its time."""
    x = torch.ones(1024, device="cuda")

    def work() -> None:
        for _ in range(100):
            x.add_(1)

    eager, graph = CudaClock(work), CudaClock(work, mode="graph")
    for clock in (eager, graph):
        clock.first_call()
        clock.warm()
    hidden, replayed = eager.burst(count=50), graph.burst(count=50)
    assert hidden.exposed == []
    assert min(hidden.device_s) < 2.5 * min(replayed.device_s)
    assert min(replayed.host_s) < min(hidden.host_s)


@pytest.mark.gpu
def test_item_is_detected_on_the_device() -> None:
    x = torch.ones(1024, device="cuda")
    clock = CudaClock(lambda: float(x.sum()))
    clock.first_call()
    burst = clock.burst(count=20)
    assert not clock.hides_launches
    assert len(burst.exposed) > 10


@pytest.mark.gpu
def test_item_cannot_be_captured_on_the_device() -> None:
    x = torch.ones(1024, device="cuda")
    with pytest.raises(CannotCapture, match="use mode eager"):
        CudaClock(lambda: float(x.sum()), mode="graph").first_call()


@pytest.mark.gpu
def test_peak_memory_is_that_of_the_tensors() -> None:
    mebibyte = 2**20
    peak = cuda_peak_memory(lambda: torch.ones(64 * mebibyte, device="cuda", dtype=torch.uint8).add(1))
    assert peak.allocated_bytes == 128 * mebibyte
    assert peak.reserved_bytes >= peak.allocated_bytes


@pytest.mark.gpu
def test_the_state_of_a_real_device_is_plausible() -> None:
    state = read_state()
    if state is None:
        pytest.skip("the driver does not say")
    assert state.sm_mhz is None or 100 < state.sm_mhz < 4000
    assert state.temperature_c is None or 0 < state.temperature_c < 120
    assert state.power_w is None or math.isfinite(state.power_w)
