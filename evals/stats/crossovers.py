"""Sizes at which one variant overtakes another, with intervals (Fieller 1954)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtrit

from evals.stats.intervals import CONFIDENCE, Array, Interval, Rounds
from evals.stats.sizes import Moments, checked_sizes, moments, welch_half_width

NONE_IN_RANGE = "none in range"
"""How tables state that there is no crossover."""

GRID = 65
"""Points between two sizes at which the confidence band is evaluated."""

KNOWN_FREEDOM = 1e9
"""Degrees of freedom of a variance that is taken as known; Student's t is then the normal distribution."""


@dataclass(frozen=True)
class Crossover:
    """Sizes at which two variants may take equally long.

    Attributes:
        at: the size and its interval. `at.value` is NaN if the estimates do not cross but their intervals allow it. low = 0 or
            high = inf: the interval leaves the measured range on that side. Both are NaN if the noise is unknown.
        after: whether the first variant is `faster` or `slower` beyond it; `unclear` if that is not certain on both sides.
    """

    at: Interval
    after: str


def crossovers(
    sizes: Sequence[float], log_ratios: Rounds, *, exact: bool = False, confidence: float = CONFIDENCE
) -> list[Crossover]:
    """The sizes at which log(t_first / t_second) changes its sign.

    Between two sizes the ratio is taken to be a power of n. The interval is the set of all n at which the mean log ratio, so
    interpolated, is within Student's t of 0 (Fieller 1954, with Welch's degrees of freedom). It holds the true crossover with
    exactly that confidence, and can be one-sided or empty. A bootstrap of 3 to 5 rounds would be too narrow.

    Args:
        sizes: positive and distinct.
        log_ratios: by size, one number a round, paired.
        exact: the numbers have no noise (memory, FLOPs), so that a single one determines the ratio.
        confidence: of the intervals.

    Returns:
        The crossovers in ascending order; an empty list is reported as `NONE_IN_RANGE`.

    Raises:
        ValueError: as `fit_scaling`, and for ratios that are not finite.
    """
    n, ratios = checked_sizes(sizes, log_ratios, -math.inf)
    return _RatioCurve(np.log(n), moments(ratios, exact), confidence).crossovers()


def crossovers_from_intervals(
    sizes: Sequence[float], first: Sequence[Interval], second: Sequence[Interval], *, confidence: float = CONFIDENCE
) -> list[Crossover]:
    """Crossovers from unpaired latencies whose intervals have the same confidence; wider than `crossovers` of paired samples."""
    quantile = float(stdtrit(KNOWN_FREEDOM, (1 + confidence) / 2))
    mean, variance = np.zeros(len(sizes)), np.zeros(len(sizes))
    for sign, intervals in ((1, first), (-1, second)):
        n, bounds = checked_sizes(sizes, [[interval.low, interval.value, interval.high] for interval in intervals])
        low, value, high = np.log(bounds).T
        mean, variance = mean + sign * value, variance + (np.maximum(high - value, value - low) / quantile) ** 2
    return _RatioCurve(np.log(n), Moments(mean, variance, np.full(len(n), KNOWN_FREEDOM)), confidence).crossovers()


@dataclass(frozen=True)
class _RatioCurve:
    """The mean log ratio over log n, linear between sizes, with its confidence band."""

    x: Array
    ratio: Moments
    confidence: float

    def crossovers(self) -> list[Crossover]:
        zeros = self._zeros()
        if np.isnan(self.ratio.variance).any():
            return [Crossover(Interval(math.exp(zero), math.nan, math.nan), "unclear") for zero in zeros]
        # The band around an exact zero may be a single point, which no grid would meet: the zeros are among the nodes.
        nodes = np.unique(np.concatenate([zeros, self.x, *(np.linspace(a, b, GRID) for a, b in pairwise(self.x))]))
        may_be_equal = (self._distance(nodes) <= 0) | np.isin(nodes, zeros)
        changes = np.diff(np.concatenate([[0], may_be_equal.astype(int), [0]]))
        starts, ends = np.flatnonzero(changes > 0).tolist(), (np.flatnonzero(changes < 0) - 1).tolist()
        return [self._crossover(zeros, nodes, start, end) for start, end in zip(starts, ends, strict=True)]

    def _crossover(self, zeros: Array, nodes: Array, start: int, end: int) -> Crossover:
        """The crossover in nodes[start..end], where the confidence band holds 0."""
        inside = zeros[(zeros >= nodes[start]) & (zeros <= nodes[end])]
        value = math.exp(inside[len(inside) // 2]) if len(inside) else math.nan
        open_below, open_above = start == 0, end == len(nodes) - 1
        low = 0.0 if open_below else self._edge(nodes[start - 1], nodes[start])
        high = math.inf if open_above else self._edge(nodes[end + 1], nodes[end])
        after = "unclear" if open_below or open_above else self._change(nodes[start - 1], nodes[end + 1])
        return Crossover(Interval(value, low, high), after)

    def _zeros(self) -> Array:
        """Every log size at which the mean log ratio is 0, ascending."""
        x, mean = self.x, self.ratio.mean
        left = np.flatnonzero(mean[:-1] * mean[1:] < 0)
        between = x[left] + np.diff(x)[left] * mean[left] / (mean[left] - mean[left + 1])
        return np.sort(np.concatenate([x[mean == 0], between]))

    def _distance(self, at: Array) -> Array:
        """|mean log ratio| less half of its confidence band; at most 0 where the ratio may be 1."""
        mean, variance, freedom = self.ratio
        i = np.clip(np.searchsorted(self.x, at, side="right") - 1, 0, len(self.x) - 1)
        j = np.minimum(i + 1, len(self.x) - 1)
        w = (at - self.x[i]) / np.where(j > i, self.x[j] - self.x[i], 1.0)
        half = welch_half_width((1 - w) ** 2 * variance[i], w**2 * variance[j], freedom[i], freedom[j], self.confidence)
        return np.asarray(np.abs((1 - w) * mean[i] + w * mean[j]) - half, dtype=np.float64)

    def _edge(self, outside: float, inside: float) -> float:
        """The size between two nodes at which the confidence band begins to hold 0."""

        def distance(at: float) -> float:
            return float(self._distance(np.array([at]))[0])

        return math.exp(inside if distance(inside) >= 0 else brentq(distance, outside, inside))

    def _change(self, before: float, after: float) -> str:
        """`faster` or `slower`, as the first variant is at `after`; `unclear` if it is the same at `before`."""
        left, right = np.interp([before, after], self.x, self.ratio.mean)
        if left * right > 0:
            return "unclear"
        return "faster" if right < 0 else "slower"
