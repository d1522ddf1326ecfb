"""Comparison of two result folders, A and B: the speed-up of each cell, with its interval and verdict."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t as student_t

from evals.errors import UsageError
from evals.results.cells import MACHINE, Cell
from evals.stats.intervals import CONFIDENCE, Speedup, student_p_value
from evals.stats.verdicts import holm, verdicts

Key = tuple[Any, ...]
"""The attention and the values of the shared settings; cells of A and B with the same key are compared."""

COMPUTED = ("ratio", "ratio_low", "ratio_high", "p_holm", "noise_floor", "verdict", "paired")


class Ratio(NamedTuple):
    """Latency in A over latency in B, and whether it is from paired rounds."""

    speedup: Speedup
    paired: bool


def compare_cells(a: Sequence[Cell], b: Sequence[Cell]) -> pd.DataFrame:
    """Compares the cells of two folders.

    Returns:
        One row per cell of either folder: its settings; its outcome, latency, rounds and memory in both folders; `ratio`, the
        latency in A over that in B, above 1 if B is faster; `p_holm`, the p-value corrected for all cells.

    Raises:
        UsageError: if the folders have no cell in common, or one holds a cell twice.
    """
    names = shared_settings(a, b)
    left, right = _by_key("A", a, names), _by_key("B", b, names)
    if not left.keys() & right.keys():
        raise UsageError(f"A and B have no cell in common: {_differences(list(left), list(right), names)}")
    rows, timed = [], []
    for key in dict.fromkeys([*left, *right]):
        cell_a, cell_b = left.get(key), right.get(key)
        row: dict[str, Any] = dict(zip(("attention", *names), key, strict=True))
        row |= _side("a", cell_a) | _side("b", cell_b)
        row["verdict"] = _untimed_verdict(row["outcome_a"], row["outcome_b"])
        if cell_a and cell_b and cell_a.rounds and cell_b.rounds:
            ratio, row["paired"] = cell_ratio(cell_a, cell_b)
            row |= {"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}
            # fmax ignores a NaN: if one folder has no noise floor, that of the other counts.
            row["noise_floor"] = float(np.fmax(cell_a.noise_floor, cell_b.noise_floor))
            timed.append((row, ratio))
        rows.append(row)
    ratios = [ratio for _, ratio in timed]
    floors = [0.0 if math.isnan(row["noise_floor"]) else row["noise_floor"] for row, _ in timed]
    p_values = holm([ratio.p_value for ratio in ratios])
    for (row, _), verdict, p_value in zip(timed, verdicts(ratios, floors), p_values, strict=True):
        row |= {"verdict": verdict, "p_holm": p_value}
    return pd.DataFrame(rows, columns=[*dict.fromkeys([*("attention", *names), *COMPUTED, *(key for row in rows for key in row)])])


def _side(side: str, cell: Cell | None) -> dict[str, Any]:
    """The columns of one folder."""
    return {
        f"outcome_{side}": cell.outcome if cell else "absent",
        f"detail_{side}": cell.detail if cell else "",
        f"latency_{side}_s": math.exp(np.mean(list(cell.rounds.values()))) if cell and cell.rounds else math.nan,
        f"rounds_{side}": len(cell.rounds) if cell else 0,
        f"peak_bytes_{side}": cell.peak_bytes if cell and cell.outcome == "ok" else math.nan,
    }


def _untimed_verdict(a: str, b: str) -> str:
    """The verdict of a cell that is not timed in both folders, from its outcomes."""
    if "absent" in (a, b):
        return "only in B" if a == "absent" else "only in A"
    return f"{a} -> {b}" if a != b else "untimed" if a == "ok" else f"{a} in both"


# --- matching cells -------------------------------------------------------------------------------


def shared_settings(a: Sequence[Cell], b: Sequence[Cell]) -> list[str]:
    """The settings in which cells must agree.

    A setting that only one folder knows and does not vary is left out: the other folder may be older than the setting.
    """
    names = dict.fromkeys(name for cell in (*a, *b) for name in cell.settings)
    values = [{name: {cell.settings.get(name) for cell in cells} for name in names} for cells in (a, b)]
    return [name for name in names if all(one[name] != {None} for one in values) or any(len(one[name]) > 1 for one in values)]


def _by_key(side: str, cells: Sequence[Cell], names: Sequence[str]) -> dict[Key, Cell]:
    by_key: dict[Key, Cell] = {}
    for cell in cells:
        key = (cell.attention, *(cell.settings.get(name) for name in names))
        if key in by_key:
            machines = " and ".join(", ".join(one.origin[name] for name in MACHINE) for one in (by_key[key], cell))
            raise UsageError(
                f"{side} holds {cell.attention} twice under the same settings, from {machines}: give one machine's results"
            )
        by_key[key] = cell
    return by_key


def _differences(left: Sequence[Key], right: Sequence[Key], names: Sequence[str]) -> str:
    """The settings in which no cell of A agrees with one of B."""
    differences = []
    for name, *sides in zip(("attention", *names), zip(*left, strict=True), zip(*right, strict=True), strict=True):
        if not set(sides[0]) & set(sides[1]):
            in_a, in_b = (", ".join("not given" if one is None else str(one) for one in dict.fromkeys(side)) for side in sides)
            differences.append(f"{name} is {in_a} in A and {in_b} in B")
    return "; ".join(differences) or "each setting has values in common, but no combination of them"


# --- statistics -----------------------------------------------------------------------------------


def cell_ratio(a: Cell, b: Cell) -> Ratio:
    """Estimates the latency in A over that in B from the logarithms of round medians.

    Where rounds were measured side by side, the drift of the machine cancels: Student's t on their differences. Otherwise
    Welch's t on the two means, with the degrees of freedom of Welch 1947 (Biometrika 34). Its interval covers the scatter
    between rounds only: a difference between the runs as a whole, such as a warmer machine, counts as a difference of the code.
    """
    rounds = _interleaved(a, b)
    if rounds:
        differences = np.array([a.rounds[number] - b.rounds[number] for number in rounds])
        variance = float(differences.var(ddof=1)) / len(rounds)
        sign_test = 2.0 ** (1 - len(rounds))
        return Ratio(_student(float(differences.mean()), variance, len(rounds) - 1, sign_test), paired=True)
    sides = [np.array(list(cell.rounds.values())) for cell in (a, b)]
    value = float(sides[0].mean() - sides[1].mean())
    if min(map(len, sides)) < 2:
        return Ratio(Speedup(math.exp(value), math.nan, math.nan, math.nan), paired=False)
    variances = [float(side.var(ddof=1)) / len(side) for side in sides]
    parts = sum(variance**2 / (len(side) - 1) for variance, side in zip(variances, sides, strict=True))
    rank_test = 2 / math.comb(sum(map(len, sides)), len(sides[0]))
    return Ratio(_student(value, sum(variances), sum(variances) ** 2 / parts if parts else 1.0, rank_test), paired=False)


def _interleaved(a: Cell, b: Cell) -> list[int]:
    """The rounds of both sides, if both completed each before either began the next, on one machine; otherwise none."""
    rounds = sorted(a.rounds.keys() & b.rounds.keys())
    spans = [sorted((a.times[number], b.times[number])) for number in rounds]
    in_order = all(before[1] < after[0] for before, after in itertools.pairwise(spans))
    one_machine = all(a.origin[name] == b.origin[name] for name in ("processor", "host"))
    return rounds if len(rounds) > 1 and in_order and one_machine else []


def _student(value: float, variance: float, degrees: float, least_p_value: float) -> Speedup:
    error = math.sqrt(variance)
    distance = float(student_t.ppf((1 + CONFIDENCE) / 2, degrees)) * error
    p_value = student_p_value(value, error, degrees, least_p_value)
    return Speedup(math.exp(value), math.exp(value - distance), math.exp(value + distance), p_value)
