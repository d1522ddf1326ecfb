"""How cost grows with size, where two variants cross, who is beaten by nobody: pure functions, no clock, no file.

Sizes are measured at different moments, and no real curve is exactly a power law: caches fill up. What a fit does not
know therefore shows in the scatter between sizes, and thousands of samples at each do not make it smaller. All is
computed in logarithms, because noise is multiplicative; a change of units changes nothing but units.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import stdtrit

from evals.stats.intervals import CONFIDENCE, Interval, Rounds

Array = NDArray[np.float64]

TOO_SHORT, OVERHEAD, TOO_NOISY = "range too short", "overhead dominated", "scatter between sizes too large"
NONE = "none in range"  # how an empty list of crossings is said
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
    n, values = _checked(sizes, rounds)
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
    n, values = _checked(sizes, rounds)
    gaps = np.diff(np.log(n))
    mean, variance, freedom = _moments([np.log(one) for one in values], exact)
    slopes = np.diff(mean) / gaps
    halves = _half(variance[:-1], variance[1:], freedom[:-1], freedom[1:], confidence) / gaps
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


# --- where two variants cross ---------------------------------------------------------------------


@dataclass(frozen=True)
class Crossing:
    """Sizes at which two variants may take equally long. low = 0 or high = inf: the interval leaves the range on that side.

    at.value is NaN where the estimates do not cross, yet within their intervals might; bounds are NaN where no noise
    is known. after: what the first variant is beyond it, `faster` or `slower` if both sides are beyond doubt, or `unclear`.
    """

    at: Interval
    after: str


def crossovers(
    sizes: Sequence[float], log_ratios: Rounds, *, exact: bool = False, confidence: float = CONFIDENCE
) -> list[Crossing]:
    """Where log(t_first / t_second) changes its sign; an empty list is `NONE` in range.

    log_ratios: per size one number a round, paired. Between two sizes the ratio is taken to be a power of n.
    The interval is the set of all n where the mean ratio, so interpolated, is within Student's t of 1
    (Fieller 1954, with Welch's degrees of freedom), which holds the true crossing with exactly that
    confidence and knows one-sided and empty answers, where a bootstrap of 3 to 5 rounds is too narrow.
    exact: as in `local_slopes`. Raises ValueError as `fit_scaling`, and for ratios that are not finite.
    """
    n, ratios = _checked(sizes, log_ratios, -math.inf)
    return _crossings(n, *_moments(ratios, exact), confidence)


def crossovers_of_intervals(
    sizes: Sequence[float], first: Sequence[Interval], second: Sequence[Interval], *, confidence: float = CONFIDENCE
) -> list[Crossing]:
    """As `crossovers`, from two latencies that carry intervals of the same confidence and were not paired, hence wider."""
    quantile = float(stdtrit(1e9, (1 + confidence) / 2))
    mean, variance = np.zeros(len(sizes)), np.zeros(len(sizes))
    for sign, intervals in ((1, first), (-1, second)):
        n, bounds = _checked(sizes, [[one.low, one.value, one.high] for one in intervals])
        low, value, high = np.log(bounds).T
        mean, variance = mean + sign * value, variance + (np.maximum(high - value, value - low) / quantile) ** 2
    return _crossings(n, mean, variance, np.full(len(n), 1e9), confidence)


def _crossings(n: Array, mean: Array, variance: Array, freedom: Array, confidence: float) -> list[Crossing]:
    x = np.log(n)
    # Exact answers are single points, which no grid would meet: the zeros of the estimate are among the nodes.
    rising = np.flatnonzero(mean[:-1] * mean[1:] < 0)
    zeros = np.concatenate([x[mean == 0], x[rising] + np.diff(x)[rising] * mean[rising] / (mean[rising] - mean[rising + 1])])
    if np.isnan(variance).any():
        return [Crossing(Interval(math.exp(zero), math.nan, math.nan), "unclear") for zero in np.sort(zeros)]

    def excess(at: Array) -> Array:
        """How far the interpolated ratio is outside its own doubt; at most 0 where it may be 1."""
        i = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 1)
        j = np.minimum(i + 1, len(x) - 1)
        w = (at - x[i]) / np.where(j > i, x[j] - x[i], 1.0)
        half = _half((1 - w) ** 2 * variance[i], w**2 * variance[j], freedom[i], freedom[j], confidence)
        return np.asarray(np.abs((1 - w) * mean[i] + w * mean[j]) - half, dtype=np.float64)

    def edge(outside: float, inside: float) -> float:
        return math.exp(
            inside if excess(np.array([inside]))[0] >= 0 else brentq(lambda at: excess(np.array([at]))[0], outside, inside)
        )

    nodes = np.unique(np.concatenate([zeros, *(np.linspace(a, b, 65) for a, b in zip(x, [*x[1:], x[-1]], strict=True))]))
    doubtful = (excess(nodes) <= 0) | np.isin(nodes, zeros)
    changes = np.diff(np.concatenate([[0], doubtful.astype(int), [0]]))
    found = []
    for start, end in zip(np.flatnonzero(changes > 0), np.flatnonzero(changes < 0) - 1, strict=True):
        inside = np.sort(zeros[(zeros >= nodes[start]) & (zeros <= nodes[end])])
        value = math.exp(inside[len(inside) // 2]) if len(inside) else math.nan
        low = 0.0 if start == 0 else edge(nodes[start - 1], nodes[start])
        high = math.inf if end == len(nodes) - 1 else edge(nodes[end + 1], nodes[end])
        after = "unclear"
        if start > 0 and end < len(nodes) - 1:
            before, beyond = (np.interp(nodes[at], x, mean) for at in (start - 1, end + 1))
            after = "unclear" if before * beyond > 0 else "faster" if beyond < 0 else "slower"
        found.append(Crossing(Interval(value, low, high), after))
    return found


def _moments(rounds: Sequence[Array], exact: bool) -> tuple[Array, Array, Array]:
    """Per size the mean, its variance (NaN where unknown) and that variance's degrees of freedom."""
    alone = 0.0 if exact else math.nan
    variance = [one.var(ddof=1) / len(one) if len(one) > 1 else alone for one in rounds]
    return np.array([one.mean() for one in rounds]), np.array(variance), np.array([max(len(one) - 1.0, 1.0) for one in rounds])


def _half(first: Array, second: Array, freedom: Array, other: Array, confidence: float) -> Array:
    """Half of Welch's interval of a sum of two means, from their variances and degrees of freedom."""
    total = first + second
    with np.errstate(invalid="ignore", divide="ignore"):
        welch = total**2 / (first**2 / freedom + second**2 / other)
    quantile = stdtrit(np.where(np.isfinite(welch), welch, 1.0), (1 + confidence) / 2)
    return np.asarray(quantile * np.sqrt(total), dtype=np.float64)


# --- who is beaten by nobody ----------------------------------------------------------------------


def pareto_front(points: Sequence[Sequence[float]], higher_is_better: Sequence[bool] = ()) -> list[bool]:
    """For each row of quantities, whether no other row is at least as good in all of them and better in one.

    Less is better, but where `higher_is_better` says True (recall). Equal rows stand or fall together. A row with a
    NaN is not on the front and beats nobody. Raises ValueError for rows of unlike length.
    """
    if not len(points):
        return []
    lengths = {len(row) for row in points} | ({len(higher_is_better)} if higher_is_better else set())
    if len(lengths) > 1:
        raise ValueError(f"every row, and higher_is_better, needs one entry a quantity, got lengths {sorted(lengths)}")
    values = np.array(points, dtype=np.float64)
    if higher_is_better:
        values = np.where(higher_is_better, -values, values)
    no_worse, better = values[None] <= values[:, None], values[None] < values[:, None]
    beaten = np.any(np.all(no_worse, axis=2) & np.any(better, axis=2), axis=1)
    return [bool(one) for one in ~beaten & ~np.isnan(values).any(axis=1)]


# --- what comes in --------------------------------------------------------------------------------


def _checked(sizes: Sequence[float], rounds: Rounds, least: float = 0.0) -> tuple[Array, list[Array]]:
    """Sizes in ascending order with their rounds, all above `least` and finite."""
    n = np.asarray(sizes, dtype=np.float64)
    if n.ndim != 1 or not n.size or not np.all(np.isfinite(n) & (n > 0)) or len(np.unique(n)) < n.size:
        raise ValueError(f"sizes must be positive, finite and distinct numbers, at least one, got {list(sizes)}")
    if len(rounds) != n.size:
        raise ValueError(f"every size needs its rounds, got {n.size} sizes and rounds of {len(rounds)}")
    order = np.argsort(n)
    values = [np.asarray(rounds[i], dtype=np.float64) for i in order]
    for size, one in zip(n[order], values, strict=True):
        if one.ndim != 1 or not one.size or not np.all(np.isfinite(one) & (one > least)):
            raise ValueError(f"every size needs at least one finite number above {least}, got {one.tolist()} at {size:g}")
    return n[order], values
