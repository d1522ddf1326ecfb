"""Scaling fits: exact parameters, coverage of the intervals in simulations, and refusals."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from evals.stats.intervals import Interval
from evals.stats.scaling import OVERHEAD, TOO_NOISY, TOO_SHORT, Scaling, agreement, fit_scaling, local_slopes

Rounds = list[list[float]]
SIZES = [128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0]


def noisy(
    generator: np.random.Generator,
    sizes: Sequence[float],
    time: Callable[[float], float],
    between: float,
    rounds: int,
    noise: float,
) -> Rounds:
    """Rounds by size: the true time, with noise per size (caches, the moment) and noise per round."""
    size_noise = generator.normal(0, between, len(sizes))
    return [list(time(n) * np.exp(off + generator.normal(0, noise, rounds))) for n, off in zip(sizes, size_noise, strict=True)]


def holds(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


# --- the exponent ---------------------------------------------------------------------------------


# Every scenario differs in all that could matter. 5 to 9 sizes; overhead up to 40 % of t at the middle size; scatter
# between sizes larger and smaller than between rounds, and none at all.
@pytest.mark.parametrize(
    ("exponent", "overhead", "count", "between", "rounds", "noise"),
    [
        (1.0, 0.0, 6, 0.03, 5, 0.02),
        (1.0, 0.3, 8, 0.02, 3, 0.05),
        (1.5, 0.1, 5, 0.05, 5, 0.01),
        (1.5, 0.4, 9, 0.10, 2, 0.03),
        (2.0, 0.0, 7, 0.00, 5, 0.05),
        (2.0, 0.2, 6, 0.05, 1, 0.02),
    ],
)
def test_the_interval_holds_the_true_exponent_in_at_least_94_percent_of_1000_draws(
    exponent: float, overhead: float, count: int, between: float, rounds: int, noise: float
) -> None:
    generator = np.random.default_rng(0)
    sizes = [128.0 * 2**i for i in range(count)]
    middle = math.sqrt(sizes[0] * sizes[-1])
    fits = [
        fit_scaling(
            sizes,
            noisy(
                generator, sizes, lambda n: 1e-3 * (overhead + (1 - overhead) * (n / middle) ** exponent), between, rounds, noise
            ),
        )
        for _ in range(1000)
    ]
    answered = [fit for fit in fits if not fit.note]
    assert len(answered) >= 980
    covered = sum(holds(fit.exponent, exponent) for fit in answered)
    assert covered >= 0.94 * len(answered)
    assert np.median([fit.exponent.high - fit.exponent.low for fit in answered]) < 0.75  # an interval of everything covers too


def test_an_interval_of_thousands_of_samples_is_as_wide_as_the_scatter_between_sizes() -> None:
    generator = np.random.default_rng(1)
    few, many = (
        [fit_scaling(SIZES, noisy(generator, SIZES, lambda n: n**1.5, 0.05, rounds, 0.02)).exponent for _ in range(50)]
        for rounds in (3, 1000)
    )
    width = [np.median([one.high - one.low for one in some]) for some in (few, many)]
    assert width[1] > 0.8 * width[0]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("a", [0.0, 2.0])
def test_exact_numbers_give_exact_parameters(exponent: float, a: float) -> None:
    fit = fit_scaling(SIZES, [[a + 0.5 * n**exponent] for n in SIZES])
    assert fit.note == ""
    assert fit.exponent.value == pytest.approx(exponent, abs=1e-5)
    assert fit.exponent.high - fit.exponent.low < 1e-3
    assert (fit.a, fit.b) == pytest.approx((a, 0.5), rel=1e-3, abs=1e-3)


def test_units_of_time_and_of_size_change_nothing_but_units() -> None:
    rounds = noisy(np.random.default_rng(3), SIZES, lambda n: 0.3 + (n / 700) ** 1.5, 0.05, 3, 0.02)
    fit = fit_scaling(SIZES, rounds)
    other = fit_scaling([n / 1024 for n in SIZES], [[t * 1e-9 for t in one] for one in rounds])
    assert fit.a > 0
    assert (other.exponent.value, other.exponent.low, other.exponent.high) == pytest.approx(
        (fit.exponent.value, fit.exponent.low, fit.exponent.high), abs=1e-6
    )
    assert other.a == pytest.approx(fit.a * 1e-9, rel=1e-5)
    assert other.b == pytest.approx(fit.b * 1e-9 * 1024**fit.exponent.value, rel=1e-5)


def test_the_order_of_sizes_does_not_matter() -> None:
    rounds = noisy(np.random.default_rng(4), SIZES, lambda n: n**2, 0.05, 3, 0.02)
    assert fit_scaling(SIZES[::-1], rounds[::-1]) == fit_scaling(SIZES, rounds)


@pytest.mark.parametrize("sizes", [[1, 2, 4], [1, 8, 64], [1, 2, 4, 7.9], [100, 110, 120, 130, 140], [7]])
def test_a_short_range_is_refused(sizes: list[float]) -> None:
    fit = fit_scaling(sizes, [[n**2] for n in sizes])
    assert (fit.note, math.isnan(fit.exponent.value), math.isnan(fit.a)) == (TOO_SHORT, True, True)


def test_a_range_of_8_in_4_sizes_is_enough() -> None:
    assert fit_scaling([1, 2, 4, 8], [[n**2] for n in (1, 2, 4, 8)]).exponent.value == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("a", [3e6, 1e8])  # t = a + n²: a is more than half of it up to 1700 and 10000 tokens
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_overhead_that_dominates_is_refused(a: float, noise: float) -> None:
    generator = np.random.default_rng(5)
    fits = [fit_scaling(SIZES, noisy(generator, SIZES, lambda n: a + n**2, noise, 3, noise)) for _ in range(50)]
    assert {fit.note for fit in fits} == {OVERHEAD}


def test_a_flat_noisy_curve_has_no_exponent() -> None:
    generator = np.random.default_rng(6)
    notes = [fit_scaling(SIZES, noisy(generator, SIZES, lambda _: 3.0, 0.02, 3, 0.02)).note for _ in range(200)]
    assert notes.count(OVERHEAD) >= 190


def test_scatter_that_excludes_no_exponent_is_refused() -> None:
    rounds = [[1.0], [30.0], [2.0], [90.0]]
    assert fit_scaling([1, 2, 4, 8], rounds).note == TOO_NOISY


def test_the_same_at_every_size_is_the_exponent_zero() -> None:
    assert fit_scaling(SIZES, [[4096.0]] * 6) == Scaling(Interval(0, 0, 0), 0, pytest.approx(4096), "")


@pytest.mark.parametrize(
    ("sizes", "rounds", "message"),
    [
        ([1, 2], [[1.0]], "got 2 sizes and rounds of 1"),
        ([1, 1], [[1.0], [1.0]], "distinct"),
        ([0, 1], [[1.0], [1.0]], "positive"),
        ([], [], "at least one"),
        ([1, 2], [[1.0], []], r"got \[\] at 2"),
        ([1, 2], [[1.0], [0.0]], r"above 0.0, got \[0.0\] at 2"),
        ([1, 2], [[math.nan], [1.0]], r"got \[nan\] at 1"),
    ],
)
def test_bad_measurements_are_refused(sizes: list[float], rounds: Rounds, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_scaling(sizes, rounds)
    with pytest.raises(ValueError, match=message):
        local_slopes(sizes, rounds)


# --- local slopes ---------------------------------------------------------------------------------


def test_local_slopes_by_hand() -> None:
    slopes = local_slopes([1, 2, 8], [[3.0], [6.0], [6.0 * 16]], exact=True)
    assert [(s.value, s.low, s.high) for s in slopes] == [pytest.approx((1,) * 3), pytest.approx((2,) * 3)]
    assert all(math.isnan(s.low) and math.isnan(s.high) for s in local_slopes([1, 2, 8], [[3.0], [6.0], [6.0]]))
    # Logs 0 ± 1 and log 4 ± 1 in two rounds each: Welch's variance is 1 + 1, its degrees of freedom 2, t = 4.3027.
    (slope,) = local_slopes([1, 2], [[math.exp(-1), math.e], [4 * math.exp(-1), 4 * math.e]])
    half = 4.30265 * math.sqrt(2) / math.log(2)
    assert (slope.value, slope.low, slope.high) == pytest.approx((2, 2 - half, 2 + half), rel=1e-5)


def test_local_slopes_hold_the_truth() -> None:
    generator = np.random.default_rng(7)
    slopes = [
        slope for _ in range(500) for slope in local_slopes([1, 2, 4], noisy(generator, [1, 2, 4], lambda n: n**1.5, 0.0, 4, 0.1))
    ]
    assert 0.935 <= sum(holds(slope, 1.5) for slope in slopes) / len(slopes) <= 0.98


# --- agreement ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "declared", "words"),
    [
        ((1.9, 2.1), (2.0, 2.0), "agrees"),
        ((2.1, 2.3), (1.9, 2.0), "steeper than declared"),
        ((1.1, 1.3), (1.4, 1.5), "flatter than declared"),
        ((2.0, 2.0), (2.0 + 1e-7, 2.0 + 1e-7), "agrees"),
    ],
)
def test_agreement_is_by_interval(measured: tuple[float, float], declared: tuple[float, float], words: str) -> None:
    one, other = (Scaling(Interval(sum(bounds) / 2, *bounds), 0.0, 1.0) for bounds in (measured, declared))
    assert agreement(one, other) == words


def test_agreement_of_a_measured_curve_with_declared_formulas() -> None:
    rounds = noisy(np.random.default_rng(8), SIZES, lambda n: 1e-5 + 1e-9 * n**2, 0.02, 5, 0.02)
    measured = fit_scaling(SIZES, rounds)
    assert agreement(measured, fit_scaling(SIZES, [[4 * n**2] for n in SIZES])) == "agrees"
    assert agreement(measured, fit_scaling(SIZES, [[64 * n] for n in SIZES])) == "steeper than declared"
    assert agreement(measured, fit_scaling(SIZES, [[n**3] for n in SIZES])) == "flatter than declared"
    assert agreement(fit_scaling(SIZES, [[7.0]] * 6), fit_scaling(SIZES, [[7.0]] * 6)) == "agrees"
    assert agreement(Scaling(note=TOO_SHORT), measured) == "unknown: range too short"
    assert agreement(measured, Scaling(note=OVERHEAD)) == "unknown: declared overhead dominated"
