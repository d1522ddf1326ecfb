"""TODO: what lives here."""

import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student_t

from evals.errors import UsageError, one_sentence
from evals.results import schema
from evals.results.formatting import WIDTH, align_columns
from evals.results.ledger import Ledger, Record
from evals.stats.intervals import CONFIDENCE, Speedup
from evals.stats.verdicts import holm, verdicts

MACHINE = ("processor", "torch")
"""Settings that say where a cell was measured, not what: they need not agree."""


@dataclass(frozen=True)
class Cell:
    """One attention under one setting, as one set of results has it. A round is the log of its median latency."""

    attention: str
    settings: dict[str, Any]
    where: dict[str, str]  # folder, commit, host, processor, torch
    options: dict[str, Any]  # the node of its config
    outcome: str
    detail: str
    noise_floor: float  # NaN where nothing was measured against itself
    peak_bytes: float
    rounds: dict[int, float]
    times: dict[int, float]  # when each round was measured, in seconds


def read_cells(folder: Path) -> list[Cell]:
    """All cells of a folder that evals.run wrote. Raises UsageError if it holds none, or anything that cannot be."""
    for name in ("results.csv", "samples.jsonl"):
        if not (folder / name).is_file():
            raise UsageError(f"{folder} holds no {name}; give a folder that evals.run wrote, such as results/seq_len")
    records = Ledger(folder / "samples.jsonl").intact()
    timed: dict[tuple[str, str], list[Record]] = {}
    try:
        described = {record["comparison"]: record for record in records if record.get("kind") == "comparison"}
        for record in records:
            if record.get("kind") == "latency" and record["outcome"] == "ok" and not record.get("is_control"):
                timed.setdefault((record["comparison"], record["attention"]), []).append(record)
        rows = schema.read(folder / "results.csv", dtype={"attention": str, "comparison": str, "outcome": str})
        # Of a comparison, the row of the reference knows how far that is from itself.
        floors: dict[Any, float] = rows.groupby("comparison")["noise_floor"].max().to_dict() if "noise_floor" in rows else {}
        cells = [
            _cell(folder, row, described[row["comparison"]], timed.get((row["comparison"], row["attention"]), []), floors)
            for _, row in rows.iterrows()
        ]
    except KeyError as error:
        raise UsageError(f"{folder} is corrupt: its results.csv or samples.jsonl lacks {error}") from error
    except schema.SchemaVersionError as error:
        raise UsageError(str(error)) from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{folder} is corrupt: {one_sentence(error)}") from error
    if not cells:
        raise UsageError(f"{folder} holds no results: its results.csv has no row")
    return cells


def _cell(folder: Path, row: "pd.Series[Any]", description: Record, latencies: Sequence[Record], floors: dict[Any, float]) -> Cell:
    timed = row["outcome"] == "ok" and not math.isnan(row["latency_s"])
    if timed and not latencies:
        raise ValueError(f"results.csv has a latency of {row['attention']}, but samples.jsonl no sample of {row['comparison']}")
    provenance = description.get("provenance", {})
    commit = f"{provenance.get('commit') or 'no commit'}"[:12] + (" with changes" if provenance.get("dirty") else "")
    settings = description["settings"]
    where = {"folder": folder, "commit": commit, "host": provenance.get("host"), **{name: settings[name] for name in MACHINE}}
    return Cell(
        attention=row["attention"],
        settings={name: value for name, value in settings.items() if name not in MACHINE},
        where={name: str(value) for name, value in where.items()},
        options=description["candidates"][row["attention"]],
        outcome=row["outcome"],
        detail=str(row["detail"]) if isinstance(row["detail"], str) else "",
        noise_floor=floors.get(row["comparison"], math.nan),
        peak_bytes=float(row["peak_bytes"]),
        rounds={record["round"]: _log_median(record) for record in latencies if timed},
        times={record["round"]: datetime.fromisoformat(record["time"]).timestamp() for record in latencies if timed},
    )


def _log_median(record: Record) -> float:
    turns = record["time_slices"] if "time_slices" in record else [record["samples_s"]]
    samples = np.concatenate([np.asarray(turn, dtype=np.float64) for turn in turns])
    if not samples.size or not np.all(np.isfinite(samples) & (samples > 0)):
        raise ValueError(
            f"round {record['round']} of {record['attention']} must hold latencies above 0, got {samples.tolist()[:3]}"
        )
    return math.log(float(np.median(samples)))


# --- what came out ------------------------------------------------------------------------------


def compare_cells(a: Sequence[Cell], b: Sequence[Cell]) -> pd.DataFrame:
    """One row a cell of either set. Raises UsageError if the two have no cell in common.

    ratio is time_A / time_B, above 1 where B is faster; p_holm its p value, corrected for all cells at hand.
    """
    names = matched(a, b)
    left, right = _keyed("A", a, names), _keyed("B", b, names)
    if not left.keys() & right.keys():
        raise UsageError(f"A and B have no cell in common: {_differences(list(left), list(right), names)}")
    rows, timed = [], []
    for key in dict.fromkeys([*left, *right]):
        both = left.get(key), right.get(key)
        row: dict[str, Any] = dict(zip(("attention", *names), key, strict=True))
        for side, cell in zip("ab", both, strict=True):
            row[f"outcome_{side}"] = cell.outcome if cell else "absent"
            row[f"detail_{side}"] = cell.detail if cell else ""
            row[f"latency_{side}_s"] = math.exp(np.mean(list(cell.rounds.values()))) if cell and cell.rounds else math.nan
            row[f"rounds_{side}"] = len(cell.rounds) if cell else 0
            row[f"peak_bytes_{side}"] = cell.peak_bytes if cell and cell.outcome == "ok" else math.nan
        row["verdict"] = _unmeasured(row["outcome_a"], row["outcome_b"])
        one, other = both
        if one and other and one.rounds and other.rounds:
            ratio, row["paired"] = speedup(one, other)
            row |= {"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}
            # np.fmax: a set without a floor leaves that of the other; two of them leave NaN, which is told.
            row["noise_floor"] = float(np.fmax(one.noise_floor, other.noise_floor))
            timed.append((row, ratio))
        rows.append(row)
    ratios = [ratio for _, ratio in timed]
    floors = [0.0 if math.isnan(row["noise_floor"]) else row["noise_floor"] for row, _ in timed]
    for (row, _), verdict, p in zip(timed, verdicts(ratios, floors), holm([ratio.p_value for ratio in ratios]), strict=True):
        row |= {"verdict": verdict, "p_holm": p}
    computed = ("ratio", "ratio_low", "ratio_high", "p_holm", "noise_floor", "verdict", "paired")
    return pd.DataFrame(rows, columns=[*dict.fromkeys([*("attention", *names), *computed, *(key for row in rows for key in row)])])


def _unmeasured(a: str, b: str) -> str:
    if "absent" in (a, b):
        return "only in B" if a == "absent" else "only in A"
    return f"{a} -> {b}" if a != b else "untimed" if a == "ok" else f"{a} in both"


def speedup(a: Cell, b: Cell) -> tuple[Speedup, bool]:
    """time_A / time_B from log round medians, and whether its rounds are paired.

    Where round r of both was measured before round r + 1 of either, on one machine, what slowed the machine in that round
    cancels: Student's t on the differences. Otherwise Welch's t on the two means, with the degrees of freedom of
    Welch 1947 (Biometrika 34). The scatter between rounds is then all that is known: what differed between the two
    runs as a whole, say a warmer machine, is not in the interval, and counts as a difference of the code.
    """
    rounds = _interleaved(a, b)
    if rounds:
        differences = np.array([a.rounds[number] - b.rounds[number] for number in rounds])
        return _student(float(differences.mean()), float(differences.var(ddof=1)) / len(rounds), len(rounds) - 1), True
    sides = [np.array(list(cell.rounds.values())) for cell in (a, b)]
    value = float(sides[0].mean() - sides[1].mean())
    if min(map(len, sides)) < 2:
        return Speedup(math.exp(value), math.nan, math.nan, math.nan), False
    variances = [float(side.var(ddof=1)) / len(side) for side in sides]
    parts = sum(variance**2 / (len(side) - 1) for variance, side in zip(variances, sides, strict=True))
    return _student(value, sum(variances), sum(variances) ** 2 / parts if parts else 1.0), False


def _interleaved(a: Cell, b: Cell) -> list[int]:
    """The rounds that pair up; empty where the times of measurement do not show that any do."""
    rounds = sorted(a.rounds.keys() & b.rounds.keys())
    spans = [sorted((a.times[number], b.times[number])) for number in rounds]
    apart = all(before[1] < after[0] for before, after in itertools.pairwise(spans))
    alike = all(a.where[name] == b.where[name] for name in ("processor", "host"))
    return rounds if len(rounds) > 1 and apart and alike else []


def _student(value: float, variance: float, degrees: float) -> Speedup:
    error = math.sqrt(variance)
    distance = float(student_t.ppf((1 + CONFIDENCE) / 2, degrees)) * error
    p = 2 * float(student_t.sf(abs(value) / error, degrees)) if error else float(value == 0)
    return Speedup(math.exp(value), math.exp(value - distance), math.exp(value + distance), p)


def matched(a: Sequence[Cell], b: Sequence[Cell]) -> list[str]:
    """The settings that cells must agree in: all but those that only one set knows and never varies, as an older one would."""
    names = dict.fromkeys(name for cell in (*a, *b) for name in cell.settings)
    values = [{name: {cell.settings.get(name) for cell in cells} for name in names} for cells in (a, b)]
    return [name for name in names if all(one[name] != {None} for one in values) or any(len(one[name]) > 1 for one in values)]


Key = tuple[Any, ...]


def _keyed(side: str, cells: Sequence[Cell], names: Sequence[str]) -> dict[Key, Cell]:
    keyed: dict[Key, Cell] = {}
    for cell in cells:
        key = (cell.attention, *(cell.settings.get(name) for name in names))
        if key in keyed:
            places = " and ".join(", ".join(one.where[name] for name in MACHINE) for one in (keyed[key], cell))
            raise UsageError(
                f"{side} holds {cell.attention} twice under the same settings, from {places}: give one machine's results"
            )
        keyed[key] = cell
    return keyed


def _differences(left: Sequence[Key], right: Sequence[Key], names: Sequence[str]) -> str:
    told = []
    for name, *values in zip(("attention", *names), zip(*left, strict=True), zip(*right, strict=True), strict=True):
        if not set(values[0]) & set(values[1]):
            in_a, in_b = (", ".join("not given" if one is None else str(one) for one in dict.fromkeys(side)) for side in values)
            told.append(f"{name} is {in_a} in A and {in_b} in B")
    return "; ".join(told) or "each setting has values in common, but no combination of them"


def regressions(rows: pd.DataFrame, threshold: float) -> list[str]:
    """What got worse by more than `threshold`, a sentence each."""
    said = []
    for label, (_, row) in zip(_labels(rows)[1:], rows.iterrows(), strict=True):
        name = " ".join(label.split())
        if row["verdict"] == "slower" and 1 / row["ratio"] > 1 + threshold:
            said.append(f"{name} takes {1 / row['ratio'] - 1:.1%} more time")
        if row["peak_bytes_b"] > (1 + threshold) * row["peak_bytes_a"]:
            said.append(f"{name} holds {row['peak_bytes_b']:.0f} bytes instead of {row['peak_bytes_a']:.0f}")
        if row["outcome_a"] == "ok" and row["outcome_b"] not in ("ok", "absent"):
            said.append(f"{name} was ok and is {row['outcome_b']}: {row['detail_b']}")
    return said


# --- on the screen ------------------------------------------------------------------------------


def render(a: Sequence[Cell], b: Sequence[Cell], rows: pd.DataFrame) -> str:
    """What stands against comparing the two, the table, and memory where it changed, in 80 columns."""
    told = [
        f"{side}: {', '.join(_values(cells, name) for name in ('folder', 'commit', *MACHINE))}"
        for side, cells in (("A", a), ("B", b))
    ]
    if _values(a, "processor") != _values(b, "processor"):
        told.append("Their processors differ: the ratios compare these machines as much as the code.")
    if rows["paired"].isin([False]).any():  # None where nothing was timed
        told.append("Rounds of A and B were not interleaved: all else that changed between the two runs is in the ratio too.")
    if (rows["ratio"].notna() & rows["noise_floor"].isna()).any():
        told.append("Where there is no floor, nothing was measured against itself.")
    options = {cell.attention: cell.options for cell in a}
    changed = sorted({cell.attention for cell in b if options.get(cell.attention, cell.options) != cell.options})
    if changed:
        told.append(f"Their options differ: {', '.join(changed)}.")
    timing = [
        ["ratio", *map(_times, rows["ratio"])],
        ["low", *map(_times, rows["ratio_low"])],
        ["high", *map(_times, rows["ratio_high"])],
        ["floor", *("" if math.isnan(floor) else f"{floor:.1%}" if floor < 1 else ">99%" for floor in rows["noise_floor"])],
        ["verdict", *rows["verdict"]],
    ]
    blocks = [
        "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="   ") for line in told),
        f"time of A / time of B, above 1 where B is faster; low, high: {CONFIDENCE:.0%} interval\n"
        + align_columns(_labels(rows), timing),
    ]
    changed_rows = rows[(rows["peak_bytes_a"] - rows["peak_bytes_b"]).abs() > 0]
    if len(changed_rows):
        old, new = changed_rows["peak_bytes_a"], changed_rows["peak_bytes_b"]
        memory = [[head, *(f"{one / 2**20:.3f}" for one in side)] for head, side in (("MiB in A", old), ("MiB in B", new))]
        memory.append(["more", *(f"{more:+.1%}" for more in new / old - 1)])
        blocks.append("peak memory where it changed\n" + align_columns(_labels(rows, changed_rows.index), memory))
    counts = rows["verdict"].value_counts().items()
    return "\n\n".join([*blocks, f"{len(rows)} cells: {', '.join(f'{count} {verdict}' for verdict, count in counts)}"])


def _values(cells: Sequence[Cell], name: str) -> str:
    return " and ".join(dict.fromkeys(cell.where[name] for cell in cells))


def _times(ratio: float) -> str:
    if not ratio < 1000:
        return "" if math.isnan(ratio) else ">999x"
    return f"{ratio:.{3 if ratio < 2 else 2 if ratio < 10 else 1}f}x"


def _labels(rows: pd.DataFrame, index: "pd.Index[Any] | None" = None) -> list[str]:
    """A head and a label a row: the attention, and every setting in which the rows differ."""
    settings = list(rows.columns[: rows.columns.get_loc("ratio")])
    varied = [name for name in settings if name == "attention" or rows[name].nunique(dropna=False) > 1]
    chosen = rows if index is None else rows.loc[index]
    columns = [[name, *("" if pd.isna(value) else str(value) for value in chosen[name].astype(object))] for name in varied]
    widths = [max(map(len, column)) for column in columns]
    return [" ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)) for line in zip(*columns, strict=True)]


def parse_fraction(text: str) -> float:
    """5% or 0.05. Raises UsageError for anything that is not a fraction of at least 0 and below 1."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise UsageError(f"--threshold must be a fraction such as 5% or 0.05, got '{text}'")
    return value
