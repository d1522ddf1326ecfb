"""Growth of cost with size: the exponent p of t = a + b·n^p with an interval, and its agreement with a declared exponent.

Sizes are measured at different moments, and no real curve is exactly a power law: caches fill up. Such errors of the model
show in the scatter between sizes, and thousands of samples at each size do not make it smaller. Everything is computed in
logarithms, because noise is multiplicative; a change of units changes only units.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from evals.stats.intervals import CONFIDENCE, Array, Interval, Rounds
from evals.stats.sizes import checked_sizes, moments, welch_half_width

TOO_SHORT, OVERHEAD, TOO_NOISY = "range too short", "overhead dominated", "scatter between sizes too large"
MIN_SPAN, MIN_SIZES = 8.0, 4

MIN_EXPONENT, MAX_EXPONENT = 0.02, 6.0
"""Range of the fit; an interval that reaches either end is refused."""

SAME_EXPONENT = 0.01
"""Exponents that differ by less are the same for every purpose."""

UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Scaling:
    """t = a + b·n^exponent; or a `note` that says why there is no such fit, with NaN for all numbers."""

    exponent: Interval = UNKNOWN
    a: float = math.nan
    b: float = math.nan
    note: str = ""


def fit_scaling(sizes: Sequence[float], rounds: Rounds, *, confidence: float = CONFIDENCE) -> Scaling:
    """Least squares of log t = log(a + b·n^p), a ≥ 0, b > 0, over sizes of equal weight.

    The interval is the profile likelihood's (Bates & Watts 1988, section 6.1). It holds every p whose best fit is not
    significantly worse than the best of all, SSE(p) − SSE(p̂) ≤ t²·s², with Student's t of k − 3 degrees of freedom for k
    sizes, or k − 2 where â = 0, since then only b and p are fitted. s² is the scatter of the sizes about the fit, but never
    less than the scatter of rounds implies. Measured coverage of the 95 % interval with 5 to 10 sizes, exponents 1 to 2,
    scatter of 2 to 15 % between sizes and between rounds, and overhead of 0 to 40 % at the middle size: 0.940 to 0.965 if
    scatter between sizes dominates; up to 1 with 4 sizes, or if all scatter is between rounds.

    Args:
        sizes: positive and distinct.
        rounds: by size the medians of its rounds, positive, in any unit; a single exact number each for memory or FLOPs. A
            size's t is the median of its rounds.
        confidence: of the interval.

    Returns:
        The fit. The same t at every size gives p = 0 exactly. There is no fit, but a note, if sizes span less than 8x or are
        fewer than 4 (`TOO_SHORT`), if a is more than half of t at more than half of the sizes, or t hardly grows
        (`OVERHEAD`), or if the interval has no end (`TOO_NOISY`).

    Raises:
        ValueError: for sizes that are not positive and distinct, rounds that are not positive, or different numbers of them.
    """
    n, values = checked_sizes(sizes, rounds)
    if len(n) < MIN_SIZES or n[-1] / n[0] < MIN_SPAN * (1 - 1e-9):
        return Scaling(note=TOO_SHORT)
    logs = [np.log(numbers) for numbers in values]
    y = np.array([np.median(numbers) for numbers in logs])
    middle, level = float(np.log(n).mean()), float(y.mean())
    x, y = np.log(n) - middle, y - level
    if np.ptp(y) < 1e-12:
        return Scaling(Interval(0.0, 0.0, 0.0), 0.0, math.exp(level))

    profile = _Profile(x, y)
    p = profile.best_exponent()
    error, share, fitted_level = (float(array[0]) for array in profile.fits(np.array([p])))
    freedom = len(n) - (2 if share == 0 else 3)
    variance = max(error / freedom, _variance_of_rounds(logs))
    max_error = error + float(stdtrit(freedom, (1 + confidence) / 2)) ** 2 * variance
    curve = share + (1 - share) * np.exp(p * x)
    if (share / curve > 0.5).mean() > 0.5:
        return Scaling(note=OVERHEAD)
    exponent = profile.interval(p, max_error)
    if exponent is None:
        return Scaling(note=OVERHEAD if curve[-1] / curve[0] < 2 else TOO_NOISY)
    scale = math.exp(level + fitted_level)
    return Scaling(exponent, scale * share, scale * (1 - share) * math.exp(-p * middle))


def local_slopes(sizes: Sequence[float], rounds: Rounds, *, exact: bool = False, confidence: float = CONFIDENCE) -> list[Interval]:
    """Exponents d log t / d log n between each size and the next, with Welch's interval from the rounds.

    Unlike the interval of `fit_scaling`, this one contains only the noise of the rounds: two sizes alone cannot separate scatter
    from slope.

    Args:
        sizes, rounds: as in `fit_scaling`.
        exact: the numbers have no noise (memory, FLOPs), so that a single one determines t. Otherwise the bounds are NaN if
            either size has a single round.
        confidence: of the intervals.

    Raises:
        ValueError: as `fit_scaling`.
    """
    n, values = checked_sizes(sizes, rounds)
    gaps = np.diff(np.log(n))
    mean, variance, freedom = moments([np.log(numbers) for numbers in values], exact)
    slopes = np.diff(mean) / gaps
    halves = welch_half_width(variance[:-1], variance[1:], freedom[:-1], freedom[1:], confidence) / gaps
    return [Interval(float(slope), float(slope - half), float(slope + half)) for slope, half in zip(slopes, halves, strict=True)]


def agreement(measured: Scaling, declared: Scaling) -> str:
    """Compares a measured exponent with a declared one by their intervals.

    Args:
        measured: `fit_scaling` of measurements.
        declared: `fit_scaling` of the variant's declaration over the same sizes, such as its FLOPs, one number a size. FLOPs of
            two terms (n and n²) are no power law: the interval of their fit is wide accordingly.

    Returns:
        'agrees', 'steeper than declared', 'flatter than declared', or 'unknown: ' and the reason.
    """
    if measured.note or declared.note:
        return f"unknown: {measured.note or f'declared {declared.note}'}"
    if measured.exponent.low > declared.exponent.high + SAME_EXPONENT:
        return "steeper than declared"
    if measured.exponent.high < declared.exponent.low - SAME_EXPONENT:
        return "flatter than declared"
    return "agrees"


def _variance_of_rounds(logs: Sequence[Array]) -> float:
    """Variance of a size's log t implied by the rounds, pooled over sizes; 0 if each size has one round."""
    freedom = max(sum(len(numbers) - 1 for numbers in logs), 1)
    pooled = sum(float(((numbers - numbers.mean()) ** 2).sum()) for numbers in logs) / freedom
    return pooled * float(np.mean([1 / len(numbers) for numbers in logs]))


class _Fits(NamedTuple):
    """The best fit at each exponent: its squared error, the share of a at x = 0, and the logarithm of t there."""

    error: Array
    share: Array
    level: Array


@dataclass(frozen=True)
class _Profile:
    """Fits of log(share + (1 − share)·exp(p·x)) + level to y at given exponents p; x and y are centred logarithms."""

    x: Array
    y: Array

    GRID = np.linspace(MIN_EXPONENT, MAX_EXPONENT, 100)

    @cached_property
    def grid_errors(self) -> Array:
        return self.fits(self.GRID).error

    def best_exponent(self) -> float:
        """The exponent of least error, by repeated refinement of the grid."""
        step, p = float(self.GRID[1] - self.GRID[0]), float(self.GRID[self.grid_errors.argmin()])
        while step > 1e-8:
            near = np.clip(p + np.linspace(-step, step, 33), MIN_EXPONENT, MAX_EXPONENT)
            p, step = float(near[self.fits(near).error.argmin()]), step / 16
        return p

    def interval(self, best: float, max_error: float) -> Interval | None:
        """The exponents whose error is at most `max_error`; None if they reach an end of the grid."""
        accepted = self.GRID[self.grid_errors <= max_error]
        low, high = min([best, *accepted]), max([best, *accepted])
        if low == MIN_EXPONENT or high == MAX_EXPONENT:
            return None
        # Each end lies between the last accepted exponent and its neighbour on the grid.
        ends = np.array([[low, self.GRID[low > self.GRID][-1]], [high, self.GRID[high < self.GRID][0]]])
        while np.ptp(ends, axis=1).max() > 1e-5:
            cuts = np.linspace(ends[:, 0], ends[:, 1], 33, axis=1)
            rejected = self.fits(cuts.ravel()).error.reshape(cuts.shape) > max_error
            rejected[:, 0], rejected[:, -1] = False, True
            first = rejected.argmax(axis=1)
            ends = np.stack([cuts[[0, 1], first - 1], cuts[[0, 1], first]], axis=1)
        return Interval(best, *map(float, ends[:, 1]))

    def fits(self, p: Array) -> _Fits:
        """The best fit at each exponent.

        With p fixed the model is linear in (a, b): each step of Gauss-Newton in logarithms is weighted linear least squares in
        closed form, and so is the level. The pure power law is the start, and stays if nothing is better.
        """
        x, y = self.x, self.y
        basis = np.exp(p[:, None] * x)
        residuals = y - p[:, None] * x
        level = residuals.mean(axis=1)
        error, share = ((residuals - level[:, None]) ** 2).sum(axis=1), np.zeros_like(p)
        fitted = np.broadcast_to(np.exp(y), basis.shape)
        for step in range(8):
            target = 1 + np.clip(y - np.log(fitted), -0.9, 5.0)  # clipped: a step from afar must not turn negative
            ones, grown = 1 / fitted, basis / fitted
            s11, s12, s22 = (ones * ones).sum(axis=1), (ones * grown).sum(axis=1), (grown * grown).sum(axis=1)
            t1, t2 = (target * ones).sum(axis=1), (target * grown).sum(axis=1)
            a, b = np.maximum(t1 * s22 - t2 * s12, 0.0), np.maximum(t2 * s11 - t1 * s12, 1e-9 * t2 * s11)
            a, b = a / (a + b), b / (a + b)
            fitted = a[:, None] + b[:, None] * basis
            residuals = y - np.log(fitted)
            mean = residuals.mean(axis=1)
            new_error = ((residuals - mean[:, None]) ** 2).sum(axis=1)
            better = new_error < error - 1e-9 * error
            if step and not better.any():
                break
            error, share, level = np.where(better, new_error, error), np.where(better, a, share), np.where(better, mean, level)
            fitted = fitted * np.exp(mean)[:, None]
        return _Fits(error, share, level)
