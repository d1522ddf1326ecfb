"""Clock, memory and FLOP counters against independent accounts: known allocations, memray, sums by hand."""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import memray
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from evals.benchmark.workloads import prepare
from evals.cli.jobs import read_job
from evals.isolation.worker import run_isolated
from evals.measure.clock import CpuClock
from evals.measure.flops import count_flops
from evals.measure.memory import peak_allocated_bytes, process_peak_bytes
from evals.paths import CONF

MIB = 2**20
FIRST = [48, 8, 16]


def staircase() -> Tensor:
    """Holds at most 64 MiB: 32, then 32 + 32 before the first is released, then less."""
    a = torch.ones(8 * MIB)
    b = a + 1
    del a
    return b[: 2 * MIB].clone()


def test_the_peak_of_known_allocations_is_exact() -> None:
    assert 0 <= peak_allocated_bytes(staircase) - 64 * MIB < 64  # the 1 is a tensor of its own


def test_memory_held_before_does_not_count() -> None:
    held = torch.ones(8 * MIB)
    assert 0 <= peak_allocated_bytes(lambda: held[:MIB] + 1) - 4 * MIB < 64


def test_the_process_peak_contains_known_allocations_and_the_cost_of_a_first_call() -> None:
    result = run_isolated(process_peak_bytes, staircase, timeout_s=60)
    assert result.outcome == "ok"
    assert 64 * MIB <= result.value < 80 * MIB


@pytest.mark.parametrize(
    ("name", "seq_len"), [("standard", 4000), ("bsbr", 4000), ("linear", 3001), ("delta_net", 2500), ("sparse", 4000)]
)
def test_the_peak_agrees_with_memray_within_a_percent(name: str, seq_len: int, tmp_path: Path) -> None:
    """memray sees every malloc and mmap of the process, those of C++ included; here most bytes are torch's tensors."""
    result = run_isolated(both_peaks, name, seq_len, tmp_path / "trace.bin", timeout_s=120)
    assert (result.outcome, result.detail) == ("ok", "")
    ours, theirs = result.value
    assert ours == pytest.approx(theirs, rel=0.01)


def both_peaks(name: str, seq_len: int, trace: Path) -> tuple[int, int]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        comparison = read_job(
            compose("config", [f"attention=[{name}]", f"shape.seq_len={seq_len}", "shape.batch_size=4", "device.threads=1"])
        )
    call = prepare(comparison, comparison.candidates[0]).work.call
    call()  # sets up libraries, which is no part of the peak
    with memray.Tracker(trace):
        call()
    theirs = memray.FileReader(trace).metadata.peak_memory
    return peak_allocated_bytes(call), theirs


def test_a_time_slice_has_at_least_one_call_and_every_sample_is_a_call() -> None:
    calls: list[int] = []
    clock = CpuClock(partial(calls.append, 1))
    assert clock.first_call() > 0
    assert len(calls) == 1
    assert len(clock.time_slice(1e-9).samples_s) == 1
    before = len(calls)
    samples = clock.time_slice(0.005).samples_s
    # Calls in the first tenth warm up and give no samples.
    assert 1 < len(samples) < len(calls) - before


def test_samples_are_the_seconds_of_their_calls() -> None:
    """The samples of calls of different known lengths differ accordingly, in order."""
    sizes = iter([1, *FIRST * 50])
    buffers = {size: torch.ones(size * MIB // 4) for size in (1, *FIRST)}

    def work() -> None:
        buffers[next(sizes)].sum()

    clock = CpuClock(work)
    clock.first_call()
    samples = [clock.time_slice(1e-9).samples_s[0] for _ in range(90)]
    large, small, middle = (statistics.median(samples[at::3]) for at in range(3))
    assert small < middle < large


@pytest.mark.parametrize(
    ("work", "flops"),
    [
        (lambda: torch.ones(3, 5) @ torch.ones(5, 7), 2 * 3 * 5 * 7),
        (lambda: torch.bmm(torch.ones(2, 3, 5), torch.ones(2, 5, 7)), 2 * 2 * 3 * 5 * 7),
        (lambda: torch.nn.functional.scaled_dot_product_attention(*(torch.ones(1, 2, 6, 4) for _ in range(3))), 2 * 2 * 6 * 6 * 8),
    ],
)
def test_flops_by_hand(work: Callable[[], Tensor], flops: int) -> None:
    assert count_flops(work) == flops
