"""Rooflines worked by hand, their monotonicity, and the proof that an impossible sample needs."""

import json
import math
from dataclasses import asdict

import pytest
import torch

from evals.stats.roofline import Peaks, Roofline, bandwidth, implausible_peak, impossible, merge_peaks, roofline

KIB, MIB = 2**10, 2**20


def one_thread(flops_per_s: float = 1e9, *ladder: tuple[int, float]) -> Peaks:
    ladder = ladder or ((64 * KIB, 100e6), (1 * MIB, 50e6), (16 * MIB, 10e6))
    return Peaks(flops_per_s, ladder, 1, flops_per_s, ladder)


@pytest.mark.parametrize(
    ("flops", "min_bytes", "seconds", "bound"),
    [
        (3e9, 0, 3.0, "compute"),
        (0, 32 * MIB, 32 * MIB / 10e6, "memory"),
        (1e9, 1 * MIB, 1.0, "compute"),
        (1e6, 1 * MIB, 1 * MIB / 50e6, "memory"),
        (0, 0, 0.0, "memory"),
    ],
)
def test_the_roofline_is_the_larger_of_two_times(flops: float, min_bytes: float, seconds: float, bound: str) -> None:
    limit = roofline(flops, min_bytes, one_thread())
    assert limit.seconds == pytest.approx(seconds)
    assert limit.bound == bound
    assert limit.provable_s == limit.seconds


def test_between_two_working_sets_the_faster_counts_and_below_all_of_them_the_fastest() -> None:
    ladder = one_thread().bytes_per_s
    assert bandwidth(16 * MIB - 1, ladder) == 50e6
    assert bandwidth(16 * MIB, ladder) == 10e6
    assert bandwidth(1000 * MIB, ladder) == 10e6
    assert bandwidth(10, ladder) == 100e6


def test_a_working_set_is_at_least_as_fast_as_larger_ones() -> None:
    ladder = ((64 * KIB, 5e6), (1 * MIB, 50e6), (16 * MIB, 10e6))
    assert bandwidth(64 * KIB, ladder) == 50e6


def test_the_roofline_never_falls_with_more_work() -> None:
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
            for limits in (by_bytes, by_flops):
                assert [limit.seconds for limit in limits] == sorted(limit.seconds for limit in limits)
                assert [limit.provable_s for limit in limits] == sorted(limit.provable_s for limit in limits)
                assert all(limit.provable_s <= limit.seconds for limit in limits)


def test_threads_that_were_disturbed_together_prove_only_the_bound_of_one_thread() -> None:
    """Four threads together reached the rate of one alone: only a quarter of that time is certain to be needed."""
    ladder = ((64 * KIB, 1e9), (1 * MIB, 1e9))
    disturbed = Peaks(10e9, ladder, 4, 10e9, ladder)
    limit = roofline(40e9, 8 * MIB, disturbed)
    assert limit.seconds == pytest.approx(4.0)
    assert limit.provable_s == pytest.approx(1.0)
    assert impossible(1.01, limit, tolerance=0.0) is None
    assert impossible(0.99, limit, tolerance=0.0) is not None


def test_a_share_of_a_working_set_may_fit_into_a_faster_cache() -> None:
    ladder = ((64 * KIB, 100e6), (1 * MIB, 10e6))
    limit = roofline(0, 1 * MIB, Peaks(1e9, ladder, 16, 1e9, ladder))
    assert limit.seconds == pytest.approx(1 * MIB / 10e6)
    assert limit.provable_s == pytest.approx(1 * MIB / 16 / 100e6)


def test_an_impossible_sample_is_reported_with_both_numbers() -> None:
    message = impossible(0.00123, Roofline(0.00456, "compute", 0.00456), tolerance=0.2)
    assert message is not None
    assert "a call took 0.00123 s" in message
    assert "at least 0.00456 s" in message
    assert "tolerance 20%" in message


@pytest.mark.parametrize(("latency_s", "is_impossible"), [(0.69, True), (0.71, False), (1.0, False), (50.0, False)])
def test_the_tolerance_is_a_fraction_of_the_roofline(latency_s: float, is_impossible: bool) -> None:
    assert (impossible(latency_s, Roofline(1.0, "memory", 1.0), tolerance=0.3) is not None) == is_impossible


def test_a_difference_below_the_clocks_resolution_is_not_impossible() -> None:
    assert impossible(1e-7, Roofline(1e-6, "memory", 1e-6), tolerance=0.0) is None


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, math.nan])
def test_a_tolerance_is_a_fraction(tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance must be a fraction"):
        impossible(1.0, Roofline(1.0, "memory", 1.0), tolerance=tolerance)


def test_the_fraction_of_the_peak_is_at_most_1_or_unknown() -> None:
    assert Roofline(2.0, "compute", 1.0).fraction(4.0) == 0.5
    assert Roofline(2.0, "compute", 1.0).fraction(2.0) == 1.0
    assert Roofline(2.0, "compute", 1.0).fraction(1.5) is None


def test_a_memory_peak_below_what_must_be_held_is_reported_with_both_numbers() -> None:
    assert implausible_peak(4096, 4096) is None
    message = implausible_peak(4095, 4096)
    assert message is not None
    assert "4095" in message
    assert "4096" in message


def test_merged_peaks_have_the_highest_of_each_rate() -> None:
    first = Peaks(5.0, ((1, 10.0), (2, 3.0)), 2, 4.0, ((1, 1.0), (2, 1.0)))
    second = Peaks(4.0, ((1, 9.0), (2, 7.0), (4, 2.0)), 2, 6.0, ((1, 2.0), (2, 0.5)))
    both = Peaks(5.0, ((1, 10.0), (2, 7.0), (4, 2.0)), 2, 6.0, ((1, 2.0), (2, 1.0)))
    assert merge_peaks(first, second) == merge_peaks(second, first) == both
    assert merge_peaks(first) == first


def test_no_peaks_and_peaks_of_different_threads_are_not_merged() -> None:
    with pytest.raises(ValueError, match=r"same number of threads, got \[\]"):
        merge_peaks()
    ladder = ((1, 1.0),)
    with pytest.raises(ValueError, match=r"got \[1, 2\]"):
        merge_peaks(Peaks(1.0, ladder, 1, 1.0, ladder), Peaks(1.0, ladder, 2, 1.0, ladder))


def test_peaks_survive_json() -> None:
    peaks = Peaks(5.5, ((1, 10.0), (2, 3.0)), 2, 4.0, ((1, 1.0),))
    assert Peaks.from_record(json.loads(json.dumps(asdict(peaks)))) == peaks


@pytest.mark.parametrize("ladder", [(), ((2, 1.0), (1, 1.0)), ((1, 1.0), (1, 2.0)), ((1, 0.0),), ((1, math.nan),)])
def test_bad_peaks_are_refused(ladder: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        Peaks(1.0, ladder, 1, 1.0, ((1, 1.0),))


@pytest.mark.parametrize(("flops", "min_bytes"), [(-1, 0), (0, -1), (math.nan, 0)])
def test_amounts_are_not_negative(flops: float, min_bytes: float) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        roofline(flops, min_bytes, one_thread())
