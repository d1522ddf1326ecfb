"""The summary at the top of a report, in sentences: the fastest or most accurate attention, and where that changes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import pandas as pd

from evals.report.charts import short_axis_label, value_phrase
from evals.report.sources import CONTEXT, TRAINING, Source
from evals.results import frames
from evals.results.folder import ResultFolder
from evals.results.formatting import format_estimate, format_setting
from evals.results.frames import Sweep
from evals.results.max_context_table import split_searches
from evals.results.metrics import ACCURACY, BITS_PER_BYTE, BYTES, LATENCY, MAX_CONTEXT, PEAK_MEMORY, SPEEDUP, STATE, Metric
from evals.results.settings import conditions, is_number, setting_name, training_phrase

NO_DIFFERENCE = "no difference found"
MAX_NAMES = 4
"""Longer lists of names are cut."""


class Answer(NamedTuple):
    """One line of a summary."""

    topic: str
    text: str  # sentences; the line is left out if it is empty


@dataclass(frozen=True)
class Summary:
    """The answers of a set of rows that differ in the swept setting alone."""

    conditions: str
    answers: list[Answer]


def summarize(source: Source) -> list[Summary]:
    """One summary for every set of rows that differ in the swept setting alone."""
    if source.kind == CONTEXT:
        return [_summary(conditions(rows, "attention"), _context(rows)) for _, rows in split_searches(source.table)]
    if source.kind == TRAINING:
        table = source.table.assign(best=source.table["best"].astype("boolean").fillna(False))
        groups = frames.split(table, source.swept, "accuracy")
        return [_summary(_tasks(rows, settings), _training(rows, source.swept)) for settings, rows in groups]
    folder = ResultFolder(source.folder)
    sweeps = [sweep for _, sweep in frames.sweeps(source.table, source.fits)]
    return [_summary(conditions(sweep.rows, sweep.column), _timing(sweep, folder)) for sweep in sweeps]


def _summary(conditions: str, answers: Iterator[Answer]) -> Summary:
    return Summary(conditions, [answer for answer in answers if answer.text])


# --- numbers and lists in prose -------------------------------------------------------------------


def format_interval(row: pd.Series, columns: tuple[str, str | None, str | None], write: Callable[[float], str]) -> str:
    """A number and its interval: 62.2 ms [55.3 ms, 70.1 ms]. columns: of the value, its lower and its upper end."""
    value, low, high = columns
    text = write(row[value])
    if low is None or high is None or pd.isna(row[low]) or pd.isna(row[high]):
        return text
    return f"{text} [{write(row[low])}, {write(row[high])}]"


def format_metric(row: pd.Series, metric: Metric) -> str:
    """A metric of a row and its interval, in three digits, or the metric's number of decimals."""
    return format_interval(row, (metric.column, metric.low, metric.high), lambda value: format_number(value, metric))


def format_number(value: float, metric: Metric) -> str:
    """A value of a metric in three digits, or the metric's number of decimals."""
    return metric.unit.format(value, 3) if metric.decimals is None else f"{value:.{metric.decimals}f}"


def intervals_overlap(first: pd.Series, second: pd.Series, metric: Metric) -> bool | None:
    """Whether the intervals of a metric in two rows have values in common; None if one of them has no interval."""
    ends = [float(row[column]) if column else math.nan for row in (first, second) for column in (metric.low, metric.high)]
    return None if any(map(math.isnan, ends)) else ends[0] <= ends[3] and ends[2] <= ends[1]


def _join(clauses: Sequence[str], otherwise: str = "") -> str:
    return f"{'; '.join(clauses)}." if clauses else otherwise


def _name_list(names: Sequence[str], conjunction: str) -> str:
    if len(names) > MAX_NAMES:
        return f"{', '.join(names[:3])} {conjunction} {len(names) - 3} others"
    return f"{', '.join(names[:-1])} {conjunction} {names[-1]}" if len(names) > 1 else names[0]


def _missing(rows: pd.DataFrame) -> Answer:
    """Number of rows without a number, by outcome."""
    failed = rows[rows["outcome"] != "ok"]
    counts = ", ".join(f"{count} {outcome}" for outcome, count in failed["outcome"].value_counts().items())
    text = f"{len(failed)} of {len(rows)} rows have no number ({counts}). The charts mark them, and the table gives the reasons."
    return Answer("No number", text if len(failed) else "")


# --- timing ---------------------------------------------------------------------------------------


def _timing(sweep: Sweep, folder: ResultFolder) -> Iterator[Answer]:
    ok = sweep.rows[sweep.rows["outcome"] == "ok"]
    rows = [ok[ok[sweep.column] == value] for value in sweep.values]
    fastest = [_fastest(group, folder) for group in rows]
    yield Answer("Fastest", _leaders(sweep, fastest, "or", note=f" ({NO_DIFFERENCE})"))
    yield Answer("Speed-up", _speedup_at_end(sweep, fastest))
    yield Answer("Crossovers", _crossovers(sweep))
    yield Answer("Growth", _growth(sweep))
    yield Answer("Least memory", _leaders(sweep, [_smallest(group, PEAK_MEMORY) for group in rows], "and"))
    yield Answer("Smallest state", _leaders(sweep, [_smallest(group, STATE) for group in rows], "and"))
    yield _missing(sweep.rows)
    floor = sweep.rows["noise_floor"].max() if "noise_floor" in sweep.rows else math.nan
    noise = f"{sweep.reference} differed from itself by up to {floor:.1%}. No smaller difference is claimed."
    yield Answer("Noise", "" if math.isnan(floor) else noise)


def _fastest(rows: pd.DataFrame, folder: ResultFolder) -> list[str]:
    """The attention with the least latency, and those that are not slower with 95 % confidence and beyond the noise."""
    if rows.empty:
        return []
    known = folder.table.loc[rows.index]  # the same rows, with all columns that speed-ups need
    best, *others = [row for _, row in known.sort_values("latency_s").iterrows()]
    floor = folder.noise_floor(known)
    names = [str(best["attention"])]
    for other in others:
        ratio, _ = folder.speedup(best, other)
        if not (ratio.low > 1 and ratio.value > 1 + (0.0 if math.isinf(floor) else floor)):
            names.append(str(other["attention"]))
    return names


def _smallest(rows: pd.DataFrame, metric: Metric) -> list[str]:
    """The attentions with the least of a metric, within 1 %; none if it is 0 for all."""
    known = rows[rows[metric.column].notna()] if metric.column in rows else rows[:0]
    if known.empty or known[metric.column].max() == 0:
        return []
    known = known.sort_values(metric.column)
    return [str(name) for name in known["attention"][known[metric.column] <= 1.01 * known[metric.column].min()]]


def _leaders(sweep: Sweep, names: Sequence[list[str]], conjunction: str, note: str = "") -> str:
    """The leaders along the swept setting, neighbours merged: 'standard at 128 to 256 tokens; bsbr at 4k tokens.'"""
    clauses = []
    for leaders, group in groupby(range(len(names)), key=lambda index: names[index]):
        if leaders:
            clauses.append(
                f"{_name_list(leaders, conjunction)}{note if len(leaders) > 1 else ''} at {_value_range(sweep, list(group))}"
            )
    return _join(clauses)


def _value_range(sweep: Sweep, indices: Sequence[int]) -> str:
    """Neighbouring values of the swept setting: 128 to 4k tokens."""
    if len(indices) > 1 and sweep.ordered:
        return f"{sweep.ticks[indices[0]]} {'and' if len(indices) == 2 else 'to'} {sweep.at(indices[-1])}"
    return ", ".join(sweep.at(index) for index in indices)


def _speedup_at_end(sweep: Sweep, fastest: Sequence[list[str]]) -> str:
    """Latency and speed-up of the fastest attention at the last value of the swept setting."""
    index = max((index for index, names in enumerate(fastest) if names), default=None)
    if index is None:
        return ""
    name = fastest[index][0]
    row = sweep.by_attention[name].iloc[index]
    text = f"At {sweep.at(index)}, {name} takes {format_metric(row, LATENCY)}"
    if pd.isna(row["speedup"]) or name == sweep.reference:
        return f"{text}."
    comparison = "faster than" if row["speedup"] > 1 else "as fast as"
    return f"{text} and is {format_metric(row, SPEEDUP)} {comparison} {sweep.reference}."


def _crossovers(sweep: Sweep) -> str:
    """The crossovers with the reference as sentences, without those of uncertain direction."""
    if sweep.crossovers is None or sweep.crossovers.empty:
        return ""
    unit = "tokens" if sweep.column == "seq_len" else setting_name(sweep.column)
    clauses = []
    for _, row in sweep.crossovers.iterrows():
        names = [str(row["first"]), str(row["second"])]
        if sweep.reference not in names or pd.isna(row["at"]) or row.get("after") not in ("faster", "slower"):
            continue
        other = names[1 - names.index(sweep.reference)]
        is_faster = (row["after"] == "faster") == (other == names[0])  # the column `after` is about the first
        crossing = format_interval(row, ("at", "at_low", "at_high"), format_estimate)
        clauses.append(f"{other} becomes {'faster' if is_faster else 'slower'} than {sweep.reference} at {crossing} {unit}")
    return _join(clauses, f"No attention certainly becomes faster or slower than {sweep.reference} in this range.")


def _growth(sweep: Sweep) -> str:
    """The exponents of latency along the swept setting, the smallest first."""
    if sweep.scaling is None or not sweep.ordered:
        return ""
    fits = sweep.scaling[(sweep.scaling["quantity"] == "latency") & sweep.scaling["exponent"].notna()].sort_values("exponent")
    columns = ("exponent", "exponent_low", "exponent_high")
    exponents = [f"{row['attention']} {format_interval(row, columns, '{:.2f}'.format)}" for _, row in fits.iterrows()]
    return f"Time grows as {short_axis_label(sweep.column)} to the power of: {_join(exponents)}" if exponents else ""


# --- training -------------------------------------------------------------------------------------


def _tasks(rows: pd.DataFrame, settings: Mapping[str, Any]) -> str:
    tasks = dict.fromkeys(map(format_setting, rows["task"].dropna())) if "task" in rows else {}
    further = (training_phrase(name, format_setting(value)) for name, value in settings.items() if name != "task")
    return ", ".join([*tasks, *further])


def _training(rows: pd.DataFrame, swept: str) -> Iterator[Answer]:
    whole = rows[rows["depth"].isna() & rows["position"].isna()]
    ok = whole[whole["best"] & (whole["outcome"] == "ok")]
    metric = BITS_PER_BYTE if ok["bits_per_byte"].notna().any() else ACCURACY
    topic = "Fewest bits per byte" if metric is BITS_PER_BYTE else "Most accurate"
    trained = ok[ok["eval_seq_len"] == ok["seq_len"]]
    yield Answer(topic, _best_by(trained, swept, metric))
    yield Answer("Smallest state", _smallest_state_by(trained, swept, metric))
    longest = ok[ok[swept] == ok[swept].max()] if is_number(ok[swept]) else ok[:0]
    if longest["eval_seq_len"].nunique() > 1:
        yield Answer("Beyond the training length", _best_by(longest, "eval_seq_len", metric))
    if metric is ACCURACY and ok["chance"].notna().any():
        yield Answer("Chance", f"A guess is right with a probability of {ok['chance'].max():.2%}.")
    if len(ok) and ok["seeds"].max() < 2:
        yield Answer("Seeds", "One seed each: there are no intervals, and no difference is certain.")
    yield _missing(whole)


def _best_by(rows: pd.DataFrame, column: str, metric: Metric) -> str:
    """The best attention at each value of a column, and others with intervals that overlap its interval."""
    phrase, clauses = value_phrase(column), []
    for value, group in rows.groupby(column, sort=True):
        ranked = group.sort_values([metric.column, "attention"], ascending=[not metric.higher_is_better, True])
        best = ranked.iloc[0]
        others = [str(row["attention"]) for _, row in ranked.iloc[1:].iterrows() if intervals_overlap(best, row, metric)]
        note = f" ({NO_DIFFERENCE}: {', '.join(others)})" if others else ""
        clauses.append(f"{best['attention']} with {format_metric(best, metric)} at {phrase.format(format_setting(value))}{note}")
    return _join(clauses)


def _smallest_state_by(rows: pd.DataFrame, column: str, metric: Metric) -> str:
    """The attention with the smallest decoding state at each value of a column, and its result."""
    phrase, clauses = value_phrase(column), []
    for value, group in rows[rows["state_bytes"] > 0].groupby(column, sort=True):
        smallest = group.sort_values("state_bytes", kind="stable").iloc[0]
        clauses.append(
            f"{smallest['attention']} with {format_metric(smallest, STATE)} at {phrase.format(format_setting(value))}, "
            f"and {metric.label} {format_metric(smallest, metric)}"
        )
    return _join(clauses)


# --- the longest context --------------------------------------------------------------------------


def _context(rows: pd.DataFrame) -> Iterator[Answer]:
    fitting = rows[rows["max_context"].notna()].sort_values("max_context", ascending=False)
    contexts = [f"{row['attention']} {format_setting(row[MAX_CONTEXT.column])}" for _, row in fitting.iterrows()]
    limit = BYTES.format(float(rows["limit_bytes"].max()))
    yield Answer("Longest context", f"In tokens, within {limit}: {_join(contexts)}" if contexts else "")
    yield _missing(rows)
