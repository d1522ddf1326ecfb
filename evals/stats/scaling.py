"""How cost grows with size, where two variants cross, who is beaten by nobody: pure functions, no clock, no file.

Sizes are measured at different moments, and no real curve is exactly a power law: caches fill up. What a fit does not
know therefore shows in the scatter between sizes, and thousands of samples at each do not make it smaller. All is
computed in logarithms, because noise is multiplicative; a change of units changes nothing but units.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from evals.stats.intervals import CONFIDENCE, Interval, Rounds
from evals.stats.sizes import Array, checked_sizes, moments, welch_half_width

TOO_SHORT, OVERHEAD, TOO_NOISY = "range too short", "overhead dominated", "scatter between sizes too large"
LEAST_SPAN, LEAST_SIZES = 8.0, 4
LEAST_EXPONENT, GREATEST_EXPONENT = 0.02, 6.0  # what a fit looks through; an interval that reaches either end is refused
TOLERANCE = 0.01  # exponents that differ by less are the same for every purpose

UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Scaling:
    """t = a + b·n^exponent, or the reason (`note`) why there is no such number, and then all of them are NaN."""

    exponent: Interval = UNKNOWN
    a: float = math.nan
    b: float = math.nan
    note: str = ""


def fit_scaling(sizes: Sequence[float], rounds: Rounds, *, confidence: float = CONFIDENCE) -> Scaling:
    """Least squares of log t = log(a + b·n^p), a ≥ 0, b > 0, over the sizes, each of which counts once.

    rounds: per size the medians of its rounds, positive, in any unit; a single exact number each for memory or FLOPs.
    A size's t is the median of its rounds. The interval holds every p for which the best fit is not significantly worse
    than the best of all, SSE(p) − SSE(p̂) ≤ t²·s²: the profile likelihood (Bates & Watts 1988, section 6.1), with
    Student's t of k − 3 degrees of freedom for k sizes, or k − 2 where â = 0, since then only b and p are fitted. s² is
    the scatter of the sizes about the fit, but never less than the scatter of rounds says. Measured coverage of the
    95 % interval with 5 to 10 sizes, exponents 1 to 2, scatter of 2 to 15 % between sizes and between rounds, overhead of
    0 to 40 % at the middle size: 0.940 to 0.965 where scatter between sizes rules; up to 1 with 4 sizes, or where it is
    all between rounds.

    Refuses where sizes span less than 8x or are fewer than 4 (`TOO_SHORT`), where a is more than half of t at more than
    half of the sizes, or t hardly grows (`OVERHEAD`), and where the interval has no end (`TOO_NOISY`). The same t at
    every size is p = 0 exactly.
    Raises ValueError for sizes that are not positive and distinct, rounds that are not, or unlike numbers of them.
    """
    n, values = checked_sizes(sizes, rounds)
    logs = [np.log(one) for one in values]
    if len(n) < LEAST_SIZES or n[-1] / n[0] < LEAST_SPAN * (1 - 1e-9):
        return Scaling(note=TOO_SHORT)
    y = np.array([np.median(one) for one in logs])
    middle, level = float(np.log(n).mean()), float(y.mean())
    x, y = np.log(n) - middle, y - level
    if np.ptp(y) < 1e-12:
        return Scaling(Interval(0.0, 0.0, 0.0), 0.0, math.exp(level))

    grid = np.linspace(LEAST_EXPONENT, GREATEST_EXPONENT, 100)
    coarse = _profile(grid, x, y)[0]
    step, p = float(grid[1] - grid[0]), float(grid[coarse.argmin()])
    while step > 1e-8:
        near = np.clip(p + np.linspace(-step, step, 33), LEAST_EXPONENT, GREATEST_EXPONENT)
        p, step = float(near[_profile(near, x, y)[0].argmin()]), step / 16
    errors, shares, scales = (float(one[0]) for one in _profile(np.array([p]), x, y))
    freedom = len(n) - (2 if shares == 0 else 3)
    variance = max(errors / freedom, _variance_of_rounds(logs))
    limit = errors + float(stdtrit(freedom, (1 + confidence) / 2)) ** 2 * variance

    curve = shares + (1 - shares) * np.exp(p * x)
    if (shares / curve > 0.5).mean() > 0.5:
        return Scaling(note=OVERHEAD)
    accepted = np.flatnonzero(coarse <= limit)
    low, high = min([p, *grid[accepted]]), max([p, *grid[accepted]])
    if low == LEAST_EXPONENT or high == GREATEST_EXPONENT:
        return Scaling(note=OVERHEAD if curve[-1] / curve[0] < 2 else TOO_NOISY)
    # Between the last that is accepted and the next of the grid lies each end.
    ends = np.array([[low, grid[grid < low][-1]], [high, grid[grid > high][0]]])
    while np.ptp(ends, axis=1).max() > 1e-5:
        cuts = np.linspace(ends[:, 0], ends[:, 1], 33, axis=1)
        beyond = _profile(cuts.ravel(), x, y)[0].reshape(cuts.shape) > limit
        beyond[:, 0], beyond[:, -1] = False, True
        first = beyond.argmax(axis=1)
        ends = np.stack([cuts[[0, 1], first - 1], cuts[[0, 1], first]], axis=1)
    low, high = map(float, ends[:, 1])
    scale = math.exp(level + scales)
    return Scaling(Interval(p, low, high), scale * shares, scale * (1 - shares) * math.exp(-p * middle))


def _profile(p: Array, x: Array, y: Array) -> tuple[Array, Array, Array]:
    """For each exponent the best fit's squared error, its share of a at x = 0, and the log of its level there.

    With p fixed the model is linear in (a, b): each step of Gauss-Newton in logarithms is weighted linear least squares
    in closed form, and so is the level. The pure power law is the start, and stays where nothing is better.
    """
    basis = np.exp(p[:, None] * x)
    residuals = y - p[:, None] * x
    level = residuals.mean(axis=1)
    error, share = ((residuals - level[:, None]) ** 2).sum(axis=1), np.zeros_like(p)
    fitted = np.broadcast_to(np.exp(y), basis.shape)
    for turn in range(8):
        target = 1 + np.clip(y - np.log(fitted), -0.9, 5.0)  # clipped: a step from afar must not turn negative
        ones, grown = 1 / fitted, basis / fitted
        s11, s12, s22 = (ones * ones).sum(axis=1), (ones * grown).sum(axis=1), (grown * grown).sum(axis=1)
        t1, t2 = (target * ones).sum(axis=1), (target * grown).sum(axis=1)
        a, b = np.maximum(t1 * s22 - t2 * s12, 0.0), np.maximum(t2 * s11 - t1 * s12, 1e-9 * t2 * s11)
        a, b = a / (a + b), b / (a + b)
        fitted = a[:, None] + b[:, None] * basis
        residuals = y - np.log(fitted)
        mean = residuals.mean(axis=1)
        now = ((residuals - mean[:, None]) ** 2).sum(axis=1)
        better = now < error - 1e-9 * error
        if turn and not better.any():
            break
        error, share, level = np.where(better, now, error), np.where(better, a, share), np.where(better, mean, level)
        fitted = fitted * np.exp(mean)[:, None]
    return error, share, level


def _variance_of_rounds(logs: Sequence[Array]) -> float:
    """What the rounds alone say of the variance of a size's t: pooled over sizes; 0 where there is one round each."""
    freedom = max(sum(len(one) - 1 for one in logs), 1)
    pooled = sum(float(((one - one.mean()) ** 2).sum()) for one in logs) / freedom
    return pooled * float(np.mean([1 / len(one) for one in logs]))


def local_slopes(sizes: Sequence[float], rounds: Rounds, *, exact: bool = False, confidence: float = CONFIDENCE) -> list[Interval]:
    """d log t / d log n between each size and the next, the exponent that holds there, with Welch's interval from the rounds.

    exact: the numbers have no noise (memory, FLOPs), so that a single one leaves nothing open; otherwise the bounds are
    NaN where either size has a single round. Unlike `fit_scaling`'s, this interval knows of the rounds only: between
    two sizes there is no third that could tell scatter from slope. Raises ValueError as `fit_scaling`.
    """
    n, values = checked_sizes(sizes, rounds)
    gaps = np.diff(np.log(n))
    mean, variance, freedom = moments([np.log(one) for one in values], exact)
    slopes = np.diff(mean) / gaps
    halves = welch_half_width(variance[:-1], variance[1:], freedom[:-1], freedom[1:], confidence) / gaps
    return [Interval(float(s), float(s - half), float(s + half)) for s, half in zip(slopes, halves, strict=True)]


def agreement(measured: Scaling, declared: Scaling) -> str:
    """'agrees', 'steeper than declared' or 'flatter than declared', as far as the two intervals tell; else 'unknown: …'.

    declared: `fit_scaling` of what the variant declares over the same sizes, such as its FLOPs, one number a size. FLOPs
    of two terms (n and n²) are no power law: the fit's interval says so and is honoured.
    """
    if measured.note or declared.note:
        return f"unknown: {measured.note or f'declared {declared.note}'}"
    if measured.exponent.low > declared.exponent.high + TOLERANCE:
        return "steeper than declared"
    if measured.exponent.high < declared.exponent.low - TOLERANCE:
        return "flatter than declared"
    return "agrees"
