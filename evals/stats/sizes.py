"""TODO: what lives here."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from evals.stats.intervals import Rounds

Array = NDArray[np.float64]


def moments(rounds: Sequence[Array], exact: bool) -> tuple[Array, Array, Array]:
    """Per size the mean, its variance (NaN where unknown) and that variance's degrees of freedom."""
    alone = 0.0 if exact else math.nan
    variance = [one.var(ddof=1) / len(one) if len(one) > 1 else alone for one in rounds]
    return np.array([one.mean() for one in rounds]), np.array(variance), np.array([max(len(one) - 1.0, 1.0) for one in rounds])


def welch_half_width(first: Array, second: Array, freedom: Array, other: Array, confidence: float) -> Array:
    """Half of Welch's interval of a sum of two means, from their variances and degrees of freedom."""
    total = first + second
    with np.errstate(invalid="ignore", divide="ignore"):
        welch = total**2 / (first**2 / freedom + second**2 / other)
    quantile = stdtrit(np.where(np.isfinite(welch), welch, 1.0), (1 + confidence) / 2)
    return np.asarray(quantile * np.sqrt(total), dtype=np.float64)


# --- what comes in --------------------------------------------------------------------------------


def checked_sizes(sizes: Sequence[float], rounds: Rounds, least: float = 0.0) -> tuple[Array, list[Array]]:
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
