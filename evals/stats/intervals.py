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
from scipy.special import stdtr, stdtrit

Array = NDArray[np.float64]
Rounds = Sequence[Sequence[float]]

CONFIDENCE = 0.95
RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """low <= value <= high; both bounds are NaN where the data say nothing of the spread."""

    value: float
    low: float
    high: float


def median_interval(
    rounds: Rounds, *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, generator: np.random.Generator
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
    return _estimate(_checked(rounds, "rounds"), confidence, resamples, generator)


def mean_interval(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """Mean of independent values, such as one a seed, with the interval of Student's t; NaN bounds where there is only one.

    Raises ValueError if there is none, or one is not finite.
    """
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"values must be finite and at least one, got {list(values)}")
    mean, count = math.fsum(values) / len(values), len(values)
    if count == 1:
        return Interval(mean, math.nan, math.nan)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    half = float(stdtrit(count - 1, 0.5 + confidence / 2)) * error
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Speedup(Interval):
    """`p`: how probable so large a deviation from 1 is where there is none; NaN where nothing is known between rounds."""

    p_value: float


def speedup_interval(
    reference: Sequence[Rounds],
    ours: Sequence[Rounds],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    generator: np.random.Generator,
) -> Speedup:
    """How many times faster than the reference: median of the ratios of turns, with its interval and p.

    reference, ours: one entry a round, in it one sequence of samples a turn. Turn i of both ran within milliseconds of
    each other, so what slowed the machine at that moment cancels in reference[r][i] / ours[r][i], the ratio of their
    medians. The ratios are then treated as `median_interval` treats samples; turns that only one of the two has count
    for nothing. p is that of Student's t on the logarithms of the rounds' medians: the tails that a correction for many
    comparisons needs are beyond what a few thousand resamples hold.
    Raises ValueError as `median_interval` does, and if the two differ in their number of rounds.
    """
    if len(reference) != len(ours):
        raise ValueError(
            f"paired rounds must be equally many, got {len(reference)} of the reference and {len(ours)} of ours: "
            "give the rounds that both completed, in the same order"
        )
    rounds = [medians(theirs[: len(mine)]) / medians(mine[: len(theirs)]) for theirs, mine in zip(reference, ours, strict=True)]
    samples = _checked([ratios.tolist() for ratios in rounds], "rounds")
    estimate = _estimate(samples, confidence, resamples, generator)
    return Speedup(estimate.value, estimate.low, estimate.high, _p(np.log([np.median(ratios) for ratios in rounds])))


def _p(logarithms: Array) -> float:
    """How probable it is that normal numbers around 0 have a mean so far from it; NaN for a single one."""
    degrees = len(logarithms) - 1
    if degrees == 0:
        return math.nan
    distance, error = abs(float(np.mean(logarithms))), float(np.std(logarithms, ddof=1)) / math.sqrt(len(logarithms))
    return 2 * float(stdtr(degrees, -distance / error)) if error > 0 else float(distance == 0)


def medians(turns: Rounds) -> Array:
    """The median of each turn's samples."""
    return np.array([np.median(turn) for turn in turns], dtype=np.float64)


def half_width(rounds: Rounds, confidence: float = CONFIDENCE) -> float:
    """Half of the interval's width relative to the value, by Student's t on the logarithms of the rounds' medians.

    Costs microseconds, so that it can be asked after every round whether another is worth its time.
    infinity where there are fewer than two rounds.
    """
    if len(rounds) < 2:
        return math.inf
    logarithms = np.log(medians(rounds))
    error = float(np.std(logarithms, ddof=1)) / math.sqrt(len(rounds))
    return math.expm1(float(stdtrit(len(rounds) - 1, (1 + confidence) / 2)) * error)


# --- verdicts -----------------------------------------------------------------------------------

SAME = 0.03
"""Speeds that provably differ by less than this are called the same."""

ALPHA = 0.02
"""What a verdict may err by: a whole sweep, with this chance, anywhere."""


def verdicts(speedups: Sequence[Speedup], noise_floors: Sequence[float], alpha: float = ALPHA) -> list[str]:
    """faster | slower | same | ambiguous for each, with at most `alpha` of a chance that any `faster` or `slower` is wrong.

    faster, slower: p holds after Holm's correction for all comparisons at hand (Holm 1979), the interval leaves 1 out,
    and the difference is greater than the noise floor, which is how far the reference seemed to be from itself.
    same: not so, and the whole interval lies within 3 % of 1. ambiguous: anything else.
    """
    adjusted = holm([speedup.p_value for speedup in speedups])
    said = []
    for speedup, p, floor in zip(speedups, adjusted, noise_floors, strict=True):
        distance = math.expm1(abs(math.log(speedup.value)))
        if p < alpha and distance > floor and not speedup.low <= 1 <= speedup.high:
            said.append("faster" if speedup.value > 1 else "slower")
        elif speedup.low >= 1 / (1 + SAME) and speedup.high <= 1 + SAME:
            said.append("same")
        else:
            said.append("ambiguous")
    return said


def holm(p_values: Sequence[float]) -> list[float]:
    """p values, each raised so that comparing them all with alpha errs anywhere with probability alpha. NaN counts as 1."""
    p = np.nan_to_num(np.asarray(p_values, dtype=np.float64), nan=1.0)
    order = np.argsort(p, kind="stable")
    raised = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    adjusted = np.empty_like(p)
    adjusted[order] = raised
    return [float(value) for value in adjusted]


def noise_floor(twin: Interval) -> float:
    """How far from itself the reference seems to be: the farther end of its speed-up over itself, as a fraction.

    twin: at a confidence of `ONE_SIGMA`. The doubt about a speed-up is in its own interval already; here it
    is the machine that is asked whether things that are equal come out equal.
    """
    if math.isnan(twin.low):
        return math.inf
    return math.expm1(max(abs(math.log(twin.low)), abs(math.log(twin.high))))


ONE_SIGMA = 0.68


# --- the bootstrap ------------------------------------------------------------------------------


def _estimate(samples: list[Array], confidence: float, resamples: int, generator: np.random.Generator) -> Interval:
    """The median with its interval."""
    _check_options(confidence, resamples)
    value = _log_median(samples)
    if len(samples) == 1 and len(samples[0]) == 1:
        return Interval(math.exp(value), math.nan, math.nan)
    choice = generator.integers(len(samples), size=(resamples, len(samples)))
    between, within = _deviations(samples, choice, generator)
    deviations = _widening(len(samples), resamples, generator) * between + within
    low, high = np.quantile(deviations, [(1 - confidence) / 2, (1 + confidence) / 2])
    # Skewed or tied samples can put both percentiles on one side of the estimate, which belongs to its interval.
    return Interval(math.exp(value), math.exp(value + min(low, 0.0)), math.exp(value + max(high, 0.0)))


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


def _log_median(samples: list[Array]) -> float:
    return math.log(float(np.median(np.concatenate(samples))))


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
