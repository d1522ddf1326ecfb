"""TODO: what lives here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtrit

from evals.stats.intervals import CONFIDENCE, Interval, Rounds
from evals.stats.sizes import Array, checked_sizes, moments, welch_half_width

NONE_IN_RANGE = "none in range"  # how an empty list of crossings is said


# --- where two variants cross ---------------------------------------------------------------------


@dataclass(frozen=True)
class Crossover:
    """Sizes at which two variants may take equally long. low = 0 or high = inf: the interval leaves the range on that side.

    at.value is NaN where the estimates do not cross, yet within their intervals might; bounds are NaN where no noise
    is known. after: what the first variant is beyond it, `faster` or `slower` if both sides are beyond doubt, or `unclear`.
    """

    at: Interval
    after: str


def crossovers(
    sizes: Sequence[float], log_ratios: Rounds, *, exact: bool = False, confidence: float = CONFIDENCE
) -> list[Crossover]:
    """Where log(t_first / t_second) changes its sign; an empty list is `NONE` in range.

    log_ratios: per size one number a round, paired. Between two sizes the ratio is taken to be a power of n.
    The interval is the set of all n where the mean ratio, so interpolated, is within Student's t of 1
    (Fieller 1954, with Welch's degrees of freedom), which holds the true crossing with exactly that
    confidence and knows one-sided and empty answers, where a bootstrap of 3 to 5 rounds is too narrow.
    exact: as in `local_slopes`. Raises ValueError as `fit_scaling`, and for ratios that are not finite.
    """
    n, ratios = checked_sizes(sizes, log_ratios, -math.inf)
    return _crossings(n, *moments(ratios, exact), confidence)


def crossovers_from_intervals(
    sizes: Sequence[float], first: Sequence[Interval], second: Sequence[Interval], *, confidence: float = CONFIDENCE
) -> list[Crossover]:
    """As `crossovers`, from two latencies that carry intervals of the same confidence and were not paired, hence wider."""
    quantile = float(stdtrit(1e9, (1 + confidence) / 2))
    mean, variance = np.zeros(len(sizes)), np.zeros(len(sizes))
    for sign, intervals in ((1, first), (-1, second)):
        n, bounds = checked_sizes(sizes, [[one.low, one.value, one.high] for one in intervals])
        low, value, high = np.log(bounds).T
        mean, variance = mean + sign * value, variance + (np.maximum(high - value, value - low) / quantile) ** 2
    return _crossings(n, mean, variance, np.full(len(n), 1e9), confidence)


def _crossings(n: Array, mean: Array, variance: Array, freedom: Array, confidence: float) -> list[Crossover]:
    x = np.log(n)
    # Exact answers are single points, which no grid would meet: the zeros of the estimate are among the nodes.
    rising = np.flatnonzero(mean[:-1] * mean[1:] < 0)
    zeros = np.concatenate([x[mean == 0], x[rising] + np.diff(x)[rising] * mean[rising] / (mean[rising] - mean[rising + 1])])
    if np.isnan(variance).any():
        return [Crossover(Interval(math.exp(zero), math.nan, math.nan), "unclear") for zero in np.sort(zeros)]

    def excess(at: Array) -> Array:
        """How far the interpolated ratio is outside its own doubt; at most 0 where it may be 1."""
        i = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 1)
        j = np.minimum(i + 1, len(x) - 1)
        w = (at - x[i]) / np.where(j > i, x[j] - x[i], 1.0)
        half = welch_half_width((1 - w) ** 2 * variance[i], w**2 * variance[j], freedom[i], freedom[j], confidence)
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
        found.append(Crossover(Interval(value, low, high), after))
    return found
