"""Crossovers: worked by hand, and coverage of their intervals in simulations."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from evals.stats.crossovers import Crossover, crossovers, crossovers_from_intervals
from evals.stats.intervals import Interval

Rounds = list[list[float]]
SIZES = [128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0]


def holds(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def ratios(generator: np.random.Generator, true: Callable[[float], float], rounds: int, noise: float) -> Rounds:
    return [list(true(n) + generator.normal(0, noise, rounds)) for n in SIZES]


@pytest.mark.parametrize(
    ("rounds", "noise", "truth"), [(2, 0.05, 700.0), (3, 0.02, 300.0), (3, 0.2, 1500.0), (5, 0.1, 1024.0), (10, 0.3, 2000.0)]
)
def test_the_interval_holds_the_true_crossover_in_94_percent_of_1000_draws(rounds: int, noise: float, truth: float) -> None:
    generator = np.random.default_rng(10 * rounds)
    covered = 0
    for _ in range(1000):
        found = crossovers(SIZES, ratios(generator, lambda n: 0.8 * math.log(truth / n), rounds, noise))
        covered += any(holds(crossover.at, truth) for crossover in found)
    assert covered >= 940


def test_more_rounds_give_a_narrower_interval() -> None:
    generator = np.random.default_rng(9)
    few, many = (crossovers(SIZES, ratios(generator, lambda n: math.log(700 / n), rounds, 0.05))[0] for rounds in (3, 100))
    assert few.after == many.after == "faster"
    assert many.at.high / many.at.low < few.at.high / few.at.low < 2


def test_both_of_two_crossovers_are_found() -> None:
    generator = np.random.default_rng(10)
    found = crossovers(SIZES, ratios(generator, lambda n: abs(math.log(n / 724)) - 0.9, 5, 0.02))
    assert [crossover.after for crossover in found] == ["faster", "slower"]
    # Between the sizes 256 and 512, and 1024 and 2048, the true curve is straight in logarithms.
    assert all(holds(crossover.at, 724 * math.exp(sign * 0.9)) for crossover, sign in zip(found, (-1, 1), strict=True))


def test_crossovers_by_hand() -> None:
    # From +1 at 1 to −1 at 100: zero half way in logarithms, at 10.
    (exact,) = crossovers([1, 100], [[1.0], [-1.0]], exact=True)
    assert (exact.at.low, exact.at.value, exact.at.high, exact.after) == (*(pytest.approx(10),) * 3, "faster")
    (lone,) = crossovers([1, 100], [[1.0], [-1.0]])
    assert (lone.at.value, math.isnan(lone.at.low), lone.after) == (pytest.approx(10), True, "unclear")
    (at_a_size,) = crossovers([1, 10, 100], [[-1.0], [0.0], [2.0]], exact=True)
    assert (at_a_size.at.low, at_a_size.at.high, at_a_size.after) == (pytest.approx(10), pytest.approx(10), "slower")
    assert crossovers([1, 10, 100], [[1.0], [2.0], [0.1]], exact=True) == []
    assert crossovers([100, 1], [[-1.0], [1.0]], exact=True) == [exact]


def test_a_crossover_at_the_end_of_the_range_has_one_bound() -> None:
    scatter = (-0.1, 0.04, 0.06)
    (late,) = crossovers(SIZES, [[math.log(4000 / n) + e for e in scatter] for n in SIZES])
    assert (late.at.value, late.at.high, late.after) == (pytest.approx(4000), math.inf, "unclear")
    assert 2048 < late.at.low < 4000
    (early,) = crossovers(SIZES, [[math.log(130 / n) + e for e in scatter] for n in SIZES])
    assert (early.at.value, early.at.low, early.after) == (pytest.approx(130), 0.0, "unclear")
    # No estimate crosses, yet the last size is in doubt.
    (maybe,) = crossovers([1, 10], [[1.0, 1.1], [0.1, 0.0]])
    assert (math.isnan(maybe.at.value), maybe.at.high) == (True, math.inf)


def test_curves_that_never_meet_have_no_crossover_and_equal_curves_may_cross_anywhere() -> None:
    generator = np.random.default_rng(12)
    assert crossovers(SIZES, ratios(generator, lambda n: 0.5 + 0.1 * math.log(n), 5, 0.05)) == []
    (anywhere,) = crossovers(SIZES, [[-0.05, 0.01, 0.02], [0.03, -0.02, 0.0]] * 3)
    assert (anywhere.at.low, anywhere.at.high, anywhere.after) == (0.0, math.inf, "unclear")


def test_crossovers_from_intervals() -> None:
    generator = np.random.default_rng(13)
    covered = 0
    for _ in range(1000):
        both = []
        for exponent in (1.0, 2.0):
            times = [(n / 700) ** exponent * math.exp(generator.normal(0, 0.05)) for n in SIZES]
            both.append([Interval(t, t * math.exp(-1.96 * 0.05), t * math.exp(1.96 * 0.05)) for t in times])
        found = crossovers_from_intervals(SIZES, *both)
        covered += any(holds(crossover.at, 700) for crossover in found)
    assert 940 <= covered <= 975
    assert crossovers_from_intervals(SIZES, both[0], [Interval(9 * i.value, 9 * i.low, 9 * i.high) for i in both[0]]) == []
    with pytest.raises(ValueError, match="rounds of 5"):
        crossovers_from_intervals(SIZES, both[0], both[1][1:])


def test_the_unit_of_sizes_changes_nothing_but_units() -> None:
    data = ratios(np.random.default_rng(14), lambda n: math.log(700 / n), 4, 0.1)
    (tokens,), (kilo) = crossovers(SIZES, data), crossovers([n / 1024 for n in SIZES], data)
    assert kilo == [
        Crossover(
            Interval(*(pytest.approx(one / 1024, rel=1e-6) for one in (tokens.at.value, tokens.at.low, tokens.at.high))),
            tokens.after,
        )
    ]


def test_ratios_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \[inf\] at 2"):
        crossovers([1, 2], [[0.0], [math.inf]])
