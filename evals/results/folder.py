"""`ResultFolder`: the table of latencies in a result folder, and the paired rounds of the ledger beside it."""

import math
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from evals.errors import UsageError, one_sentence
from evals.results import schema
from evals.results.folder_kinds import check_folder
from evals.results.history import History, Process
from evals.results.ledger import Ledger
from evals.results.settings import setting_columns
from evals.stats.intervals import Interval

NEEDED = ("attention", "outcome", "comparison", "relative_to", "seq_len")
OPTIONAL = (
    *("latency_s", "latency_low_s", "latency_high_s", "rounds"),
    *("speedup", "speedup_low", "speedup_high", "noise_floor", "peak_bytes"),
)
"""Columns that are read as unknown if the table lacks them."""
PAIRED, UNPAIRED = "paired", "computed from two intervals, not paired"


class SpeedupEstimate(NamedTuple):
    """How many times faster one attention is than another, and the method: PAIRED or UNPAIRED."""

    ratio: Interval
    method: str


class ResultFolder:
    """One result folder. Raises UsageError if its results.csv is not a table of latencies."""

    def __init__(self, folder: Path) -> None:
        path = folder / "results.csv"
        check_folder(folder, "claim")
        try:
            table = schema.read(path)
        except schema.SchemaVersionError as error:
            raise UsageError(str(error)) from error
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} is no table of results: {one_sentence(error)}") from error
        for column in NEEDED:
            if column not in table.columns:
                raise UsageError(f"{path} has no column {column}: run `python -m evals.run` again")
        self.folder = folder
        self.table = table.reindex(columns=list(dict.fromkeys((*table.columns, *OPTIONAL))))
        self.names = list(dict.fromkeys(map(str, table["attention"])))
        self.settings = setting_columns(table)  # the columns of the settings that rows are compared under

    @cached_property
    def histories(self) -> dict[str, History]:
        """The history of each comparison; empty without a ledger of the present form."""
        records = Ledger(self.folder / "samples.jsonl").read()[0]
        try:
            return {key: History(records, key) for key in self.table["comparison"].unique()}
        except KeyError:  # the ledger has an older form
            return {}

    def select(self, names: Collection[str], settings: Mapping[str, str]) -> pd.DataFrame:
        """Selects rows by attention and by settings.

        Raises:
            UsageError: if a setting is unknown or its value was not measured; the message lists what was measured.
        """
        rows = self.table[self.table["attention"].isin(list(names))]
        for setting, value in settings.items():
            if setting not in self.settings:
                raise UsageError(f"{setting} is no setting of {self.folder}; known are {', '.join(self.settings)}")
            measured = list(map(str, sorted(self.table[setting].dropna().unique())))
            chosen = [text for text in measured if text == value or _number(text) == _number(value)]
            if not chosen:
                raise UsageError(f"{setting} {value} was not measured in {self.folder}; measured are {', '.join(measured)}")
            rows = rows[rows[setting].astype(str).isin(chosen)]
        return rows

    def noise_floor(self, rows: pd.DataFrame) -> float:
        """The highest noise floor of some rows; of the whole table, if the reference failed in these; inf without any."""
        floors = (float(table["noise_floor"].max()) for table in (rows, self.table))
        return next((floor for floor in floors if not math.isnan(floor)), math.inf)

    def speedup(self, ours: "pd.Series[Any]", theirs: "pd.Series[Any]") -> SpeedupEstimate:
        """Estimates theirs' latency over ours' from the table, else from paired rounds of the ledger, else from two intervals."""
        if ours["relative_to"] == theirs["attention"] and not math.isnan(ours["speedup"]):
            return SpeedupEstimate(Interval(ours["speedup"], ours["speedup_low"], ours["speedup_high"]), PAIRED)
        if theirs["relative_to"] == ours["attention"] and not math.isnan(theirs["speedup"]):
            return SpeedupEstimate(Interval(1 / theirs["speedup"], 1 / theirs["speedup_high"], 1 / theirs["speedup_low"]), PAIRED)
        history = self.histories.get(ours["comparison"])
        paired = history and history.speedup(Process(theirs["attention"]), Process(ours["attention"]))
        return SpeedupEstimate(paired, PAIRED) if paired else SpeedupEstimate(_ratio(theirs, ours), UNPAIRED)

    def round_medians(self, row: "pd.Series[Any]") -> list[float]:
        """The median of each round in seconds; without a ledger the published median alone."""
        history = self.histories.get(row["comparison"])
        return (history.round_medians(Process(row["attention"])) if history else []) or [float(row["latency_s"])]

    def log_ratios(self, ours: "pd.Series[Any]", theirs: "pd.Series[Any]") -> list[float]:
        """log(t_ours / t_theirs) for each round that both completed; empty without a ledger."""
        history = self.histories.get(ours["comparison"])
        return history.log_ratios(Process(ours["attention"]), Process(theirs["attention"])) if history else []


def _ratio(numerator: "pd.Series[Any]", denominator: "pd.Series[Any]") -> Interval:
    """The ratio of two independent latencies; the half-widths of their logarithms add in quadrature."""

    def deviation(row: "pd.Series[Any]", bound: str) -> float:
        return math.log(row[bound] / row["latency_s"])

    value = math.log(numerator["latency_s"] / denominator["latency_s"])
    up = math.hypot(deviation(numerator, "latency_high_s"), deviation(denominator, "latency_low_s"))
    down = math.hypot(deviation(numerator, "latency_low_s"), deviation(denominator, "latency_high_s"))
    return Interval(math.exp(value), math.exp(value - down), math.exp(value + up))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
