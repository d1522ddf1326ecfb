"""Floors worked by hand, their monotony, and that what cannot be proven is not claimed."""

import json
import math
from itertools import pairwise
from types import SimpleNamespace

import psutil
import pytest
import torch

from evals.isolation.worker import run_isolated
from evals.measure import peaks as module
from evals.measure.peaks import measure_peaks
from evals.stats.roofline import Peaks, Roofline, bandwidth, implausible_peak, impossible, merge_peaks, roofline

KIB, MIB = 2**10, 2**20


def one_thread(flops_per_s: float = 1e9, *ladder: tuple[int, float]) -> Peaks:
    ladder = ladder or ((64 * KIB, 100e6), (1 * MIB, 50e6), (16 * MIB, 10e6))
    return Peaks(flops_per_s, ladder, 1, flops_per_s, ladder)


# --- pure functions -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flops", "min_bytes", "seconds", "limit"),
    [
        (3e9, 0, 3.0, "compute"),
        (0, 32 * MIB, 32 * MIB / 10e6, "memory"),
        (1e9, 1 * MIB, 1.0, "compute"),
        (1e6, 1 * MIB, 1 * MIB / 50e6, "memory"),
        (0, 0, 0.0, "memory"),
    ],
)
def test_a_floor_is_the_larger_of_two_times(flops: float, min_bytes: float, seconds: float, limit: str) -> None:
    found = roofline(flops, min_bytes, one_thread())
    assert found.seconds == pytest.approx(seconds)
    assert found.bound == limit
    assert found.provable_s == found.seconds


def test_between_two_working_sets_the_faster_counts_and_below_all_of_them_the_fastest() -> None:
    ladder = one_thread().bytes_per_s
    assert bandwidth(16 * MIB - 1, ladder) == 50e6
    assert bandwidth(16 * MIB, ladder) == 10e6
    assert bandwidth(1000 * MIB, ladder) == 10e6
    assert bandwidth(10, ladder) == 100e6


def test_a_step_that_was_measured_in_a_bad_moment_is_as_fast_as_what_fits_less_well() -> None:
    ladder = ((64 * KIB, 5e6), (1 * MIB, 50e6), (16 * MIB, 10e6))
    assert bandwidth(64 * KIB, ladder) == 50e6


def test_a_floor_never_falls_when_there_is_more_to_do() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        rates = (1e9 * torch.rand(8, generator=generator).double() + 1e6).tolist()
        whole = tuple((64 * KIB * 2**step, rate) for step, rate in enumerate(rates))
        part = tuple((size, 0.7 * rate) for size, rate in whole)
        machine = Peaks(1e9, whole, 3, 0.5e9, part)
        amounts = [2**exponent for exponent in range(30)]
        for fixed in (0, 10**6):
            by_bytes = [roofline(fixed, amount, machine) for amount in amounts]
            by_flops = [roofline(amount, fixed, machine) for amount in amounts]
            for floors in (by_bytes, by_flops):
                assert [one.seconds for one in floors] == sorted(one.seconds for one in floors)
                assert [one.provable_s for one in floors] == sorted(one.provable_s for one in floors)
                assert all(one.provable_s <= one.seconds for one in floors)


def test_threads_that_were_disturbed_prove_nothing_that_threads_apart_could_beat() -> None:
    """Four threads that got 1 GFLOP/s together, where one got 10: nothing below 1/40 of the time at 1 is impossible before that."""
    ladder = ((64 * KIB, 1e9), (1 * MIB, 1e9))
    disturbed = Peaks(10e9, ladder, 4, 10e9, ladder)
    found = roofline(40e9, 8 * MIB, disturbed)
    assert found.seconds == pytest.approx(4.0)
    assert found.provable_s == pytest.approx(1.0)
    assert impossible(1.01, found, tolerance=0.0) is None
    assert impossible(0.99, found, tolerance=0.0) is not None


def test_a_share_of_a_working_set_may_fit_into_a_faster_cache() -> None:
    ladder = ((64 * KIB, 100e6), (1 * MIB, 10e6))
    found = roofline(0, 1 * MIB, Peaks(1e9, ladder, 16, 1e9, ladder))
    assert found.seconds == pytest.approx(1 * MIB / 10e6)
    assert found.provable_s == pytest.approx(1 * MIB / 16 / 100e6)


def test_an_impossible_sample_is_told_with_both_numbers() -> None:
    words = impossible(0.00123, Roofline(0.00456, "compute", 0.00456), tolerance=0.2)
    assert words is not None
    assert "a call took 0.00123 s" in words
    assert "at least 0.00456 s" in words
    assert "tolerance 20%" in words


@pytest.mark.parametrize(("latency_s", "is_impossible"), [(0.69, True), (0.71, False), (1.0, False), (50.0, False)])
def test_the_tolerance_is_a_part_of_the_floor(latency_s: float, is_impossible: bool) -> None:
    assert (impossible(latency_s, Roofline(1.0, "memory", 1.0), tolerance=0.3) is not None) == is_impossible


def test_what_a_clock_does_not_resolve_is_not_impossible() -> None:
    assert impossible(1e-7, Roofline(1e-6, "memory", 1e-6), tolerance=0.0) is None


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, math.nan])
def test_a_tolerance_is_a_fraction(tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance must be a fraction"):
        impossible(1.0, Roofline(1.0, "memory", 1.0), tolerance=tolerance)


def test_the_part_of_a_ceiling_is_at_most_all_of_it_or_unknown() -> None:
    assert Roofline(2.0, "compute", 1.0).fraction(4.0) == 0.5
    assert Roofline(2.0, "compute", 1.0).fraction(2.0) == 1.0
    assert Roofline(2.0, "compute", 1.0).fraction(1.5) is None


def test_a_peak_below_what_is_held_is_told_with_both_numbers() -> None:
    assert implausible_peak(4096, 4096) is None
    words = implausible_peak(4095, 4096)
    assert words is not None
    assert "4095" in words
    assert "4096" in words


def test_the_highest_of_several_measurements_is_that_of_each_rate() -> None:
    first = Peaks(5.0, ((1, 10.0), (2, 3.0)), 2, 4.0, ((1, 1.0), (2, 1.0)))
    second = Peaks(4.0, ((1, 9.0), (2, 7.0), (4, 2.0)), 2, 6.0, ((1, 2.0), (2, 0.5)))
    both = Peaks(5.0, ((1, 10.0), (2, 7.0), (4, 2.0)), 2, 6.0, ((1, 2.0), (2, 1.0)))
    assert merge_peaks(first, second) == merge_peaks(second, first) == both
    assert merge_peaks(first) == first


def test_ceilings_of_nothing_or_of_unlike_threads_do_not_merge() -> None:
    with pytest.raises(ValueError, match=r"same number of threads, got \[\]"):
        merge_peaks()
    ladder = ((1, 1.0),)
    with pytest.raises(ValueError, match=r"got \[1, 2\]"):
        merge_peaks(Peaks(1.0, ladder, 1, 1.0, ladder), Peaks(1.0, ladder, 2, 1.0, ladder))


def test_ceilings_come_back_from_json() -> None:
    ceilings = Peaks(5.5, ((1, 10.0), (2, 3.0)), 2, 4.0, ((1, 1.0),))
    assert Peaks.from_record(json.loads(json.dumps(ceilings.as_record()))) == ceilings


@pytest.mark.parametrize("ladder", [(), ((2, 1.0), (1, 1.0)), ((1, 1.0), (1, 2.0)), ((1, 0.0),), ((1, math.nan),)])
def test_ceilings_that_cannot_be_are_refused(ladder: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        Peaks(1.0, ladder, 1, 1.0, ((1, 1.0),))


@pytest.mark.parametrize(("flops", "min_bytes"), [(-1, 0), (0, -1), (math.nan, 0)])
def test_amounts_are_not_negative(flops: float, min_bytes: float) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        roofline(flops, min_bytes, one_thread())


# --- measuring ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "threads"), [("float32", 1), ("bfloat16", 2)])
def test_every_rate_is_measured_in_a_process_of_its_own(dtype: str, threads: int) -> None:
    before = torch.get_num_threads()
    result = run_isolated(measure_peaks, "cpu", getattr(torch, dtype), threads, 0.0, timeout_s=120)
    assert result.outcome == "ok", result.detail
    measured = result.value
    assert isinstance(measured, Peaks)
    assert measured.threads == threads
    sizes = [size for size, _ in measured.bytes_per_s]
    assert sizes == [size for size, _ in measured.thread_bytes_per_s]
    assert sizes[0] == 64 * KIB
    assert all(larger == 2 * smaller for smaller, larger in pairwise(sizes))
    assert measured.flops_per_s >= measured.thread_flops_per_s > 0
    assert all(every >= one for (_, every), (_, one) in zip(measured.bytes_per_s, measured.thread_bytes_per_s, strict=True))
    assert torch.get_num_threads() == before


def test_working_sets_leave_three_quarters_of_the_free_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 * MIB))
    assert sorted({size for size, _ in module.memory_passes("cpu")}) == [64 * KIB, 128 * KIB, 256 * KIB]


def test_what_is_timed_goes_over_all_of_the_working_set() -> None:
    """A pass that touched less than it is counted for would raise the ceiling above the machine's."""
    for size, call in list(module.memory_passes("cpu"))[:6]:
        moved = call()
        assert isinstance(moved, torch.Tensor)
        if moved.ndim == 0:  # a sum of ones says how many were read
            assert moved.item() * 4 == size
        else:  # half is read and half is written
            assert moved.nbytes * 2 == size


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_ceilings_are_those_of_a_gpu() -> None:
    measured = run_isolated(measure_peaks, "cuda", torch.bfloat16, 1, timeout_s=120).value
    assert 1e12 < measured.flops_per_s < 5e15
    assert 1e11 < measured.bytes_per_s[-1][1] < 1e13
