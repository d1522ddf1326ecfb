"""What changed between sets of results: from the first that was given to each of the others."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pandas as pd

from evals.errors import UsageError
from evals.plots.style import FAILURES
from evals.report.sources import CONTEXT, LEARNED, Part, Source
from evals.report.words import interval, times
from evals.results import compare
from evals.results.formatting import format_setting


@dataclass(frozen=True)
class Change:
    """A table, or in words why there is none."""

    title: str
    note: str
    heads: list[str]
    rows: list[list[str]]
    unchanged: list[list[str]] = field(default_factory=list)
    """Rows in which nothing is said to have changed."""


UNCHANGED = ("same", "ambiguous", "untimed", *(f"{outcome} in both" for outcome in FAILURES))


def changes(part: Part) -> list[Change]:
    """One a set but the first; none where there is one."""
    first, *others = part.sources
    made = {CONTEXT: _context, LEARNED: _learned}.get(part.kind, _speed)
    return [made(first, other) for other in others]


def _titled(first: Source, other: Source) -> str:
    return f"{first.label} → {other.label}"


def _speed(first: Source, other: Source) -> Change:
    title = _titled(first, other)
    try:
        table = compare.compare_cells(compare.read_cells(first.folder), compare.read_cells(other.folder))
    except UsageError as error:
        return Change(title, f"They cannot be compared. A is {first.label}, B {other.label}: {error}.", [], [])
    paired = bool(table["paired"].dropna().any())
    both = table[~table["verdict"].isin(["only in A", "only in B"])]
    note = f"{_counted(table, both, first, other)} A speed-up above 1: {other.label} is faster. p is corrected for all (Holm). " + (
        "Rounds are paired."
        if paired
        else "The two were not measured in turns: what differs between the machines, or their days, counts too."
    )
    settings = [name for name in both.columns[1 : both.columns.get_loc("ratio")] if both[name].nunique(dropna=False) > 1]
    rows: dict[bool, list[list[str]]] = {False: [], True: []}
    for _, row in both.iterrows():
        timed = pd.notna(row["ratio"])
        held = row["peak_bytes_b"] / row["peak_bytes_a"] if row["peak_bytes_a"] > 0 else float("nan")
        told = (
            [
                interval(row, "ratio", "ratio_low", "ratio_high", times),
                f"{row['p_holm']:.2g}" if row["p_holm"] >= 1e-4 else "< 0.0001",
            ]
            if timed
            else ["", ""]
        )
        rows[row["verdict"] in UNCHANGED].append(
            [
                str(row["attention"]),
                *(format_setting(row[name]) for name in settings),
                str(row["verdict"]),
                *told,
                "" if pd.isna(held) else times(held),
            ]
        )
    return Change(title, note, ["attention", *settings, "verdict", "speed-up", "p", "peak memory"], rows[False], rows[True])


def _counted(table: pd.DataFrame, both: pd.DataFrame, first: Source, other: Source) -> str:
    """How many cells came to which verdict, and how many only one of the two has."""
    told = ", ".join(f"{count} {verdict}" for verdict, count in both["verdict"].value_counts().items())
    alone = [
        f"{count} only in {source.label}"
        for source, verdict in ((first, "only in A"), (other, "only in B"))
        if (count := int((table["verdict"] == verdict).sum()))
    ]
    return f"Of {len(both)} cells that both have: {told}{''.join(f'; {words}' for words in alone)}."


def _learned(first: Source, other: Source) -> Change:
    quantity = "bits_per_byte" if other.table["bits_per_byte"].notna().any() else "accuracy"
    keys = list(dict.fromkeys(["attention", first.swept, "eval_seq_len"]))
    before, after = (_whole(source, keys) for source in (first, other))
    rows = []
    for place, one, two in _joined(before, after, keys):
        low, high = f"{quantity}_low", f"{quantity}_high"
        three = "{:.3f}".format
        told = [interval(row, quantity, low, high, three) if row is not None else "not measured" for row in (one, two)]
        word = "unknown"
        if one is not None and two is not None and one[[low, high]].notna().all() and two[[low, high]].notna().all():
            better = (two[quantity] > one[quantity]) == (quantity == "accuracy")
            apart = one[high] < two[low] or two[high] < one[low]
            word = "not told apart" if not apart else "better" if better else "worse"
        rows.append([*place, *told, word])
    note = "Better and worse are said where the intervals over seeds have nothing in common."
    return Change(_titled(first, other), note, [*keys, f"{quantity} before", "after", "verdict"], rows)


def _whole(source: Source, keys: list[str]) -> pd.DataFrame:
    table = source.table
    best = table["best"].astype("boolean").fillna(False)
    whole = table[best & (table["outcome"] == "ok") & table["depth"].isna() & table["position"].isna()]
    return whole.drop_duplicates(keys, keep="last").set_index(keys)


def _context(first: Source, other: Source) -> Change:
    keys = ["attention"]
    before, after = (source.table.drop_duplicates(keys, keep="last").set_index(keys) for source in (first, other))
    rows = []
    for place, one, two in _joined(before, after, keys):
        found = [row["max_context"] if row is not None else float("nan") for row in (one, two)]
        ratio = found[1] / found[0]
        rows.append(
            [
                *place,
                *("none" if pd.isna(value) else format_setting(value) for value in found),
                "" if pd.isna(ratio) else times(ratio),
            ]
        )
    return Change(_titled(first, other), "In tokens.", ["attention", "before", "after", "ratio"], rows)


def _joined(
    before: pd.DataFrame, after: pd.DataFrame, keys: list[str]
) -> "Iterator[tuple[list[str], pd.Series | None, pd.Series | None]]":
    """Every place of either, with its row in both."""
    for place in dict.fromkeys([*before.index, *after.index]):
        told = [format_setting(value) for value in (place if len(keys) > 1 else (place,))]
        one, two = (table.loc[place] if place in table.index else None for table in (before, after))
        yield told, one, two
