"""Verdicts on speed-ups: faster, slower, same or ambiguous, corrected for the number of comparisons and bounded by the noise."""

import math
from collections.abc import Sequence

import numpy as np

from evals.stats.intervals import Interval, Speedup

SAME = 0.03
"""Speeds that provably differ by less than this fraction are called the same."""

ALPHA = 0.02
"""Largest probability that any `faster` or `slower` of a whole sweep is wrong."""

ONE_SIGMA = 0.68
"""Confidence of the A/A control's interval, from which the noise floor is taken."""


def verdicts(speedups: Sequence[Speedup], noise_floors: Sequence[float], alpha: float = ALPHA) -> list[str]:
    """The verdict on each speed-up; the probability that any `faster` or `slower` is wrong is at most `alpha`.

    - faster, slower: the p-value holds after Holm's correction for all comparisons given, the interval excludes 1, and the
      difference exceeds the noise floor.
    - same: neither of these, and the whole interval lies within 3 % of 1.
    - ambiguous: none of these.

    Args:
        speedups: of all comparisons that are reported together.
        noise_floors: a fraction for each, as `noise_floor` gives it.
        alpha: family-wise error rate.
    """
    adjusted = holm([speedup.p_value for speedup in speedups])
    result = []
    for speedup, p_value, floor in zip(speedups, adjusted, noise_floors, strict=True):
        distance = math.expm1(abs(math.log(speedup.value)))
        if p_value < alpha and distance > floor and not speedup.low <= 1 <= speedup.high:
            result.append("faster" if speedup.value > 1 else "slower")
        elif speedup.low >= 1 / (1 + SAME) and speedup.high <= 1 + SAME:
            result.append("same")
        else:
            result.append("ambiguous")
    return result


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number by Holm's step-down procedure (Holm 1979, Scand. J. Stat. 6). NaN counts as 1.

    Comparing all adjusted values with alpha makes any error with probability alpha at most.
    """
    p = np.nan_to_num(np.asarray(p_values, dtype=np.float64), nan=1.0)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return [float(value) for value in adjusted]


def noise_floor(control: Interval) -> float:
    """The noise floor: the distance from 1 of the farther end of the A/A control's interval, as a fraction.

    Args:
        control: speed-up of the reference over itself, at a confidence of `ONE_SIGMA`. It shows whether the machine measures equal
            attentions as equal; the uncertainty of a speed-up is in that speed-up's interval already.

    Returns:
        0.02 for 2 %; infinity if the control has no interval.
    """
    if math.isnan(control.low):
        return math.inf
    return math.expm1(max(abs(math.log(control.low)), abs(math.log(control.high))))
