"""Measurements by size: their checks, their means over rounds, and the interval of a sum of two such means."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from evals.stats.intervals import Array, Rounds


class Moments(NamedTuple):
    """The mean at each size, the variance of that mean (NaN if unknown) and the variance's degrees of freedom."""

    mean: Array
    variance: Array
    freedom: Array


def checked_sizes(sizes: Sequence[float], rounds: Rounds, above: float = 0.0) -> tuple[Array, list[Array]]:
    """Sizes in ascending order and their rounds.

    Raises:
        ValueError: if sizes are not positive and distinct, or a size has no numbers, or one is not finite and above `above`.
    """
    n = np.asarray(sizes, dtype=np.float64)
    if n.ndim != 1 or not n.size or not np.all(np.isfinite(n) & (n > 0)) or len(np.unique(n)) < n.size:
        raise ValueError(f"sizes must be positive, finite and distinct numbers, at least one, got {list(sizes)}")
    if len(rounds) != n.size:
        raise ValueError(f"every size needs its rounds, got {n.size} sizes and rounds of {len(rounds)}")
    order = np.argsort(n)
    values = [np.asarray(rounds[i], dtype=np.float64) for i in order]
    for size, numbers in zip(n[order], values, strict=True):
        if numbers.ndim != 1 or not numbers.size or not np.all(np.isfinite(numbers) & (numbers > above)):
            raise ValueError(f"every size needs at least one finite number above {above}, got {numbers.tolist()} at {size:g}")
    return n[order], values


def moments(rounds: Sequence[Array], exact: bool) -> Moments:
    """Means over rounds. The variance of a single round is 0 if the numbers are `exact`, and unknown otherwise."""
    single = 0.0 if exact else math.nan
    return Moments(
        mean=np.array([values.mean() for values in rounds]),
        variance=np.array([values.var(ddof=1) / len(values) if len(values) > 1 else single for values in rounds]),
        freedom=np.array([max(len(values) - 1.0, 1.0) for values in rounds]),
    )


def welch_half_width(first: Array, second: Array, first_freedom: Array, second_freedom: Array, confidence: float) -> Array:
    """Half of Welch's interval of the sum of two means, from their variances and degrees of freedom.

    The sum's degrees of freedom are those of Welch & Satterthwaite (Welch 1947, Biometrika 34).
    """
    total = first + second
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = total**2 / (first**2 / first_freedom + second**2 / second_freedom)
    quantile = stdtrit(np.where(np.isfinite(freedom), freedom, 1.0), (1 + confidence) / 2)
    return np.asarray(quantile * np.sqrt(total), dtype=np.float64)
