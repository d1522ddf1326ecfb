"""Verdicts: Holm's correction by hand, and error rates in simulations."""

import math

import numpy as np
import pytest

from evals.stats.intervals import Interval, Speedup, speedup_interval
from evals.stats.verdicts import ONE_SIGMA, holm, noise_floor, verdicts


def simulated(
    generator: np.random.Generator,
    speedup: float,
    *,
    rounds: int = 8,
    between: float = 0.03,
    within: float = 0.03,
    confidence: float = 0.95,
) -> Speedup:
    """Speed-up of two candidates on a noisy machine: noise between the processes of a round, and within them."""
    reference = [[[math.exp(x)] for x in generator.normal(generator.normal(0, between), within, 12)] for _ in range(rounds)]
    candidate = [
        [[math.exp(x) / speedup] for x in generator.normal(generator.normal(0, between), within, 12)] for _ in range(rounds)
    ]
    return speedup_interval(reference, candidate, confidence=confidence, resamples=400, generator=generator)


def test_equal_candidates_are_hardly_ever_called_faster_or_slower() -> None:
    generator = np.random.default_rng(0)
    verdict = [
        verdicts([simulated(generator, 1.0)], [noise_floor(simulated(generator, 1.0, confidence=ONE_SIGMA))])[0] for _ in range(400)
    ]
    assert verdict.count("faster") + verdict.count("slower") <= 8


def test_at_most_one_in_twenty_sweeps_of_equal_candidates_has_an_error() -> None:
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(60):
        verdict = verdicts([simulated(generator, 1.0, between=0.0, rounds=4) for _ in range(20)], [0.0] * 20)
        wrong += "faster" in verdict or "slower" in verdict
    assert wrong <= 6  # 3 are expected at the most


def test_one_percent_is_found_on_a_quiet_clock() -> None:
    generator = np.random.default_rng(0)
    quiet = {"between": 0.002, "within": 0.005}
    found = 0
    for _ in range(100):
        slower, floor = (
            simulated(generator, 0.99, **quiet),
            noise_floor(simulated(generator, 1.0, confidence=ONE_SIGMA, **quiet)),
        )  # type: ignore[arg-type]
        found += verdicts([slower], [floor]) == ["slower"]
    assert found >= 90


@pytest.mark.parametrize(
    ("speedup", "floor", "verdict"),
    [
        (Speedup(1.2, 1.1, 1.3, 0.001), 0.05, "faster"),
        (Speedup(0.8, 0.7, 0.9, 0.001), 0.05, "slower"),
        (Speedup(1.2, 1.1, 1.3, 0.001), 0.25, "ambiguous"),  # below the noise floor
        (Speedup(0.8, 0.7, 0.9, 0.001), 0.251, "ambiguous"),  # 1 / 0.8 is a quarter
        (Speedup(1.2, 0.99, 1.4, 0.001), 0.05, "ambiguous"),  # the interval holds 1
        (Speedup(1.2, 1.1, 1.3, 0.02), 0.05, "ambiguous"),
        (Speedup(1.01, 0.99, 1.02, 0.4), 0.05, "same"),
        (Speedup(1.02, 1.01, 1.029, 0.001), 0.001, "faster"),
        (Speedup(1.01, 0.99, 1.04, 0.4), 0.05, "ambiguous"),
        (Speedup(2.0, math.nan, math.nan, math.nan), 0.05, "ambiguous"),
    ],
)
def test_a_verdict_needs_significance_and_more_than_noise(speedup: Speedup, floor: float, verdict: str) -> None:
    assert verdicts([speedup], [floor]) == [verdict]


def test_many_comparisons_need_smaller_p_values() -> None:
    alone = Speedup(1.2, 1.1, 1.3, 0.008)
    assert verdicts([alone], [0.0]) == ["faster"]
    assert verdicts([alone] * 3, [0.0] * 3) == ["ambiguous"] * 3


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, math.nan, 0.4]) == [1.0, 1.0, 1.0]
    assert holm([]) == []


def test_the_noise_floor_is_the_farther_end_of_the_controls_interval() -> None:
    assert noise_floor(Interval(1.0, 0.8, 1.1)) == pytest.approx(0.25)
    assert noise_floor(Interval(1.0, 0.99, 1.1)) == pytest.approx(0.1)
    assert noise_floor(Interval(1.0, math.nan, math.nan)) == math.inf
