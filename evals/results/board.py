"""The board: the attentions on all machines that measured the same sweep, in units in which machines can be compared."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from evals.errors import UsageError
from evals.results.formatting import format_setting, format_value
from evals.results.frames import read_table, swept_column
from evals.results.ledger import Ledger
from evals.results.machines import MACHINE, machine_of
from evals.results.markup import Table
from evals.results.metrics import RATIO, ROOFLINE, SPEEDUP, Metric

NORMALISED = Metric(
    *("normalised_time", "normalised_time", "time over the roofline of {reference} on that machine", RATIO),
    *("normalised_low", "normalised_high"),
)
"""Latency over the least time in which the machine can compute the reference: 1 is the reference at the machine's peak."""

SAME_SETTINGS = ("workload", "scope", "dtype", "batch_size", "hidden_dim", "num_heads", "relative_to")
"""Settings in which all rows of a board agree. Device, processor and threads belong to the machine."""


def board(folders: Sequence[Path]) -> list[Table]:
    """Makes the tables of the board: normalised time, speed-up and fraction of the roofline, each attention on each machine.

    Args:
        folders: results of one sweep, one or more machines a folder.

    Returns:
        Tables at the greatest value of the swept setting that all machines measured.

    Raises:
        UsageError: if there is no folder, or the folders do not have one such value, or were measured under other settings.
    """
    if not folders:
        raise UsageError("a board needs at least one folder of results")
    rows = pd.concat([_read(folder) for folder in folders], ignore_index=True)
    column = swept_column(rows)
    for setting in SAME_SETTINGS:
        if rows[setting].dropna().nunique() > 1:
            values = ", ".join(map(str, rows[setting].dropna().unique()))
            raise UsageError(f"a board compares machines under the same settings, and {setting} is {values}")
    machines = list(dict.fromkeys(rows[MACHINE]))
    common = set.intersection(*(set(rows.loc[rows[MACHINE] == machine, column]) for machine in machines))
    if not common:
        raise UsageError(f"the machines {', '.join(machines)} have no {column} in common")
    return [_table(rows[rows[column] == max(common)], column, machines, metric) for metric in (NORMALISED, SPEEDUP, ROOFLINE)]


def _read(folder: Path) -> pd.DataFrame:
    """The rows of a folder with their machine and normalised time."""
    rows = read_table(folder)
    if MACHINE not in rows:
        records = Ledger(folder / "samples.jsonl").read()[0]
        names = {record["comparison"]: machine_of(record) for record in records if record.get("kind") == "comparison"}
        rows = rows.assign(**{MACHINE: rows["comparison"].map(names)})
    references = rows[rows["attention"] == rows["relative_to"]].set_index("comparison")["roofline_s"]
    units = rows["comparison"].map(references)
    scaled = {"normalised_time": "latency_s", "normalised_low": "latency_low_s", "normalised_high": "latency_high_s"}
    return rows.assign(**{name: rows[latency] / units for name, latency in scaled.items()})


def _table(rows: pd.DataFrame, column: str, machines: Sequence[str], metric: Metric) -> Table:
    reference = next(iter(rows["relative_to"].dropna()), "the reference")
    means = rows.groupby("attention")["normalised_time"].mean()
    names = sorted(rows["attention"].unique(), key=lambda name: (pd.isna(means[name]), means[name]))
    cells = {(row["attention"], row[MACHINE]): row for _, row in rows.iterrows()}
    lines = [[name, *(format_value(cells.get((name, machine)), metric) for machine in machines)] for name in names]
    title = f"{metric.table_title(reference)}, at {column} {format_setting(rows[column].iloc[0])}"
    return Table(title, [["", *machines], *lines])
