"""From raw samples to a number with an interval: pure functions of numpy arrays, no clock, no file, no global state.

Samples come in rounds: a round is one fresh process, whose samples share a memory layout, a clock
frequency and a busy neighbour. They are therefore not independent, and an interval that forgets the
rounds is too narrow by far. What is computed here works in logarithms: latency noise is
multiplicative, bounds stay positive, and a change of units changes nothing but units.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rounds = Sequence[Sequence[float]]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """low <= value <= high; both bounds are NaN where the data say nothing of the spread."""

    value: float
    low: float
    high: float


def median_interval(
    rounds: Rounds, *, confidence: float = CONFIDENCE, resamples: int = 2000, generator: np.random.Generator
) -> Interval:
    """Median of all samples, with a hierarchical bootstrap interval: rounds are resampled, then samples within each.

    rounds: positive samples in any unit, one sequence a round, of any lengths. The interval is that of
    the percentiles (Davison & Hinkley 1997, sections 3.8 and 5.3), of log deviations that are first
    widened for how few rounds there are (`_widening`): the plain percentiles of 3 rounds cannot reach
    beyond the outermost of them, which covers 75 % at best where rounds differ. Measured coverage of the
    95 % interval with 2 to 10 rounds of 30 samples, normal or skewed with outliers: 0.92 to 0.96 where
    noise between rounds is 0.5 to 3 times that within (plain percentiles: 0.61 with 2 rounds, 0.74 with
    3), 0.99 where there is none, because two rounds that agree may do so by chance.

    A single round: only its samples are resampled, and the interval cannot contain what differs from
    process to process. A single sample in all: low and high are NaN, since nothing is known of its spread.
    Raises ValueError if there is no round, an empty round, a sample that is not positive and finite, or a
    confidence outside (0, 1).
    """
    samples = _checked(rounds, "rounds")
    _check_options(confidence, resamples)
    value = _log_median(samples)
    if _spread_is_unknown(samples):
        return Interval(math.exp(value), math.nan, math.nan)
    choice = generator.integers(len(samples), size=(resamples, len(samples)))
    between, within = _deviations(samples, choice, generator)
    return _interval(value, _widening(len(samples), resamples, generator) * between + within, confidence)


def speedup_interval(
    reference_rounds: Rounds,
    rounds: Rounds,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = 2000,
    generator: np.random.Generator,
) -> Interval:
    """median(reference) / median(ours), above 1 where ours is faster, with a hierarchical bootstrap interval paired by round.

    Round i of both ran side by side: whenever the bootstrap draws round i it draws it for both, so that
    what slowed the machine in that round cancels in the ratio. Otherwise as `median_interval`; bounds are
    NaN where there is one round and either side has one sample in it.
    Raises ValueError as `median_interval` does, and if the two differ in their number of rounds.
    """
    reference, ours = _checked(reference_rounds, "reference_rounds"), _checked(rounds, "rounds")
    _check_options(confidence, resamples)
    if len(reference) != len(ours):
        raise ValueError(
            f"paired rounds must be equally many, got {len(reference)} of the reference and {len(ours)} of ours: "
            "give the rounds that both completed, in the same order"
        )
    value = _log_median(reference) - _log_median(ours)
    if _spread_is_unknown(reference) or _spread_is_unknown(ours):
        return Interval(math.exp(value), math.nan, math.nan)
    choice = generator.integers(len(ours), size=(resamples, len(ours)))
    between_reference, within_reference = _deviations(reference, choice, generator)
    between_ours, within_ours = _deviations(ours, choice, generator)
    between = between_reference - between_ours
    deviations = _widening(len(ours), resamples, generator) * between + within_reference - within_ours
    return _interval(value, deviations, confidence)


def _deviations(samples: list[Array], choice: NDArray[np.int64], generator: np.random.Generator) -> tuple[Array, Array]:
    """Log deviations [resamples] of the resampled medians: the part due to the choice of rounds, and of samples in them.

    choice: [resamples, rounds], the rounds that each resample consists of. Only the two parts apart can
    each be widened by its own number of independent observations.
    """
    resamples = len(choice)
    lengths = np.array([len(one) for one in samples])
    # Rounds of different lengths fill one table; +inf sorts behind every sample and is never counted.
    table = np.full((len(samples), lengths.max()), np.inf)
    for row, one in zip(table, samples, strict=True):
        row[: len(one)] = one
    chosen = lengths[choice]
    position = (generator.random((*choice.shape, table.shape[1])) * chosen[..., None]).astype(np.intp)
    drawn = table[choice[..., None], position]
    if lengths.min() < lengths.max():
        drawn[np.arange(table.shape[1]) >= chosen[..., None]] = np.inf
    counts = chosen.sum(axis=1)
    of_rounds = _row_medians(table[choice].reshape(resamples, -1), counts)
    of_samples = _row_medians(drawn.reshape(resamples, -1), counts)
    independent = int(lengths.sum()) - len(samples) + 1
    within = (of_samples - of_rounds) * _widening(independent, resamples, generator)
    return of_rounds - _log_median(samples), within


def _widening(observations: int, resamples: int, generator: np.random.Generator) -> Array | float:
    """sqrt(n/(n−1)) · sqrt((n−1)/χ²_{n−1}), one draw a resample, of n independent observations: what a bootstrap of few lacks.

    A bootstrap of n observations has (n−1)/n of the variance it estimates, and takes that estimate for
    exact: the first factor mends the one, the second the other, turning normal deviations into
    Student's t with n−1 degrees of freedom. With 3 rounds a deviation grows 2.7 times at 95 %, with 10
    1.2 times. After the expanded percentiles of Hesterberg 2015, arXiv:1411.5279.
    """
    if observations < 2:
        return 1.0
    return np.sqrt(observations / generator.chisquare(observations - 1, resamples))


def _row_medians(rows: Array, counts: NDArray[np.int64]) -> Array:
    """Log of the median of the `counts` least entries of each row."""
    rows.sort(axis=1)
    at = np.arange(len(rows))
    return np.log((rows[at, (counts - 1) // 2] + rows[at, counts // 2]) / 2)


def _interval(log_value: float, deviations: Array, confidence: float) -> Interval:
    low, high = np.quantile(deviations, [(1 - confidence) / 2, (1 + confidence) / 2])
    # Skewed or tied samples can put both percentiles on one side of the estimate, which belongs to its interval.
    return Interval(math.exp(log_value), math.exp(log_value + min(low, 0.0)), math.exp(log_value + max(high, 0.0)))


def _log_median(samples: list[Array]) -> float:
    return math.log(float(np.median(np.concatenate(samples))))


def _spread_is_unknown(samples: list[Array]) -> bool:
    return len(samples) == 1 and len(samples[0]) == 1


def _checked(rounds: Rounds, name: str) -> list[Array]:
    samples = [np.asarray(one, dtype=np.float64) for one in rounds]
    if not samples:
        raise ValueError(f"{name} must hold at least one round of samples, got none")
    for index, one in enumerate(samples):
        if one.ndim != 1 or one.size == 0:
            raise ValueError(
                f"every round must be a sequence of at least one sample, got shape {list(one.shape)} for {name}[{index}]"
            )
        if not np.all(np.isfinite(one) & (one > 0)):
            wrong = one[~(np.isfinite(one) & (one > 0))][0]
            raise ValueError(f"samples must be positive and finite, got {wrong} in {name}[{index}]: drop failed measurements first")
    return samples


def _check_options(confidence: float, resamples: int) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, such as 0.95, got {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be a positive integer, got {resamples}")
