"""The changes between result folders: one table for each folder after the first, compared with the first."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd

from evals.errors import UsageError
from evals.report.sources import CONTEXT, TABLES, TRAINING, Part, Source
from evals.report.summary import NO_DIFFERENCE, format_interval, format_metric, format_number, intervals_overlap
from evals.results import schema
from evals.results.cells import read_cells
from evals.results.compare import compare_cells
from evals.results.formatting import format_setting
from evals.results.metrics import ACCURACY, BITS_PER_BYTE, SPEEDUP
from evals.results.settings import setting_columns

UNCHANGED = {"same", "ambiguous", "untimed", *(f"{outcome} in both" for outcome in schema.words("latency", "outcome"))}
"""Verdicts that state no change."""


@dataclass(frozen=True)
class Change:
    """The table of changes between two folders; only a note if they cannot be compared."""

    title: str
    note: str
    headings: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    unchanged: list[list[str]] = field(default_factory=list)  # rows whose verdict states no change; the page folds them away


def changes(part: Part) -> list[Change]:
    """The changes from the first folder to each of the others."""
    first, *others = part.sources
    make = {CONTEXT: _context, TRAINING: _training}.get(part.kind, _timing)
    return [make(first, other) for other in others]


def _title(first: Source, other: Source) -> str:
    return f"{first.label} → {other.label}"


def _timing(first: Source, other: Source) -> Change:
    title = _title(first, other)
    try:
        table = compare_cells(read_cells(first.folder), read_cells(other.folder))
    except UsageError as error:
        return Change(title, f"They cannot be compared. A is {first.label}, B is {other.label}: {error}.")
    both = table[~table["verdict"].isin(["only in A", "only in B"])]
    settings = [name for name in both.columns[1 : both.columns.get_loc("ratio")] if both[name].nunique(dropna=False) > 1]
    paired = (
        "Rounds are paired."
        if table["paired"].dropna().any()
        else "The two were not interleaved, so differences between the machines or their days are in the speed-up too."
    )
    note = (
        f"{_counts(table, both, first, other)} A speed-up above 1 means that {other.label} is faster than {first.label}. "
        f"p is corrected for all rows (Holm). {paired}"
    )
    change = Change(title, note, ["attention", *settings, "verdict", "speed-up", "p", "peak memory"])
    for _, row in both.iterrows():
        rows = change.unchanged if row["verdict"] in UNCHANGED else change.rows
        rows.append([str(row["attention"]), *(format_setting(row[name]) for name in settings), *_timing_values(row)])
    return change


def _timing_values(row: pd.Series) -> list[str]:
    """Verdict, speed-up, p value and ratio of peak memory, as text; empty where they are unknown."""
    speedup = p_value = memory = ""
    if pd.notna(row["ratio"]):
        speedup = format_interval(row, ("ratio", "ratio_low", "ratio_high"), lambda ratio: format_number(ratio, SPEEDUP))
        p_value = f"{row['p_holm']:.2g}" if row["p_holm"] >= 1e-4 else "< 0.0001"
    if row["peak_bytes_a"] > 0 and pd.notna(row["peak_bytes_b"]):
        memory = format_number(row["peak_bytes_b"] / row["peak_bytes_a"], SPEEDUP)
    return [str(row["verdict"]), speedup, p_value, memory]


def _counts(table: pd.DataFrame, both: pd.DataFrame, first: Source, other: Source) -> str:
    """Numbers of rows by verdict, and of rows that only one of the two folders has."""
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in both["verdict"].value_counts().items())
    absent = [
        f"; {count} only in {source.label}"
        for source, verdict in ((first, "only in A"), (other, "only in B"))
        if (count := int((table["verdict"] == verdict).sum()))
    ]
    return f"Of {len(both)} rows that both have: {verdicts}{''.join(absent)}."


def _training(first: Source, other: Source) -> Change:
    metric = BITS_PER_BYTE if other.table["bits_per_byte"].notna().any() else ACCURACY
    keys = list(dict.fromkeys(["attention", first.swept, *_varied(first, other), "eval_seq_len"]))
    rows = []
    for pair in _pair_rows(_best_runs(first, keys), _best_runs(other, keys), keys):
        verdict = "unknown"
        if pair.before is not None and pair.after is not None:
            overlap = intervals_overlap(pair.before, pair.after, metric)
            is_better = (pair.after[metric.column] > pair.before[metric.column]) == metric.higher_is_better
            verdict = {None: "unknown", True: NO_DIFFERENCE, False: "better" if is_better else "worse"}[overlap]
        values = ["not measured" if row is None else format_metric(row, metric) for row in (pair.before, pair.after)]
        rows.append([*pair.key, *values, verdict])
    note = "Better or worse means that the intervals over seeds do not overlap."
    return Change(_title(first, other), note, [*keys, f"{metric.label} before", "after", "verdict"], rows)


def _best_runs(source: Source, keys: list[str]) -> pd.DataFrame:
    """The results over all targets at the best learning rate, indexed by the keys."""
    table = source.table
    is_best = table["best"].astype("boolean").fillna(False)
    whole = table[is_best & (table["outcome"] == "ok") & table["depth"].isna() & table["position"].isna()]
    return whole.drop_duplicates(keys, keep="last").set_index(keys)


def _context(first: Source, other: Source) -> Change:
    keys = ["attention", *_varied(first, other)]
    old, new = (source.table.drop_duplicates(keys, keep="last").set_index(keys) for source in (first, other))
    rows = []
    for pair in _pair_rows(old, new, keys):
        before, after = (float("nan") if row is None else row["max_context"] for row in (pair.before, pair.after))
        values = ["none" if pd.isna(value) else format_setting(value) for value in (before, after)]
        rows.append([*pair.key, *values, "" if pd.isna(after / before) else format_number(after / before, SPEEDUP)])
    return Change(_title(first, other), "In tokens.", [*keys, "before", "after", "ratio"], rows)


def _varied(first: Source, other: Source) -> list[str]:
    """The settings in which rows of either folder differ, without those that tell machines apart."""
    kind = TABLES[first.kind]
    both = [name for name in setting_columns(first.table, kind) if name in setting_columns(other.table, kind)]
    return [name for name in both if name not in ("processor", "torch", first.swept) and _varies(name, first, other)]


def _varies(setting: str, *sources: Source) -> bool:
    return any(source.table[setting].nunique(dropna=False) > 1 for source in sources)


class RowPair(NamedTuple):
    """The rows of one key in two tables; None where a table has no such row."""

    key: list[str]
    before: "pd.Series | None"
    after: "pd.Series | None"


def _pair_rows(before: pd.DataFrame, after: pd.DataFrame, keys: list[str]) -> Iterator[RowPair]:
    for key in dict.fromkeys([*before.index, *after.index]):
        texts = [format_setting(value) for value in (key if len(keys) > 1 else (key,))]
        yield RowPair(texts, *(table.loc[key] if key in table.index else None for table in (before, after)))
