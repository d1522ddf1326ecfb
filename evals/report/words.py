"""The verdict of a report, in words: who is fastest, leanest, or best at what it learned, and where that changes."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pandas as pd

from evals.report.charts import named
from evals.report.sources import CONTEXT, LEARNED, Source
from evals.results import frames
from evals.results.folder import ResultFolder
from evals.results.formatting import format_bytes, format_estimate, format_seconds, format_setting
from evals.results.frames import Sweep
from evals.results.settings import SETTINGS, conditions, is_number, setting_name

Row = pd.Series
Said = tuple[str, str]
"""What is asked, in a word or two, and the answer."""


@dataclass(frozen=True)
class Verdict:
    """The answers that one set of rows gives; `where` says under which settings."""

    where: str
    answers: list[Said]


def verdicts(source: Source) -> list[Verdict]:
    """One a set of rows that differ in the swept setting alone."""
    if source.kind == CONTEXT:
        return [_context(rows) for _, rows in _apart(source.table, [*SETTINGS, "limit_bytes"], "")]
    if source.kind == LEARNED:
        table = source.table.assign(best=source.table["best"].astype("boolean").fillna(False))
        return [_learned(rows, source.swept) for _, rows in _apart(table, ["task", "scope", "dtype", "device"], source.swept)]
    results = ResultFolder(source.folder)
    return [
        Verdict(conditions(sweep.rows, sweep.column), [said for said in _speed(sweep, results) if said[1]])
        for _, sweep in frames.sweeps(source.table, source.fits)
    ]


def _apart(table: pd.DataFrame, settings: Sequence[str], swept: str) -> Iterator[tuple[Any, pd.DataFrame]]:
    names = [name for name in settings if name != swept and name in table and table[name].nunique(dropna=False) > 1]
    yield from table.groupby(names, dropna=False, sort=False) if names else [((), table)]


# --- speed ----------------------------------------------------------------------------------------


def _speed(sweep: Sweep, results: ResultFolder) -> Iterator[Said]:
    fastest, leanest, smallest = [], [], []
    for place in sweep.places:
        cell = sweep.rows[(sweep.rows[sweep.column] == place) & (sweep.rows["outcome"] == "ok")]
        fastest.append(_fastest(cell, results))
        leanest.append(_least(cell, "peak_bytes"))
        smallest.append(_least(cell, "state_bytes"))
    yield "Fastest", _leaders(sweep, fastest)
    yield "By how much", _by_how_much(sweep, fastest)
    yield "Crossovers", _crossovers(sweep)
    yield "Growth", _growth(sweep)
    yield "Leanest", _leaders(sweep, leanest, tied=" and ")
    yield "Smallest state", _leaders(sweep, smallest, tied=" and ")
    failed = sweep.rows[sweep.rows["outcome"] != "ok"]
    yield "No number", _failures(failed, len(sweep.rows))
    if "noise_floor" in sweep.rows and sweep.rows["noise_floor"].notna().any():
        floor = sweep.rows["noise_floor"].max()
        yield "Noise", f"{sweep.reference} differed from itself by up to {floor:.1%}; no difference below that is claimed."


def _fastest(cell: pd.DataFrame, results: ResultFolder) -> list[str]:
    """The least latency, and after it those of which no one can say that they are slower: by 95 %, and above the noise."""
    if cell.empty:
        return []
    known = results.table.loc[cell.index]  # the same rows, with all that evidence asks for
    ordered = [row for _, row in known.sort_values("latency_s").iterrows()]
    floor = results.floor(known)
    floor = 0.0 if math.isinf(floor) else floor
    level = [str(ordered[0]["attention"])]
    for other in ordered[1:]:
        ratio, _ = results.speedup(ordered[0], other)
        if not (ratio.low > 1 and ratio.value > 1 + floor):
            level.append(str(other["attention"]))
    return level


def _least(cell: pd.DataFrame, column: str) -> list[str]:
    """Those that need the least, and what needs as much within 1 %."""
    known = cell[cell[column].notna()] if column in cell else cell[:0]
    if known.empty or known[column].max() == 0:
        return []
    return [str(name) for name in known.sort_values(column)["attention"][known[column] <= 1.01 * known[column].min()]]


def _leaders(sweep: Sweep, level: Sequence[list[str]], tied: str = " or ") -> str:
    """Who leads where, a clause for as long as it is the same ones: 'standard at 128 to 256 tokens; bsbr at 4k tokens'."""
    clauses = []
    for names, group in groupby(range(len(level)), key=lambda index: level[index]):
        indices = list(group)
        if names:
            clauses.append(f"{_listed(names, tied)} at {_span(sweep, indices)}")
    return f"{'; '.join(clauses)}." if clauses else ""


def _listed(names: Sequence[str], tied: str) -> str:
    few = f"{', '.join(names[:-1])}{tied}{names[-1]}" if len(names) > 1 else names[0]
    if len(names) > 4:
        few = f"{', '.join(names[:3])}{tied}{len(names) - 3} others"
    return f"{few} (not told apart)" if tied == " or " and len(names) > 1 else few


def _span(sweep: Sweep, indices: Sequence[int]) -> str:
    if len(indices) == 1:
        return sweep.at(indices[0])
    if sweep.ordered:
        return f"{sweep.ticks[indices[0]]} {'and' if len(indices) == 2 else 'to'} {sweep.at(indices[-1])}"
    return ", ".join(sweep.at(index) for index in indices)


def _by_how_much(sweep: Sweep, fastest: Sequence[list[str]]) -> str:
    """Of the fastest where the sweep goes furthest: its latency, and its speed-up over the reference."""
    index = max((index for index, names in enumerate(fastest) if names), default=None)
    if index is None:
        return ""
    name = fastest[index][0]
    row = sweep.cells[name].iloc[index]
    text = f"At {sweep.at(index)} {name} takes {interval(row, 'latency_s', 'latency_low_s', 'latency_high_s', format_seconds)}"
    if pd.notna(row["speedup"]) and name != sweep.reference:
        text += f", {interval(row, 'speedup', 'speedup_low', 'speedup_high', times)} as fast as {sweep.reference}"
    return f"{text}."


def interval(row: Row, value: str, low: str, high: str, unit: Any) -> str:
    """A number with its interval: 62.2 ms [55.3 ms, 70.1 ms]."""
    text = unit(row[value])
    return str(text) if pd.isna(row[low]) or pd.isna(row[high]) else f"{text} [{unit(row[low])}, {unit(row[high])}]"


def times(value: float) -> str:
    return f"{value:.3g}×"


def _crossovers(sweep: Sweep) -> str:
    """Where the others overtake the reference, or fall behind it; those of which neither is sure are not told."""
    if sweep.crossovers is None or sweep.crossovers.empty:
        return ""
    clauses = []
    for _, row in sweep.crossovers.iterrows():
        names = [str(row["first"]), str(row["second"])]
        if sweep.reference not in names or pd.isna(row["at"]) or row.get("after") not in ("faster", "slower"):
            continue
        other = names[1 - names.index(sweep.reference)]
        faster = (row["after"] == "faster") == (other == names[0])  # `after` is said of the first
        unit = sweep.column.replace("_", " ").replace("seq len", "tokens")
        bounds = f"[{format_estimate(row['at_low'])}, {format_estimate(row['at_high'])}]"
        clauses.append(
            f"{other} {'overtakes' if faster else 'falls behind'} {sweep.reference} at {format_estimate(row['at'])} {bounds} {unit}"
        )
    return f"{'; '.join(clauses)}." if clauses else f"No one crosses {sweep.reference} beyond doubt in this range."


def _growth(sweep: Sweep) -> str:
    """How the latency of each grows along the swept setting, the least exponent first."""
    if sweep.scaling is None or not sweep.ordered:
        return ""
    fits = sweep.scaling[(sweep.scaling["quantity"] == "latency") & sweep.scaling["exponent"].notna()].sort_values("exponent")
    bounds, two_digits = ("exponent", "exponent_low", "exponent_high"), "{:.2f}".format
    told = [f"{row['attention']} {interval(row, *bounds, two_digits)}" for _, row in fits.iterrows()]
    return f"Time grows as {named(sweep.column)} to the power of: {'; '.join(told)}." if told else ""


def _failures(failed: pd.DataFrame, cells: int) -> str:
    if failed.empty:
        return ""
    counts = ", ".join(f"{count} {outcome}" for outcome, count in failed["outcome"].value_counts().items())
    return f"{len(failed)} of {cells} cells gave none ({counts}); they are marked in the charts, with the reason in the table."


# --- what was learned -----------------------------------------------------------------------------


def _learned(rows: pd.DataFrame, swept: str) -> Verdict:
    whole = rows[rows["depth"].isna() & rows["position"].isna()]
    ok = whole[whole["best"] & (whole["outcome"] == "ok")]
    where = ", ".join(dict.fromkeys(map(format_setting, rows["task"].dropna()))) if "task" in rows else ""
    bits = ok["bits_per_byte"].notna().any()
    quantity, question = ("bits_per_byte", "Fewest bits per byte") if bits else ("accuracy", "Best at recall")
    answers = []
    trained = ok[ok["eval_seq_len"] == ok["seq_len"]]
    name = setting_name(swept)
    answers.append((question, _best_by(trained, swept, quantity, name)))
    answers.append(("Smallest state", _smallest(trained, swept, quantity, name)))
    longer = ok[ok[swept] == ok[swept].max()] if is_number(ok[swept]) else ok[:0]
    if longer["eval_seq_len"].nunique() > 1:
        answers.append(("At lengths not trained at", _best_by(longer, "eval_seq_len", quantity, "tokens")))
    if not bits and ok["chance"].notna().any():
        answers.append(("Who remembers nothing", f"would have {ok['chance'].max():.2%} right."))
    if len(ok) and ok["seeds"].max() < 2:
        answers.append(("Seeds", "One each: there is no interval, and no difference is beyond doubt."))
    answers.append(("No number", _failures(whole[whole["outcome"] != "ok"], len(whole))))
    return Verdict(where, [said for said in answers if said[1]])


def _best_by(rows: pd.DataFrame, column: str, quantity: str, name: str) -> str:
    """The best at each place; not told apart is what has an interval in common with it."""
    clauses = []
    for place, cell in rows.groupby(column, sort=True):
        ordered = cell.sort_values([quantity, "attention"], ascending=[quantity == "bits_per_byte", True])
        best = ordered.iloc[0]
        low, high = best[f"{quantity}_low"], best[f"{quantity}_high"]
        level = ordered[(ordered[f"{quantity}_low"] <= high) & (ordered[f"{quantity}_high"] >= low)]
        others = [str(one) for one in level["attention"] if one != best["attention"]]
        tied = f" (not told apart: {', '.join(others)})" if others else ""
        told = interval(best, quantity, f"{quantity}_low", f"{quantity}_high", "{:.3f}".format)
        clauses.append(f"{best['attention']} with {told} at {format_setting(place)} {name}{tied}")
    return f"{'; '.join(clauses)}." if clauses else ""


def _smallest(rows: pd.DataFrame, column: str, quantity: str, name: str) -> str:
    """Who keeps least to decode from at each place, and how well it does with that."""
    clauses = []
    for place, cell in rows[rows["state_bytes"] > 0].groupby(column, sort=True):
        least = cell.sort_values("state_bytes", kind="stable").iloc[0]
        told = interval(least, quantity, f"{quantity}_low", f"{quantity}_high", "{:.3f}".format)
        held = f"{format_bytes(least['state_bytes'])} at {format_setting(place)} {name}"
        clauses.append(f"{least['attention']} with {held}, and {quantity.replace('_', ' ')} {told}")
    return f"{'; '.join(clauses)}." if clauses else ""


# --- the longest context --------------------------------------------------------------------------


def _context(rows: pd.DataFrame) -> Verdict:
    found = rows[rows["max_context"].notna()].sort_values("max_context", ascending=False)
    told = [f"{row['attention']} {format_setting(row['max_context'])}" for _, row in found.iterrows()]
    limit = format_bytes(float(rows["limit_bytes"].max()))
    answers = [
        ("Longest context", f"Within {limit}, in tokens: {'; '.join(told)}." if told else ""),
        ("No number", _failures(rows[rows["outcome"] != "ok"], len(rows))),
    ]
    return Verdict(conditions(rows, "attention"), [said for said in answers if said[1]])
