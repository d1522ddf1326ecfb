"""Intervals: exact cases, and coverage of the true value in simulations."""

import math

import numpy as np
import pytest
import scipy.stats

from evals.stats.intervals import Interval, half_width, mean_interval, median_interval, speedup_interval
from evals.stats.verdicts import verdicts

Rounds = list[list[float]]


def noisy_rounds(generator: np.random.Generator, between: float, lengths: list[int], within: float = 0.05) -> Rounds:
    """Log-normal samples whose true median is 1."""
    return [list(np.exp(generator.normal(0, between) + generator.normal(0, within, length))) for length in lengths]


def as_time_slices(rounds: Rounds) -> list[list[list[float]]]:
    """A time slice for each sample."""
    return [[[sample] for sample in one] for one in rounds]


def width(interval: Interval) -> float:
    return math.log(interval.high / interval.low)


def coverage(intervals: list[Interval], truth: float) -> float:
    return sum(interval.low <= truth <= interval.high for interval in intervals) / len(intervals)


@pytest.mark.parametrize("lengths", [[1, 1], [3], [2, 5], [7, 30, 4]])
def test_value_is_the_median_of_all_samples_and_lies_in_its_interval(lengths: list[int]) -> None:
    generator = np.random.default_rng(0)
    rounds = noisy_rounds(generator, 0.1, lengths)
    interval = median_interval(rounds, generator=generator)
    everything = sorted(sample for one in rounds for sample in one)
    middle = len(everything) // 2
    truth = everything[middle] if len(everything) % 2 else (everything[middle - 1] + everything[middle]) / 2
    assert interval.value == pytest.approx(truth, rel=1e-12)
    assert interval.low < interval.value < interval.high


# 400 draws leave a standard error of 0.011 at 0.95: the bounds stand three of them from what longer runs gave
# (0.94 to 0.96; 0.99 without noise between rounds), and far from the 0.6 to 0.86 of plain percentiles.
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("between", [0.025, 0.05, 0.15])
def test_interval_of_few_noisy_rounds_covers_the_truth(count: int, between: float) -> None:
    generator = np.random.default_rng(count)
    intervals = [
        median_interval(noisy_rounds(generator, between, [30] * count), resamples=400, generator=generator) for _ in range(400)
    ]
    assert 0.90 <= coverage(intervals, 1.0) <= 0.99


def test_interval_covers_the_truth_under_skew_and_outliers_in_rounds_of_unlike_length() -> None:
    generator = np.random.default_rng(0)

    def noise(size: int) -> np.ndarray:
        return generator.exponential(0.05, size) + 0.5 * (generator.random(size) < 0.05)

    truth = float(np.exp(np.median(generator.normal(0, 0.05, 1_000_000) + noise(1_000_000))))
    intervals = []
    for _ in range(400):
        rounds = [list(np.exp(generator.normal(0, 0.05) + noise(length))) for length in (30, 17, 24)]
        intervals.append(median_interval(rounds, resamples=400, generator=generator))
    assert 0.88 <= coverage(intervals, truth) <= 0.99


def test_a_lower_confidence_gives_a_narrower_interval_that_covers_less() -> None:
    generator = np.random.default_rng(0)
    data = [noisy_rounds(generator, 0.05, [30] * 3) for _ in range(300)]
    half = [median_interval(rounds, confidence=0.5, resamples=400, generator=generator) for rounds in data]
    assert 0.40 <= coverage(half, 1.0) <= 0.66


def test_single_round_covers_its_own_median() -> None:
    generator = np.random.default_rng(0)
    intervals = [median_interval(noisy_rounds(generator, 0.0, [30]), resamples=400, generator=generator) for _ in range(400)]
    assert 0.90 <= coverage(intervals, 1.0) <= 0.99


def test_more_rounds_that_agree_narrow_the_interval() -> None:
    generator = np.random.default_rng(0)
    widths = [
        np.median([width(median_interval(noisy_rounds(generator, 0.05, [30] * n), generator=generator)) for _ in range(30)])
        for n in (2, 3, 5, 10)
    ]
    assert widths == sorted(widths, reverse=True)


def test_speedup_covers_the_truth_under_shared_and_separate_noise() -> None:
    generator = np.random.default_rng(0)
    intervals = []
    for _ in range(400):
        shared = np.exp(generator.normal(0, 0.2, 3))
        reference = [[3.0 * s * x for x in one] for s, one in zip(shared, noisy_rounds(generator, 0.05, [30] * 3), strict=True)]
        ours = [[s * x for x in one] for s, one in zip(shared, noisy_rounds(generator, 0.05, [11] * 3), strict=True)]
        intervals.append(speedup_interval(as_time_slices(reference), as_time_slices(ours), resamples=400, generator=generator))
    assert 0.90 <= coverage(intervals, 3.0) <= 0.995


def test_a_slow_round_cancels_in_the_speedup() -> None:
    generator = np.random.default_rng(0)
    reference, ours = noisy_rounds(generator, 0.0, [30] * 3), noisy_rounds(generator, 0.0, [30] * 3)
    slowed = [2.0, 1.0, 0.6]
    reference = [[4.0 * s * x for x in one] for s, one in zip(slowed, reference, strict=True)]
    ours = [[s * x for x in one] for s, one in zip(slowed, ours, strict=True)]
    paired = speedup_interval(as_time_slices(reference), as_time_slices(ours), generator=np.random.default_rng(1))
    alone = median_interval(ours, generator=np.random.default_rng(1))
    assert paired.low < 4.0 < paired.high
    assert width(paired) < width(alone) / 3
    # The same samples with the pairs torn apart know far less.
    unpaired = speedup_interval(
        as_time_slices(reference[1:] + reference[:1]), as_time_slices(ours), generator=np.random.default_rng(1)
    )
    assert width(unpaired) > 3 * width(paired)


def test_a_slow_time_slice_of_both_cancels_in_the_speedup() -> None:
    generator = np.random.default_rng(0)
    drift = np.exp(generator.normal(0, 0.5, (4, 10)))
    reference = [[[4.0 * s * (1 + 0.01 * x) for x in generator.normal(size=5)] for s in one] for one in drift]
    ours = [[[s * (1 + 0.01 * x) for x in generator.normal(size=8)] for s in one] for one in drift]
    speedup = speedup_interval(reference, ours, generator=generator)
    assert speedup.low < 4.0 < speedup.high
    assert width(speedup) < 0.05


def test_exact_ratios_give_exact_speedups() -> None:
    generator = np.random.default_rng(0)
    constant = speedup_interval(as_time_slices([[6.0] * 5, [6.0] * 3]), as_time_slices([[2.0] * 4, [2.0]]), generator=generator)
    assert (constant.value, constant.low, constant.high) == pytest.approx((3.0, 3.0, 3.0), rel=1e-12)
    assert constant.p_value == 0.5  # two rounds have the same sign with this probability


@pytest.mark.parametrize("change", [1.0, 1.0 + 2**-52])
def test_rounds_that_are_equal_to_the_last_bit_are_no_proof(change: float) -> None:
    generator = np.random.default_rng(0)

    def p_value(reference: float, count: int) -> float:
        rounds = [[reference]] * (count - 1) + [[reference * change]]
        return speedup_interval(as_time_slices(rounds), as_time_slices([[2.0]] * count), generator=generator).p_value

    assert p_value(3.0, 2) == 0.5
    assert verdicts([speedup_interval([[[3.0]]] * 2, [[[2.0]]] * 2, generator=generator)], [0.0]) == ["ambiguous"]
    assert p_value(3.0, 5) == scipy.stats.binomtest(5, 5).pvalue
    assert p_value(2.0, 5) == 1


def test_a_change_of_units_changes_nothing_but_units() -> None:
    rounds = noisy_rounds(np.random.default_rng(0), 0.1, [7, 30, 4])
    other = noisy_rounds(np.random.default_rng(1), 0.1, [5, 9, 30])
    scaled = [[sample * 1e-9 for sample in one] for one in rounds]
    seconds = median_interval(rounds, generator=np.random.default_rng(2))
    nanoseconds = median_interval(scaled, generator=np.random.default_rng(2))
    assert (nanoseconds.value, nanoseconds.low, nanoseconds.high) == pytest.approx(
        (seconds.value * 1e-9, seconds.low * 1e-9, seconds.high * 1e-9), rel=1e-9
    )
    ratio = speedup_interval(as_time_slices(other), as_time_slices(rounds), generator=np.random.default_rng(2))
    ratio_scaled = speedup_interval(as_time_slices(other), as_time_slices(scaled), generator=np.random.default_rng(2))
    assert (ratio_scaled.value, ratio_scaled.low) == pytest.approx((ratio.value * 1e9, ratio.low * 1e9), rel=1e-9)


def test_swapping_the_sides_inverts_the_speedup() -> None:
    generator = np.random.default_rng(0)
    a, b = (as_time_slices(noisy_rounds(generator, 0.1, [30] * 3)) for _ in range(2))
    one = speedup_interval(a, b, resamples=20_000, generator=generator)
    other = speedup_interval(b, a, resamples=20_000, generator=generator)
    # The median of an even number is the arithmetic mean of the middle two, which inversion does not keep.
    assert one.value == pytest.approx(1 / other.value, rel=1e-4)
    # The bounds are Monte Carlo estimates of heavy-tailed percentiles, and agree as well as those do.
    assert math.log(one.low) == pytest.approx(-math.log(other.high), rel=0.15)


def test_the_generator_is_the_only_source_of_chance() -> None:
    rounds = noisy_rounds(np.random.default_rng(0), 0.1, [30, 29])
    first, again, other = (median_interval(rounds, generator=np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_the_samples_given_are_not_changed() -> None:
    rounds = [np.array([3.0, 1.0, 2.0]), np.array([5.0, 4.0])]
    median_interval(rounds, generator=np.random.default_rng(0))  # type: ignore[arg-type]
    assert [one.tolist() for one in rounds] == [[3.0, 1.0, 2.0], [5.0, 4.0]]


def test_a_single_sample_has_a_value_and_no_bounds() -> None:
    generator = np.random.default_rng(0)
    alone = median_interval([[2.0]], generator=generator)
    ratio = speedup_interval([[[6.0]]], [[[2.0, 2.1, 1.9]]], generator=generator)
    assert alone.value == pytest.approx(2.0)
    assert ratio.value == pytest.approx(3.0)
    assert all(math.isnan(bound) for bound in (alone.low, alone.high, ratio.low, ratio.high))


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        ([], "at least one round"),
        ([[1.0], []], r"rounds\[1\]"),
        ([[1.0, 0.0]], "positive and finite, got 0.0"),
        ([[1.0], [2.0, -3.0]], r"got -3.0 in rounds\[1\]"),
        ([[1.0, math.nan]], "got nan"),
        ([[1.0, math.inf]], "got inf"),
    ],
)
def test_bad_samples_are_refused(rounds: Rounds, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        median_interval(rounds, generator=np.random.default_rng(0))


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_confidence_is_a_probability(confidence: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        median_interval([[1.0, 2.0]], confidence=confidence, generator=np.random.default_rng(0))


def test_resamples_are_at_least_one() -> None:
    with pytest.raises(ValueError, match="resamples must be a positive integer"):
        median_interval([[1.0, 2.0]], resamples=0, generator=np.random.default_rng(0))


def test_unpaired_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 of the reference and 1 of the candidate"):
        speedup_interval([[[1.0]], [[1.0]]], [[[1.0]]], generator=np.random.default_rng(0))


def test_half_width_is_students_interval_of_the_rounds() -> None:
    # Medians of exp(±0.1): sd 0.1414, t of one degree of freedom 12.706.
    assert half_width([[math.exp(0.1)], [math.exp(-0.1)] * 3]) == pytest.approx(math.expm1(12.7062 * 0.1), rel=1e-4)
    assert half_width([[1.0]]) == math.inf


def test_a_mean_over_seeds_has_the_interval_of_student_t() -> None:
    # By hand: mean 2, standard deviation 1, t(0.975, 2) = 4.3027.
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4)
    alone = mean_interval([0.5])
    assert alone.value == 0.5
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    for wrong in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="values must be finite and at least one"):
            mean_interval(wrong)
